"""The block sizes that `glade bench tune` tries, kernel by kernel."""

from typing import NamedTuple

from glade.ops.linear_attention.triton.configs import Config, Launch, is_scalar

# of the kernels that a launch of `Config` starts, for kernels of vector and of scalar gates
KERNELS: dict[str, tuple[str, str | None]] = {
    "prepare": ("prepare_kernel", "scalar_prepare_kernel"),
    "forward": ("forward_states_kernel", "scalar_forward_states_kernel"),
    "backward": ("backward_states_kernel", "scalar_backward_states_kernel"),
    "values": ("values_backward_kernel", None),
    "keys": ("keys_backward_kernel", "scalar_keys_kernel"),
}


class Candidate(NamedTuple):
    """One launch of a configuration replaced."""

    chunk: int
    name: str  # of the launch
    launch: Launch

    def within(self, config: Config) -> Config:
        return config._replace(**{self.name: self.launch}, chunk=self.chunk)


def kernel_name(corner: tuple[str, ...], wide: bool, launch: str) -> str | None:
    """The kernel that a launch of this name starts for a corner; None if it has none."""
    if launch == "keys" and corner[0] == "vector":
        return "vector_keys_kernel"
    return KERNELS[launch][is_scalar(corner, wide)]


def candidates(corner: tuple[str, ...], wide: bool, K: int, V: int, chunk: int) -> list[Candidate]:
    """All to be tried with chunks of `chunk` tokens; what does not fit the shared memory says so when it is run."""
    # states: registers hold K x block, shared memory a chunk of q, k and v a stage
    states = [Launch(block, 4, stages) for block in (16, 32, 64) for stages in (2, 3)]
    states += [Launch(64, 4, 4), Launch(64, 8, 2), Launch(64, 8, 3), Launch(128, 8, 2)]
    prepare = [Launch(*x) for x in ((32, 2), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8))]
    prepare += [Launch(block, 4, registers=168) for block in (64, 128)]
    values = [Launch(*x) for x in ((64, 2, 2), (64, 2, 3), (64, 4, 2), (128, 4, 1), (128, 4, 2))]
    # keys: never more than a warp for 16 channels or tokens (`Launch.warps`), and `vector_keys` takes 32 channels
    keys = [
        Launch(block, warps, stages, block_v)
        for block, warps in ((32, 4), (64, 4), (128, 8))
        for stages, block_v in ((2, 64), (3, 64), (3, 32), (1, 128))
    ]
    keys += [Launch(block, 4, 2, 64, 168) for block in (32, 64)]
    if corner[0] == "vector":
        keys = [x for x in keys if x.block == 32]
        keys += [x._replace(warps=2) for x in keys]
    states, values = ([x for x in launches if x.block <= V] for launches in (states, values))
    prepare, keys = ([x for x in launches if x.block <= K] for launches in (prepare, keys))
    keys = [x for x in keys if x.block_v <= V]
    if wide:  # twice the bytes, and three products for one
        states = [x for x in states if x.block <= 32 and x.stages <= 2] + [Launch(16, 4)]
        prepare = [x for x in prepare if x.block <= 64] + [Launch(32, 4)]
        values += [Launch(32, 4)]
        keys = [x for x in keys if x.block <= 32 and x.block_v <= 64]
        keys += [Launch(32, warps, 1, 32) for warps in (2, 4)]
    of_launch = {"prepare": prepare, "forward": states, "backward": states, "values": values, "keys": keys}
    if is_scalar(corner, wide):
        del of_launch["values"]
        of_launch["keys"] = [
            Launch(block, warps, stages)
            for block in (16, 32, 64) for warps in (4, 8) for stages in (1, 2, 3) if block <= K
        ]  # fmt: skip
        if corner[1] == "none":
            of_launch["prepare"] = [Launch(32, 1)]  # no product is made there
        else:  # products are 32 x 32: more warps than one share them
            of_launch["prepare"] = [
                Launch(block, warps, registers=registers)
                for block in (32, 64, 128) for warps, registers in ((1, 0), (1, 80), (1, 96), (4, 0)) if block <= K
            ]  # fmt: skip
    return [Candidate(chunk, name, launch) for name, launches in of_launch.items() for launch in launches]
