"""The kernels of linear attention compiled for Hopper on a machine without a GPU.

The interpreter lets pass what the compiler does not: a name that is a number known at compile time first and a tensor
in a loop, a value whose type a loop changes, a layout that cannot be made.
"""

import pytest
import torch

from glade.ops.linear_attention.parity import CORNERS, Corner, Shape, make_inputs

USUAL = Shape(2, 130, 2, 4, 128, 64)
SHORT = Shape(1, 17, 2, 2, 24, 40)
DOCUMENTS = Shape(1, 300, 2, 4, 128, 128)
LONG = Shape(1, 4099, 1, 2, 64, 64)  # in segments


@pytest.mark.slow
def test_the_kernels_compile(without_a_gpu):
    without_a_gpu(compile_kernels)


def compile_kernels():
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from glade.ops.linear_attention.triton.assembler import choose_assembler
    from glade.ops.linear_attention.triton.op import backward, forward

    class Hopper:
        """As much of Triton's driver as a compile asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    compiled = []

    def compile_only(kernel, *args, grid, warmup, **named):
        if "INTERPRETED" in named:
            named["INTERPRETED"] = False
        made = launch(kernel, *args, grid=grid, warmup=True, **named)
        assert made.asm["cubin"], kernel
        compiled.append(kernel)

    driver.set_active(Hopper())
    choose_assembler()
    launch, JITFunction.run = JITFunction.run, compile_only

    def check(corner, shape, dtype=torch.bfloat16, lengths=None, given_state=True):
        borders = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
        x = make_inputs(corner, shape, dtype=dtype, cu_seqlens=borders, given_state=given_state)
        call = (*(x[name] for name in ("q", "k", "v", "g", "erase", "write")), 1.0, x["state"], borders)
        before = len(compiled)
        o, final, *kept = forward(*call, True)
        backward(torch.empty_like(o), torch.zeros_like(final), *call, kept)
        assert len(compiled) >= before + 3, (corner, shape)

    for name in ("linear", "gla", "gdn", "kda", "gdn2"):
        check(CORNERS[name], USUAL)
    for name in ("gla", "gdn", "gdn2"):
        check(CORNERS[name], SHORT, given_state=False)
        check(CORNERS[name], LONG)
    check(CORNERS["gdn"], DOCUMENTS, lengths=(3, 0, 137, 1, 159))
    check(CORNERS["gdn2"], DOCUMENTS, lengths=(3, 0, 137, 1, 159))
    check(Corner("scalar", "vector", "none"), USUAL)  # a kernel of its own for its keys
    check(CORNERS["gdn2"], USUAL, torch.float32)
