"""Calls of the elementwise kernels: functions that map rows of channels to rows of channels.

Source: src/elementwise; what the matrices of a function are stands there, at the function.
"""

import struct

import torch
from torch import Tensor

from glade.ops import native

# in the order of EACH_ROW_FUNCTION in src/elementwise/kernel.h
_FUNCTIONS = (
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "log_decay",
    "log_decay_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
)
_INDEX = {name: i for i, name in enumerate(_FUNCTIONS)}

NUM_MATRICES = 8
_ROW_CALL = struct.Struct(f"=7q d {3 * NUM_MATRICES}q q")
_ABSENT = (0, 0, 0)


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why calls of this device and dtype cannot be served, or None if they can."""
    if device.type != "cpu":
        return f"needs tensors on the CPU; these are on {device}"
    if dtype not in native.DTYPES:
        return f"serves fp32 and bf16; these tensors are {dtype}"
    return native.ABSENCE


def library() -> native.Library:
    assert native.LIBRARY is not None, native.ABSENCE
    return native.LIBRARY


def rows_of(x: Tensor, width: int) -> Tensor:
    """x as [rows, width] whose channels lie next to each other: a view where that can be, else a copy."""
    x = x.reshape(-1, width) if width else x.reshape(0, 0)
    return x if x.stride(1) == 1 or width <= 1 else x.contiguous()


def numbers(x: Tensor | None) -> tuple[int, int, int]:
    """A [rows, width] tensor as `Matrix` of src/elementwise/call.h."""
    return _ABSENT if x is None else (x.data_ptr(), native.DTYPES.get(x.dtype, 0), x.stride(0))


def call(
    function: str,
    *matrices: Tensor | None,
    rows: int,
    width: int,
    heads: int = 1,
    kind: int = 0,
    eps: float = 0.0,
    sums: Tensor | None = None,
) -> None:
    """Runs `function` over all rows; `matrices` [rows, width] in its order, `sums` [num_sums, width] fp32."""
    given = [number for x in matrices for number in numbers(x)]
    record = _ROW_CALL.pack(
        *(_INDEX[function], rows, width, heads, kind, 0 if sums is None else len(sums), torch.get_num_threads(), eps),
        *given,
        *(_ABSENT * (NUM_MATRICES - len(matrices))),
        native.address(sums),
    )
    library().call("glade_rows", record)
