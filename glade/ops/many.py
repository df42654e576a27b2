"""The same thing done to many tensors by a few kernels, where a loop would launch one for each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Each of `tensors` into the one of `to` at its place, cast on the way; pairs of the same dtypes together."""
    pairs = list(zip(to, tensors, strict=True))
    for dtypes in dict.fromkeys((there.dtype, x.dtype) for there, x in pairs):
        theirs, ours = zip(*(pair for pair in pairs if (pair[0].dtype, pair[1].dtype) == dtypes), strict=True)
        torch._foreach_copy_(theirs, ours, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous ones, without a gradient."""
    with torch.no_grad():
        copies = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        copy_all(copies, tensors)
    return copies
