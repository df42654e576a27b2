"""Launches that the host is soon done with.

Triton looks at every argument of a launch, and hashes all that it has found, before it knows which compiled kernel is
meant: some 20 us a launch, and a backward runs in a thread of its own, where Python takes several times as long. Here a
launch of a kind that has been before goes to the kernel that Triton chose then.

What tells kinds apart is all that Triton looks at, and more: of a tensor its dtype and whether it begins at a multiple
of 16 bytes; numbers by their values; those of `constants` and `strides_of`, which stay for good, by their identity.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_KINDS = 4096  # every new number is one; beyond, all are found again


def _of_tensor(x: Tensor) -> tuple:
    return x.dtype, x.data_ptr() % 16 == 0


def of_tiles(x: Any) -> tuple:
    return x.base.dtype, *x.block_shape


def _of_other(x: Any) -> Any:
    if isinstance(x, Tensor):  # a parameter
        return _of_tensor(x)
    assert x is None or isinstance(x, int | str), x
    return x


KIND = {
    Tensor: _of_tensor,
    TensorDescriptor: of_tiles,
    float: lambda x: float,
    tuple: id,  # of `strides_of`
    tl.constexpr: id,  # of `constants`
    tl.dtype: id,
}
_kernels: dict[tuple, tuple[Any, tuple[str, ...]]] = {}


def start(kernel: Any, programs: int, *arguments: Any, **named: Any) -> None:
    """kernel[(programs,)](*arguments, **named); `arguments` are the kernel's first parameters."""
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[(programs,)](*arguments, **named)
        return
    kinds = [KIND.get(type(x), _of_other)(x) for x in (*arguments, *named.values())]
    kind = (id(kernel), driver.active.get_current_device(), len(arguments), *named, *kinds)
    known = _kernels.get(kind)
    if known is not None:
        compiled, names = known
        compiled[programs, 1, 1](*arguments, *(named[name] for name in names))
        return
    compiled = kernel[(programs,)](*arguments, **named)
    if compiled is not None:
        if len(_kernels) >= MOST_KINDS:
            _kernels.clear()
        _kernels[kind] = compiled, tuple(kernel.arg_names[len(arguments) :])
