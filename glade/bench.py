"""`glade bench tune`: block sizes of the GPU kernels, found by measurement on the machine at hand.

Timings beside the peers are scripts, in the folder `bench` of the repository.
"""

from dataclasses import dataclass

import torch

from glade.config import setting
from glade.errors import BackendError, ConfigError
from glade.ops.linear_attention import triton
from glade.ops.linear_attention.parity import CORNERS


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `glade bench` can be told.

    Raises:
        ConfigError: a corner, dtype or shape that does not exist.
    """

    what: str = setting("tune", "tune: the table of block sizes of linear_attention on this GPU")
    corners: tuple[str, ...] = setting(tuple(CORNERS), f"rows to find: {' '.join(CORNERS)}")
    dims: tuple[str, ...] = setting(("128x128",), "K x V of a head")
    shape: str = setting("16x2048x16", "batch x tokens x heads that is timed")
    dtype: str = setting("bfloat16", "bfloat16, or float32 (which float16 shares)")
    chunks: tuple[int, ...] = setting((32, 64), "tokens a chunk: 16, 32 or 64")
    launches: tuple[str, ...] = setting((), "only these: prepare forward backward values keys; empty: all")
    workers: int = setting(8, "candidates checked at a time; one is timed at a time")
    write: bool = setting(True, "put what is faster into the table")

    def __post_init__(self) -> None:
        if self.what != "tune":
            raise ConfigError(f"what is {self.what!r}; glade bench knows: tune")
        for name, given, allowed in (
            ("corners", self.corners, list(CORNERS)),
            ("dtype", [self.dtype], ["bfloat16", "float32"]),
            ("chunks", self.chunks, [16, 32, 64]),
            ("launches", self.launches, ["prepare", "forward", "backward", "values", "keys"]),
        ):
            unknown = [x for x in given if x not in allowed]
            if unknown:
                raise ConfigError(f"{name} has {unknown[0]!r}; give of {', '.join(map(str, allowed))}")
        for name, given, parts in (("dims", self.dims, 2), ("shape", [self.shape], 3)):
            for x in given:
                if len(x.split("x")) != parts or not all(n.isdecimal() and int(n) > 0 for n in x.split("x")):
                    raise ConfigError(f"{name} has {x!r}; give {parts} numbers, {'x'.join(['128'] * parts)}")


def run(config: BenchConfig) -> None:
    """The verb `glade bench`.

    Raises:
        BackendError: there is no GPU here that backend `triton` serves.
    """
    reason = triton.refuses(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    if reason is not None:
        raise BackendError(f"glade bench tune times the kernels of backend 'triton', which {reason}")
    from glade.ops.linear_attention.triton.tune import Setting, into_table, tune

    B, T, H = map(int, config.shape.split("x"))
    for corner in config.corners:
        for K, V in (map(int, dims.split("x")) for dims in config.dims):
            setting = Setting(CORNERS[corner], config.dtype, K, V, (B, T, H))
            row = tune(setting, config.chunks, config.launches, config.workers, lambda line: print(line, flush=True))
            if row is None:
                print("the table's row stays")
            elif config.write:
                into_table(row)
                print(f"into the table: {row.config}")
            else:
                print(f"faster: {row.config}")
