# make help lists the targets. Settings, on the command line or in the environment:
#   PYTHON=python3        whose torch is used; where it has none, .venv is made from it
#   FA_CUDA=              empty: CUDA kernels for the GPU seen, if any from sm_80 on; 1: for all FA_CUDA_ARCHS; 0: none
#   FA_CUDA_ARCHS=        sm_80 sm_90a
#   CC, CFLAGS, NVCC      compilers; CFLAGS are added to ours. WERROR= lets warnings pass
#   BUILD=build           where everything goes
#   ARGS=                 handed to demo, test, gpu-test, fuzz
#   ARGS_CTEST=           handed to the C tests: --quick, --device cpu|cuda
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BUILD  ?= build
PYTHON ?= python3
NVCC   ?= nvcc
WERROR ?= -Werror

# ---- the C core -----------------------------------------------------------------------------------------------------

C_FLAGS := -std=c11 -O3 -ffp-contract=off -fPIC -pthread -Wall -Wextra -Wpedantic $(WERROR) -Icsrc $(CFLAGS)

# csrc/cpu/isa/<instruction set>_*.c; only the scalar ones are for every machine
FLAGS_avx2       := -mavx2 -mfma -mf16c
FLAGS_avx512     := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
IS_X86           := $(filter x86_64-% amd64-%,$(shell $(CC) -dumpmachine))
ISA_SOURCES      := $(wildcard csrc/cpu/isa/$(if $(IS_X86),,scalar_)*.c)

