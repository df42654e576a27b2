"""The compiled kernels of the CPU backends: where the library lies, which of its builds this processor runs, its calls.

Nothing here knows torch's ABI: an entry point takes one record of plain numbers, tensors as addresses and strides
(`src/common/array.h`), so one library serves every version of torch and of Python. `setup.py` builds it next to this
file where a C compiler is: for every instruction set one build of the sources in `src`.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("libglade_cpu.so")

# an Array of src/common/array.h: address, dtype, width, strides of batch, token, head and channel
ABSENT = (0, 0, 0, 0, 0, 0, 0)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NO_MEMORY = -1


class Library:
    """The library at `path` (None is `PATH`), bound to its build `isa` (None is the fastest that this processor runs).

    Raises:
        OSError: there is no library at `path`, or it cannot be loaded. ValueError: this processor cannot run `isa`.
    """

    def __init__(self, path: Path | None = None, isa: str | None = None):
        self._native = ctypes.CDLL(str(path or PATH))
        self._native.glade_kernel_name.restype = ctypes.c_char_p
        names = _names(self._native)
        self.isas = [name for name in names if name]
        if isa is not None and isa not in self.isas:
            raise ValueError(f"isa is {isa!r}; of the kernel's builds this processor runs {', '.join(self.isas)}")
        self.isa = self.isas[0] if isa is None else isa
        self._index = names.index(self.isa)

    def call(self, function: str, record: bytes) -> int:
        """What the entry point `function` answers to one record: 0, or a code of its own below NO_MEMORY.

        Raises:
            MemoryError: it could not get its working memory.
        """
        status = getattr(self._native, function)(record, self._index)
        if status == NO_MEMORY:
            raise MemoryError(f"{function}, a CPU kernel, could not get its working memory")
        return status

    def constant(self, function: str) -> int:
        """The number that a function without arguments answers."""
        return getattr(self._native, function)()


def _names(native: ctypes.CDLL) -> list[str]:
    """The builds in the library, the fastest first; "" for one that this processor cannot run."""
    names: list[str] = []
    while (name := native.glade_kernel_name(len(names))) is not None:
        names.append(name.decode())
    return names


def array(x: Tensor | None) -> tuple[int, ...]:
    """[B, T, heads, channels], or [B, T, heads] for one number a head, as `Array` of src/common/array.h."""
    if x is None:
        return ABSENT
    if x.dim() == 3:
        return (x.data_ptr(), DTYPES[x.dtype], 1, *x.stride(), 1)
    batch, token, head, channel = x.stride()
    return (x.data_ptr(), DTYPES[x.dtype], x.shape[3], batch, token, head, int(channel != 0))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
