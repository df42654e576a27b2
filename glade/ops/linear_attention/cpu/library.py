"""The compiled kernel: where it lies, which of its builds this processor runs, and its calls as plain numbers.

Nothing here knows torch's ABI: tensors cross as addresses and strides (`native/call.h`), so one library serves every
version of torch and of Python. `setup.py` builds it next to this file where a C compiler is.
"""

import ctypes
import struct
from pathlib import Path

PATH = Path(__file__).with_name("libglade_cpu.so")

# native/call.h: an Array is 7 numbers; a Call has 14 of them, a Step 7
ABSENT = (0, 0, 0, 0, 0, 0, 0)
_CALL = struct.Struct("=8q d 42q 2q 7q 2q 49q 2q")
_STEP = struct.Struct("=6q d 49q 4q")


class Library:
    """The library at `path` (None is `PATH`), bound to its build `isa` (None is the fastest that this processor runs).

    Raises:
        OSError: there is no library at `path`, or it cannot be loaded. ValueError: this processor cannot run `isa`.
    """

    def __init__(self, path: Path | None = None, isa: str | None = None):
        native = ctypes.CDLL(str(path or PATH))
        native.glade_kernel_name.restype = ctypes.c_char_p
        native.glade_checkpoint.restype = ctypes.c_int64
        names = _names(native)
        runnable = [name for name in names if name]
        if isa is not None and isa not in runnable:
            raise ValueError(f"isa is {isa!r}; of the kernel's builds this processor runs {', '.join(runnable)}")
        self.isas = runnable
        self.isa = runnable[0] if isa is None else isa
        self.checkpoint: int = native.glade_checkpoint()
        self._index = names.index(self.isa)
        self._forward, self._backward, self._step = native.glade_forward, native.glade_backward, native.glade_step
        for function in (self._forward, self._backward, self._step):
            function.argtypes = [ctypes.c_char_p, ctypes.c_int]

    def forward(self, *numbers: float) -> None:
        _check(self._forward(_CALL.pack(*numbers), self._index))

    def backward(self, *numbers: float) -> None:
        _check(self._backward(_CALL.pack(*numbers), self._index))

    def step(self, *numbers: float) -> None:
        _check(self._step(_STEP.pack(*numbers), self._index))


def _names(native: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := native.glade_kernel_name(len(names))) is not None:
        names.append(name.decode())
    return names


def _check(status: int) -> None:
    if status == -1:
        raise MemoryError("the CPU kernel of linear_attention could not get its working memory")
    if status == -2:
        raise ValueError("slots name a row that the state does not have; they must lie in 0 .. rows - 1")
    assert status == 0, status


def _open() -> tuple[Library | None, str | None]:
    """The library of this installation, or why there is none."""
    if not PATH.exists():
        return None, "was not built: no C compiler was found, or it failed, when the package was installed"
    try:
        return Library(), None
    except OSError as error:
        return None, f"could not be loaded ({error})"


# once, when the package is imported: a traced call may ask, and may not open files
LIBRARY, ABSENCE = _open()
