"""The sum over what programs have left, against torch's in fp64: on the device, and in Triton's interpreter."""

import pytest
import torch

from glade.ops.log_decay import reference

gpu = pytest.mark.gpu

SHAPES = [(1, 3), (0, 5), (4, 0), (7, 2, 9), (1024, 8), (2500, 300)]


def sums(device):
    from glade.ops.linear_attention.triton.sums import sum_of_programs

    for shape in SHAPES:
        parts = torch.randn(shape, device=device)
        found = sum_of_programs(parts)
        assert found.shape == parts.shape[1:]
        torch.testing.assert_close(found, parts.double().sum(0).float(), rtol=1e-5, atol=1e-4)
        assert torch.equal(found, sum_of_programs(parts))


def decays_of_many_tokens(device):
    """Several programs down and across, some tiles of the last ones empty, as many tiles a program as there may be."""
    from glade.ops.log_decay.triton import op

    for shape, tiles in (((1000, 8), 1), ((5000, 300), op.MAX_TILES)):
        op.PROGRAMS = 512 if tiles == 1 else 2
        leaves = [torch.randn(s, device=device).requires_grad_() for s in (shape, shape[1:], shape[1:])]
        upstream = torch.randn(shape, device=device)
        found = torch.autograd.grad(op.log_decay(*leaves, "softplus"), leaves, upstream)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = torch.autograd.grad(reference.log_decay(*exact, "softplus"), exact, upstream.double())
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-3)


def test_tiles_of_a_program(interpret):
    interpret(tiles_of_a_program)


def tiles_of_a_program():
    from glade.ops.log_decay.triton.op import _tiles_of_a_program

    # 32,768 tokens of 8 heads; of 1,024 channels; a short row
    assert [_tiles_of_a_program(*cut) for cut in ((128, 1), (4096, 4), (1, 1), (1024, 1))] == [1, 4, 1, 2]


@gpu
def test_on_the_device():
    sums("cuda")
    decays_of_many_tokens("cuda")


def test_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    sums("cpu")
    decays_of_many_tokens("cpu")
