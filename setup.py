"""Builds the CPU kernels where a C compiler is; everything else is in pyproject.toml.

They are one plain shared library that Python loads with ctypes, so one wheel serves every Python 3. Without a
compiler the package installs all the same, and says that these backends are absent. `CC` names another compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

FOLDER = "glade/ops/native"
LIBRARY = f"{FOLDER}/libglade_cpu.so"
SOURCES = Path(__file__).parent / FOLDER / "src"

FLAGS = [
    "-std=gnu11",
    "-g0",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
AVX512 = "-DLANES=16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
# by the macro that a compiler for the processor defines
ISAS = {
    "__x86_64__": {
        "avx512bf16": f"{AVX512} -mavx512bf16",
        "avx512": AVX512,
        "avx2": "-DLANES=8 -mavx2 -mfma",
        "baseline": "-DLANES=4",
    },
    "__aarch64__": {"neon": "-DLANES=4"},
}


def compiler() -> list[str] | None:
    """The C compiler as the start of a command, or None where there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    # Microsoft's has no vector extensions
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def build_kernel(cc: list[str], library: Path, extra: tuple[str, ...] = ()) -> None:
    """Compiles the kernels for every instruction set of the compiler's target, into one shared library.

    Raises:
        subprocess.CalledProcessError: the compiler failed; `stderr` says why. OSError: it cannot be run.
    """
    macros = _run([*cc, "-dM", "-E", "-x", "c", os.devnull])
    isas = next((isas for macro, isas in ISAS.items() if f"#define {macro} " in macros), {"baseline": "-DLANES=4"})
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(source, []) for source in sorted(SOURCES.glob("*/*.c")) if _once(source)]
        for isa, flags in isas.items():
            per_isa = [f"-DKERNEL={isa}", *flags.split()]
            jobs += [(source, per_isa) for source in sorted(SOURCES.glob("*/*.c")) if not _once(source)]

        def compile_one(number: int) -> str:
            source, flags = jobs[number]
            out = f"{folder}/{number}.o"
            _run([*cc, *FLAGS, f"-I{SOURCES / 'common'}", *flags, *extra, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(jobs))))
        library.parent.mkdir(parents=True, exist_ok=True)
        # to its final name in one step: a running process may have the old one mapped
        fresh = library.with_suffix(".fresh")
        _run([*cc, "-shared", "-pthread", *extra, *objects, "-lm", "-o", str(fresh)])
        fresh.replace(library)


def _once(source: Path) -> bool:
    """Whether a source is compiled once: what all share, and the entry points. The others: once for each set."""
    return source.parent.name == "common" or source.name == "entry.c"


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class BuildWithKernel(build_py):
    """`build_py` that also compiles the kernels: beside their sources for an editable install, else into the build."""

    def run(self) -> None:
        super().run()
        cc = compiler()
        library = Path(LIBRARY) if self.editable_mode else Path(self.build_lib) / LIBRARY
        if cc is None:
            _absent("no C compiler was found")
            return
        try:
            build_kernel(cc, library)
        except subprocess.CalledProcessError as error:
            _absent(f"{shlex.join(error.cmd)} failed:\n{error.stderr}")
        except OSError as error:
            _absent(f"{cc[0]} cannot be run: {error}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        library = Path(self.build_lib) / LIBRARY
        return super().get_outputs(include_bytecode) + ([str(library)] if library.exists() else [])


def _absent(reason: str) -> None:
    print(f"glade: the fast CPU kernels are left out, torch serves instead: {reason}", file=sys.stderr)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return compiler() is not None


class PlatformWheel(bdist_wheel):
    """The library is called by ctypes: the wheel depends on the platform, not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if __name__ == "__main__":
    setup(
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildWithKernel, "bdist_wheel": PlatformWheel},
    )
