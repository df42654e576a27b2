"""Block sizes, warps and stages: rows of `table.json`, found by measurement (`glade bench tune`), never at run time.

A row holds for an architecture, a corner, a dtype and K x V. A call that no row is made for takes the nearest: never
one for other kernels or smaller heads where there is another, then the same architecture, then the same corner, then
the nearest size.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("table.json")

PROCESSORS = 132  # of an H100 or H200
MULTIPROCESSORS = 120  # less a tenth: programs on so many are as good as on all
LONGEST_OF_A_VECTOR = 32  # tokens of a chunk where g is a vector (`prepare.py`)
KINDS = ("none", "scalar", "vector")


class Launch(NamedTuple):
    block: int  # channels a program takes (at a time)
    warps: int  # keys of vector gates: at most one for 16 channels or tokens, else they would repeat products
    stages: int = 1
    block_v: int = 64  # keys of vector gates only: value channels at a time
    # The most a thread may have, 0: as many as the compiler takes. With fewer, some are kept in memory, but more
    # programs share a processor, and one computes while another waits.
    registers: int = 0

    @property
    def options(self) -> dict[str, int | None]:
        return dict(num_warps=self.warps, maxnreg=self.registers or None)


class Config(NamedTuple):
    chunk: int
    prepare: Launch
    forward: Launch  # the passes over states: halved down to 16 channels while there are too few programs
    backward: Launch
    keys: Launch
    values: Launch | None = None  # the kernels for scalar gates have no such launch
    span: int = 1  # chunks that a program of keys takes together; states are kept at their borders


class Numbers(NamedTuple):
    dtype: torch.dtype  # of what is kept and of the operands of products
    sum_dtype: torch.dtype  # of sums of log decays
    precision: str  # of products of fp32 operands


class Row(NamedTuple):
    arch: int  # 90 is sm_90
    corner: tuple[str, ...]  # the kinds of g, erase, write
    wide: bool
    K: int
    V: int
    config: Config


# bf16 has a path of its own. fp32 shares one with fp16, whose range is too small for states: everything in fp32,
# products as three tf32 products each.
LOW = Numbers(torch.bfloat16, torch.float32, "ieee")
WIDE = Numbers(torch.float32, torch.float64, "tf32x3")


def config_for(
    kinds: tuple[int, int, int], dtype: torch.dtype, num_tokens: int, KP: int, VP: int, device: torch.device
) -> tuple[Config, Numbers]:
    """The nearest row for a call: kinds of g, erase and write, and KP x VP channels (powers of two)."""
    numbers = LOW if dtype == torch.bfloat16 else WIDE
    config = nearest(arch_of(device), tuple(KINDS[kind] for kind in kinds), numbers is WIDE, KP, VP)
    chunk = _chunk(num_tokens, config.chunk)
    # `keys_backward`, for an erase that is a vector where g is none, takes single chunks
    spans = num_tokens > chunk and (kinds[0] == 2 or kinds[1] != 2)
    return config._replace(chunk=chunk, span=config.span if spans else 1), numbers


def is_scalar(corner: tuple[str, ...], wide: bool) -> bool:
    """Whether the kernels for scalar gates serve a corner.

    They make the products of pairs again for every block of value channels, which pays where a product is one product:
    not in fp32, where it is three, and where registers spill (2 KB a thread).
    """
    return not wide and "vector" not in corner[:2]


@cache
def nearest(arch: int, corner: tuple[str, ...], wide: bool, K: int, V: int) -> Config:
    rows = [row for row in read_table() if row.wide == wide and is_scalar(row.corner, wide) == is_scalar(corner, wide)]

    def distance(row: Row) -> tuple:
        unlike = sum(x != y for x, y in zip(row.corner, corner, strict=True))
        return row.K < K, row.arch != arch, unlike, abs(math.log2(row.K / K)) + abs(math.log2(row.V / V))

    return min(rows, key=distance).config


def read_table(path: Path = TABLE) -> list[Row]:
    return [_row(**record) for record in json.loads(path.read_text())]


def _row(
    arch: int, corner: list[str], wide: bool, K: int, V: int, chunk: int, span: int = 1, **launches: list[int]
) -> Row:
    config = Config(chunk, span=span, **{name: Launch(*numbers) for name, numbers in launches.items()})
    return Row(arch, tuple(corner), wide, K, V, config)


def write_table(rows: list[Row], path: Path = TABLE) -> None:
    """One line a row."""
    lines = []
    for row in sorted(rows, key=lambda row: row[:5]):
        fields = row._asdict()
        launches = {name: list(x) for name, x in fields.pop("config")._asdict().items() if isinstance(x, Launch)}
        lines.append(json.dumps({**fields, "chunk": row.config.chunk, "span": row.config.span, **launches}))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


@cache
def arch_of(device: torch.device) -> int:
    """90 for sm_90; also what the kernels are interpreted as on the CPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _chunk(num_tokens: int, most: int) -> int:
    """The smallest power of two from 16 on that holds all the tokens, at most `most`."""
    chunk = 16
    while chunk < most and chunk < num_tokens:
        chunk *= 2
    return chunk
