// Runs every test once for each instruction set of this machine and once on its GPU, each in a process of its own: the
// instruction set is chosen once a process, CUDA does not survive a fork, and a crash is then a failure with a name.
#define _GNU_SOURCE
#include "harness.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/gpu.h"
#include "flash_attention.h"

bool g_quick, g_sanitize;
static const char *g_place = "cuda"; // an instruction set, or "cuda"

static struct tally { // shared with the child processes
    int passed, failed;
    bool is_open, has_failed, is_here;
    char test[256];
} *tally;

static void test_end(void) {
    if (tally->is_open) ++*(tally->has_failed ? &tally->failed : &tally->passed);
    tally->is_open = false;
}

void test_begin(const char *format, ...) {
    va_list values;
    test_end();
    tally->is_open = true;
    tally->has_failed = false;
    va_start(values, format);
    vsnprintf(tally->test, sizeof tally->test, format, values);
    va_end(values);
}

bool expect(bool holds, const char *format, ...) {
    if (holds) return true;
    va_list values;
    tally->has_failed = true;
    printf("FAILED [%s] %s: ", g_place, tally->test);
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    printf("\n");
    return false;
}

// ---- processes ------------------------------------------------------------------------------------------------------

static void run_on_cpu(void) {
    setenv("FLASH_ATTENTION_ISA", g_place, 1);
    tally->is_here = fa_cpu_isa() != NULL;
    if (!tally->is_here) return;
    test_begin("the instruction set in use is the one asked for");
    expect(strcmp(g_place, fa_cpu_isa()) == 0, "%s", fa_cpu_isa());
    test_tables();
    test_gate();
    test_finite_differences();
    test_attention(FA_CPU);
    test_kvcache_gate();
    test_kvcache(FA_CPU);
    test_end();
}

static void run_on_gpu(void) {
    tally->is_here = gpu_missing() == NULL;
    if (!tally->is_here) {
        printf("%-12s left out: %s\n", g_place, gpu_missing());
        return;
    }
    test_attention(FA_CUDA);
    test_kvcache(FA_CUDA);
    test_invalid_lengths();
    test_end();
}

static void run_process(const char *place, void (*run)(void)) {
    g_place = place;
    fflush(stdout);
    const int passed = tally->passed, failed = tally->failed;
    const pid_t child = fork();
    if (child == 0) {
        run();
        exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status) || WEXITSTATUS(status) != 0) {
        printf("FAILED [%s] %s: %s\n", place, tally->test,
               WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "stopped (see above)");
        ++tally->failed;
        tally->is_open = false;
    }
    if (tally->is_here) printf("%-12s %5d passed, %d failed\n", place, tally->passed - passed, tally->failed - failed);
}

static const char kUsage[] =
    "usage: c_tests [--device cpu|cuda] [--quick] [--sanitize]\n"
    "  --device    one alone; without it both, the GPU if there is one\n"
    "  --quick     leave out what is slow under valgrind\n"
    "  --sanitize  on the GPU what compute-sanitizer is to watch, in this process; --quick: each case in one dtype\n"
    "FLASH_ATTENTION_ISA, if set, is the CPU's only instruction set.\n";

int main(int argc, char **argv) {
    static const char *const kIsas[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
    bool cpu = true, gpu = true;
    setvbuf(stdout, NULL, _IOLBF, 0); // what was printed before a crash is seen
    tally = mmap(NULL, sizeof *tally, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 1; i < argc; ++i) {
        const bool device = strcmp(argv[i], "--device") == 0 && i + 1 < argc;
        if (device && strcmp(argv[i + 1], "cpu") == 0) {
            gpu = false, ++i;
        } else if (device && strcmp(argv[i + 1], "cuda") == 0) {
            cpu = false, ++i;
        } else if (strcmp(argv[i], "--quick") == 0) {
            g_quick = true;
        } else if (strcmp(argv[i], "--sanitize") == 0) {
            g_sanitize = true;
        } else {
            fputs(kUsage, stderr);
            return 2;
        }
    }
    const char *only = getenv("FLASH_ATTENTION_ISA");
    for (size_t i = 0; i < sizeof kIsas / sizeof kIsas[0]; ++i)
        if (cpu && !g_sanitize && (!only || strcmp(only, kIsas[i]) == 0)) run_process(kIsas[i], run_on_cpu);
    if (g_sanitize)
        run_on_gpu();
    else if (gpu)
        run_process("cuda", run_on_gpu);
    printf("%d passed, %d failed\n", tally->passed, tally->failed);
    return tally->failed > 0 || tally->passed == 0;
}
