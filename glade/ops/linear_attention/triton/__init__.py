"""Backend `triton`: the recurrence in a few kernels for NVIDIA GPUs, forward and backward, and one for the decode step.

    op                  which of the two sets of kernels serves a call
    call, launch        what every launch needs
    launcher            launches that the host is soon done with
    configs             block sizes: rows of table.json
    tiles               what the kernels share
    assembler           which ptxas turns them into machine code
    segments            the states at the borders of a long sequence's segments
    step                the decode step

where decay or erase is a vector (`vector_op` launches these)

    prepare             1  each chunk by itself: pre-gated q, k, erase k, pair products, inverse
    states              2  the pass over chunks, and its backward, 3
    values_backward     4  gradients of v, write and the pair products
    vector_keys         5  gradients of q, k, erase and g, a span of chunks; keys_backward where g is no vector
    vector_split        long sequences in segments, where programs are too few: launches vector_segments

where both are scalar or absent (`scalar_op`): no gated copies, less memory moved

    scalar_prepare      1  each chunk by itself: sums of log decays, inverse
    scalar_states       2  the pass over chunks, and its backward, 3, with the gradients of v and write
    scalar_keys         4  gradients of q, k, erase and g
    scalar_split        long sequences in segments: launches scalar_segments

and on sm_90, in the place of `states`, `scalar_states` and `scalar_keys` where it serves a call, `hopper`, in Gluon.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

INSTALLED = torch.version.cuda is not None and find_spec("triton") is not None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device; these tensors are on {device}"
    if not INSTALLED:
        return "needs the package triton, which is not installed with this torch"
    if dtype == torch.float64:
        return "has no fp64"
    return None


run: Callable[..., Any]
step_: Callable[..., Any]
if INSTALLED:
    from glade.ops.linear_attention.register import register
    from glade.ops.linear_attention.triton import op, step
    from glade.ops.linear_attention.triton.assembler import choose_assembler

    choose_assembler()
    run = register("triton", op.forward, op.backward, op.kept_like)
    step_ = step.step_
else:

    def _never(*_: Any) -> Any:
        raise AssertionError("`refuses` lets no call through to here")

    run = step_ = _never
