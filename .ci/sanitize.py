"""Runs the tests of the CPU kernels against a build with the address and the undefined-behaviour sanitizer.

The first error ends the run. `make sanitize` calls it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TESTS = ["tests/ops/test_linear_attention.py", "tests/ops/test_linear_attention_cpu.py"]
# every test of these is about a kernel; of the others those whose name has the backend's
TESTS += ["tests/ops/test_elementwise.py", "tests/infer/test_step.py"]
# the child without a library, and the compiler of torch, run programs of their own under the same sanitizer; which
# libraries the kernels need is another matter in this build
LEFT_OUT = ("torch-", "without_the_library", "compiles", "nothing_but_the_c_library")
CHOSEN = " and ".join(["(cpu or test_elementwise or test_step)", *(f"not {name}" for name in LEFT_OUT)])


def build(library: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from setup import build_kernel, compiler

    cc = compiler()
    if cc is None:
        raise SystemExit("no C compiler was found")
    try:
        build_kernel(cc, library, FLAGS)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr) from error
    # Python is not built with the sanitizer: its runtime must come first, and with it the C++ library whose exceptions
    # it follows; what Python itself never frees is no news
    names = ("libasan.so", "libstdc++.so")
    commands = [[*cc, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(x, check=True, capture_output=True, text=True).stdout.strip() for x in commands]
    os.environ |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}


def test(library: Path) -> int:
    import pytest

    from glade.ops import native

    native.PATH = library
    native.LIBRARY = native.Library()
    return pytest.main([*TESTS, "-x", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow", "-k", CHOSEN])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(test(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "libglade_cpu.so"
        build(built)
        raise SystemExit(subprocess.run([sys.executable, __file__, str(built)], cwd=ROOT).returncode)
