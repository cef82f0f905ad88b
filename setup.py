# Builds flash_attention._C: csrc/bindings/ against the torch that will import it, linked with the C core that
# `make lib` builds. An extension fits one torch minor version, so the torch already installed is looked for even from
# within pip's isolated build environment; only where there is none does the build ask for one of its own.
import os
import re
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIB = Path(os.environ.get("BUILD") or "build", "libflash_attention.a")  # as the Makefile has it
TORCH = "torch>=2.9"

if int(__version__.split(".")[0]) < 77:  # older ones do not know pyproject.toml's license = "MIT"
    raise SystemExit(f"setuptools {__version__} is too old: pip install -U 'setuptools>=77' ninja, then repeat")


def import_builder():
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("platlib"))  # that of the environment we are installed into
        import torch
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        raise ImportError
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    return BuildExtension, CppExtension


try:
    BuildExtension, CppExtension = import_builder()
    requires = []
except ImportError:
    if not {"egg_info", "sdist"} & set(sys.argv):  # what only asks for requirements or packs the sources goes on
        raise SystemExit(
            f"flash_attention is compiled against {TORCH}, and {sys.executable} has none: install torch, then repeat"
        ) from None
    BuildExtension, CppExtension = build_ext, Extension
    requires = [TORCH]


class build_extension(BuildExtension):
    def run(self):
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # the jobs of a make that called us are not ours to use
            os.environ.pop(name, None)
        subprocess.check_call(["make", f"-j{os.cpu_count()}", "lib"], cwd=ROOT)
        for extension in self.extensions:
            extension.extra_link_args += LIB.with_suffix(".libs").read_text().split()
        super().run()


setup(
    version=re.search(r'FA_VERSION "(.+)"', (ROOT / "csrc/flash_attention.h").read_text())[1],
    packages=find_packages(include=["flash_attention*"]),
    ext_modules=[
        CppExtension(
            "flash_attention._C",
            sorted(glob("csrc/bindings/*.cpp")),
            include_dirs=[str(ROOT.resolve() / "csrc")],
            # at::parallel_for runs on torch's OpenMP threads: compiled with -fopenmp, never linked with a second pool
            extra_compile_args=["-O2", "-g0"] + (["-fopenmp"] if sys.platform == "linux" else []),
            extra_objects=[str(LIB)],
            depends=[str(LIB), "csrc/flash_attention.h", *sorted(glob("csrc/bindings/*.h"))],
        )
    ],
    cmdclass={"build_ext": build_extension},
    setup_requires=requires,
)
