"""Block sizes, warps and stages: one table by dtype and sizes, found by measurement; nothing is searched at run time.

Measured on one H200 (sm_90), H = 16, K = V = 128, 32,768 tokens, GDN-2. Chunks of 32 tokens let several programs share
a processor in the kernels that take a chunk each, which is most of the time (prepare 0.74 ms against 1.34 with chunks
of 64).
"""

from typing import NamedTuple

import torch

# fewer programs than this leave processors of an H100 or H200 without one
MULTIPROCESSORS = 120


class Launch(NamedTuple):
    block: int  # channels a program takes (at a time)
    warps: int  # keys: at most one for 16 channels. With more, Triton 3.6 makes wrong code of that kernel
    stages: int = 1
    block_v: int = 64  # keys only: value channels at a time


class Config(NamedTuple):
    chunk: int
    dtype: torch.dtype  # of what is kept and of the operands of products
    sum_dtype: torch.dtype  # of sums of log decays
    precision: str  # of products of fp32 operands
    prepare: Launch
    states: Launch  # halved down to 16 channels while there are too few programs
    values: Launch
    keys: Launch


def config_for(dtype: torch.dtype, num_tokens: int, KP: int) -> Config:
    """The table's row for KP key channels (a power of two).

    bf16 has a path of its own. fp32 shares one with fp16, whose range is too small for states: everything in fp32,
    products as three tf32 products each.
    """
    if dtype != torch.bfloat16:
        return Config(
            chunk=_chunk(num_tokens, 32),
            dtype=torch.float32,
            sum_dtype=torch.float64,
            precision="tf32x3",
            prepare=Launch(32, 4),
            states=Launch(16, 4),
            values=Launch(32, 4),
            keys=Launch(32, 2, 1, 32),
        )
    return Config(
        chunk=_chunk(num_tokens, 32),
        dtype=torch.bfloat16,
        sum_dtype=torch.float32,
        precision="ieee",
        prepare=Launch(64, 2),
        states=Launch(64 if KP <= 128 else 32, 4, 3),
        values=Launch(128, 4),
        keys=Launch(32, 2, 2, 64),
    )


def _chunk(num_tokens: int, most: int) -> int:
    """The smallest power of two from 16 on that holds all the tokens, at most `most`."""
    chunk = 16
    while chunk < most and chunk < num_tokens:
        chunk *= 2
    return chunk