C_SOURCES := $(wildcard csrc/*.c csrc/cpu/*.c) $(ISA_SOURCES)
LIB       := $(BUILD)/libflash_attention.a
OBJECTS    = $(C_SOURCES:csrc/%.c=$(BUILD)/obj/%.o) $(CUDA_SOURCES:csrc/%.cu=$(BUILD)/obj/%.cu.o)

# ---- CUDA -----------------------------------------------------------------------------------------------------------

ALL_CUDA_SOURCES := $(wildcard csrc/cuda/*.cu)
ifneq ($(ALL_CUDA_SOURCES),)
ifeq ($(FA_CUDA),)
  GPU_ARCHS := $(shell command -v $(NVCC) >/dev/null && nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
      2>/dev/null | sed -nE 's/^([89]|[1-9][0-9])\.([0-9]+)$$/sm_\1\2/p' | sed 's/^sm_90$$/sm_90a/' | sort -u)
  ifneq ($(GPU_ARCHS),)
    FA_CUDA_ARCHS ?= $(GPU_ARCHS)
    CUDA_SOURCES  := $(ALL_CUDA_SOURCES)
  endif
else ifneq ($(FA_CUDA),0)
  CUDA_SOURCES  := $(ALL_CUDA_SOURCES)
endif
endif
FA_CUDA_ARCHS ?= sm_80 sm_90a
HAS_SM90      := $(filter sm_90a,$(FA_CUDA_ARCHS))
CUDA_SOURCES  := $(if $(HAS_SM90),$(CUDA_SOURCES),$(filter-out %_sm90.cu,$(CUDA_SOURCES)))

NVCC_FLAGS := -std=c++17 -O3 -lineinfo --threads 0 -Xptxas -v -Xfatbin=-compress-all -Xcompiler=-fPIC,-Wall -Icsrc \
    $(if $(HAS_SM90),-DFA_WITH_SM90)
gencode     = $(foreach arch,$(if $(filter %_sm90.cu,$(1)),sm_90a,$(FA_CUDA_ARCHS)),\
    -gencode arch=$(arch:sm_%=compute_%),code=$(arch))
# Where nvcc looks, so that the runtime is the one that belongs to it; nvcc from PyPI says lib64 and has lib.
nvcc_paths    = $(shell $(NVCC) --dryrun -x cu /dev/null 2>&1 | sed -n 's/"//g; s/^.. $(1)=//p')
lib_or_lib64  = $(sort $(1) $(1:%/lib64=%/lib))
CUDA_INCLUDES = $(patsubst -I%,-isystem %,$(call nvcc_paths,INCLUDES))
CUDA_LIBS     = $(call lib_or_lib64,$(call nvcc_paths,LIBRARIES)) -lcudart_static -ldl -lrt -lstdc++

# ---- rules ----------------------------------------------------------------------------------------------------------

# Written beside the target, then moved: two makes in one folder never see half a file.
define compile
@mkdir -p $(@D)
@echo '$(firstword $(1)) $<'; $(1) -MMD -MP -MF $@.$$$$.d -MT $@ -c $< -o $@.$$$$ && mv $@.$$$$.d $(@:.o=.d) && mv $@.$$$$ $@
endef
# Beside the object, x.cu.log holds what ptxas says of each kernel; the rest of what nvcc says is shown.
PTXAS_REPORT := ^ptxas info *: (Compiling|Function properties|Used|Compile time|[0-9]+ bytes)|^ *[0-9]+ bytes stack frame
define compile_cuda
@mkdir -p $(@D)
@echo '$(NVCC) $<'; $(NVCC) $(NVCC_FLAGS) $(call gencode,$<) -MMD -MP -MF $@.$$$$.d -MT $@ -c $< -o $@.$$$$ 2>&1 | c++filt \
    > $@.$$$$.log; status=$$?; grep -vE '$(PTXAS_REPORT)' $@.$$$$.log >&2; \
    mv $@.$$$$.log $(@:.o=.log) && [ $$status = 0 ] && mv $@.$$$$.d $(@:.o=.d) && mv $@.$$$$ $@
endef
# Writes $(1) to the target only if that changes it, so that what depends on it is built again.
define remember
@mkdir -p $(@D)
@echo '$(1)' | cmp -s - $@ || { echo '$(1)' > $@.$$$$ && mv $@.$$$$ $@; }
endef

$(BUILD)/obj/kernel_table.o: FLAGS = $(if $(CUDA_SOURCES),-DFA_WITH_CUDA)
$(BUILD)/obj/bench/gpu.o: FLAGS = $(if $(CUDA_SOURCES),-DFA_WITH_CUDA $(CUDA_INCLUDES))
$(BUILD)/obj/cpu/isa/%.o: FLAGS = $(FLAGS_$(firstword $(subst _, ,$(notdir $*))))
$(BUILD)/obj/kernel_table.o $(BUILD)/obj/bench/gpu.o: $(BUILD)/objects
$(BUILD)/obj/%.o: csrc/%.c $(BUILD)/flags
	$(call compile,$(CC) $(C_FLAGS) $(FLAGS))
$(BUILD)/obj/%.cu.o: csrc/%.cu $(BUILD)/cuda-flags
	$(compile_cuda)

$(LIB): $(OBJECTS) $(BUILD)/objects
	@rm -f $@.$$$$; $(AR) rcs $@.$$$$ $(OBJECTS) && mv $@.$$$$ $@

# What a program that links the archive links besides.
$(BUILD)/libflash_attention.libs: FORCE
	$(call remember,$(strip $(if $(CUDA_SOURCES),$(CUDA_LIBS)) -lpthread -lm))
$(BUILD)/flags: FORCE
	$(call remember,$(CC) $(C_FLAGS))
$(BUILD)/cuda-flags: FORCE
	$(call remember,$(NVCC) $(NVCC_FLAGS) $(FA_CUDA_ARCHS))
$(BUILD)/objects: FORCE
	$(call remember,$(OBJECTS))
FORCE:

LINK = @echo 'link $@'; $(CC) $(C_FLAGS) -o $@.$$$$ $(filter %.o %.a,$^) $$(cat $(BUILD)/libflash_attention.libs) && mv $@.$$$$ $@
BENCH         := $(BUILD)/attention_bench
C_TESTS       := $(BUILD)/c_tests
BENCH_OBJECTS := $(patsubst csrc/%.c,$(BUILD)/obj/%.o,$(wildcard csrc/bench/*.c))
TEST_OBJECTS  := $(patsubst csrc/%.c,$(BUILD)/obj/%.o,$(wildcard csrc/tests/*.c) csrc/bench/gpu.c)
$(BENCH): $(BENCH_OBJECTS) $(LIB) $(BUILD)/libflash_attention.libs
	$(LINK)
$(C_TESTS): $(TEST_OBJECTS) $(LIB) $(BUILD)/libflash_attention.libs
	$(LINK)

-include $(patsubst %.o,%.d,$(OBJECTS) $(TEST_OBJECTS) $(BENCH_OBJECTS))

# ---- Python ---------------------------------------------------------------------------------------------------------

# The environment: that of $(PYTHON) where it has torch, as it is; else .venv with requirements.txt.
ifeq ($(shell $(PYTHON) -c 'import importlib.util as u; print(bool(u.find_spec("torch")))' 2>/dev/null),True)
  PY := $(PYTHON)
else
  PY := .venv/bin/python
  ENVIRONMENT := .venv/installed
endif
ONE_AT_A_TIME := $(if $(shell command -v flock),flock $(BUILD)/lock)
EXTENSION     := $(BUILD)/extension

.venv/installed: requirements.txt
	@mkdir -p $(BUILD)
	$(ONE_AT_A_TIME) $(PYTHON) -m venv .venv
	$(ONE_AT_A_TIME) .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

# Which torch the extension is for: another one, or a missing extension, builds it again.
$(BUILD)/torch: $(ENVIRONMENT) FORCE
	@mkdir -p $(@D)
	@$(PY) -c 'import sys; from importlib.metadata import version; print(sys.prefix, version("torch"))' > $@.$$$$ && \
	{ compgen -G 'flash_attention/_C*.so' >/dev/null && cmp -s $@.$$$$ $@ && rm $@.$$$$ || mv $@.$$$$ $@; }

$(EXTENSION): $(wildcard csrc/bindings/*) setup.py $(LIB) $(BUILD)/libflash_attention.libs $(BUILD)/torch
	+$(ONE_AT_A_TIME) $(PY) setup.py --quiet build_ext --inplace
	@touch $@

DEVTOOLS := $(BUILD)/devtools
$(DEVTOOLS)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(DEVTOOLS)
	$(DEVTOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# ---- what a person asks for -----------------------------------------------------------------------------------------

.PHONY: help lib extension demo test gpu-test ctest bench fuzz sanitize sanitize-cuda ptxas ptxas-table fmt fmt-check clean FORCE

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s @

demo: extension ## prepare everything, then compare naive, fused and PyTorch: table, CSV, plots
	$(PY) -m benchmarks.demo $(ARGS)

test: extension ctest ## prepare everything, then all tests
	$(PY) -m pytest tests $(ARGS)

gpu-test: extension $(C_TESTS) ## prepare everything, then the tests that need a GPU: the C ones, then Python's
	$(C_TESTS) --device cuda $(ARGS_CTEST)
	$(PY) -m pytest tests -m gpu -p tests.gpu_report $(ARGS)

lib: $(LIB) $(BUILD)/libflash_attention.libs ## build/libflash_attention.a: the C core

extension: $(EXTENSION) ## the Python extension, in place

bench: $(BENCH) ## build/attention_bench: the C driver, no Python needed

ctest: $(C_TESTS) ## the C tests, once for each instruction set of this machine and once on the GPU
	$(C_TESTS) $(ARGS_CTEST)

fuzz: extension ## random cases; ARGS="--seconds 600 --device cuda --impl fused"
	$(PY) -m tests.fuzz $(ARGS)

sanitize: $(C_TESTS) ## the C tests under gcc's sanitizers, valgrind and compute-sanitizer, where these are there
	+$(MAKE) BUILD=$(BUILD)/asan CFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" FA_CUDA=0 ctest
	+$(MAKE) BUILD=$(BUILD)/tsan CFLAGS="-g -fsanitize=thread" FA_CUDA=0 ARGS_CTEST=--quick ctest
	@if command -v valgrind >/dev/null; then echo valgrind; \
	     valgrind -q --error-exitcode=1 $(C_TESTS) --device cpu --quick; \
	 else echo 'valgrind: not installed, left out'; fi
	+@if command -v compute-sanitizer >/dev/null && nvidia-smi -L >/dev/null 2>&1; then $(MAKE) sanitize-cuda; \
	  else echo 'compute-sanitizer: not installed, or no GPU here: left out'; fi

CUDA_SANITIZERS   := memcheck racecheck synccheck initcheck
SANITIZER_OPTIONS := $$(test $$tool != memcheck || echo --padding 512)# cudaMalloc puts no gap between two blocks
sanitize-cuda: $(C_TESTS) ## the C tests' CUDA kernels under compute-sanitizer; CUDA_SANITIZERS="memcheck" for one tool
	@for tool in $(CUDA_SANITIZERS); do echo "compute-sanitizer $$tool"; \
	     compute-sanitizer --tool $$tool $(SANITIZER_OPTIONS) --error-exitcode 1 $(C_TESTS) --sanitize \
	         $$(test $$tool != racecheck || echo --quick) || exit 1; done # racecheck takes ten times as long

ptxas: ## registers, shared memory and spills of every CUDA kernel; fails if a hot one spills
	+@$(MAKE) --no-print-directory BUILD=$(BUILD)/cuda FA_CUDA=1 ptxas-table
ptxas-table: $(LIB)
	@awk -f csrc/cuda/ptxas.awk $(CUDA_SOURCES:csrc/%=$(BUILD)/obj/%.log)

C_FILES := $(shell find csrc -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
fmt: $(DEVTOOLS)/installed ## clang-format and ruff, in place
	$(DEVTOOLS)/bin/clang-format -i $(C_FILES)
	$(DEVTOOLS)/bin/ruff check --fix . && $(DEVTOOLS)/bin/ruff format .

fmt-check: $(DEVTOOLS)/installed ## the same, only looking
	$(DEVTOOLS)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(DEVTOOLS)/bin/ruff check . && $(DEVTOOLS)/bin/ruff format --check .

clean: ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info flash_attention/_C*.so
