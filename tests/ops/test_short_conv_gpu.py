"""The short convolution's GPU kernels against the definition in fp64: on the device, and on the CPU in Triton's
interpreter."""

import pytest
import torch

from glade.ops.short_conv import reference
from glade.ops.tolerances import TOLERANCES, relative_error

gpu = pytest.mark.gpu

BORDERS = (0, 1, 1, 3, 40, 41, 90)
# B, T, D, taps, activation, heads, normed channels, bias, state, packed
CASES = {
    "qkv": (2, 70, 40, 4, "silu", 3, 24, False, True, False),
    "all normed": (1, 66, 24, 4, "silu", 3, 24, True, True, False),
    "plain": (2, 5, 20, 3, None, None, 0, False, True, False),
    "one tap": (1, 20, 16, 1, "silu", None, 0, True, False, False),
    "packed": (1, 90, 24, 4, "silu", 2, 12, True, True, True),
    "eight taps": (1, 90, 12, 8, None, 2, 12, False, True, True),
    "packed, from zeros": (1, 90, 12, 4, "silu", None, 0, False, False, True),
    "whole segments": (2, 64, 12, 4, "silu", 2, 8, True, True, False),
    "no tokens": (2, 0, 12, 4, "silu", None, 0, False, True, False),
}


def leaves_of(case, device, dtype):
    B, T, D, W, _, _, _, bias, state, packed = case
    generator = torch.Generator().manual_seed(0)
    rows = len(BORDERS) - 1 if packed else B
    sizes = {"x": (B, T, D), "weight": (D, W), "bias": (D,) if bias else None}
    sizes["state"] = (rows, D, W - 1) if state else None
    drawn = {
        n: None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()
    }
    return {n: None if x is None else x.to(device, dtype) for n, x in drawn.items()}


def run(function, case, leaves):
    """y, the state, and gradients of all leaves for fixed random weights on both."""
    *_, activation, heads, normed, _, _, packed = case
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in leaves.items()}
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32, device=leaves["x"].device) if packed else None
    y, final = function(
        leaves["x"], leaves["weight"], leaves["bias"], activation, heads, normed, leaves["state"], cu_seqlens
    )
    generator = torch.Generator().manual_seed(1)
    outputs = [x for x in (y, final) if x.numel() > 0]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    given = [x for x in leaves.values() if x is not None]
    gradients = torch.autograd.grad(outputs, given, weights, allow_unused=True)
    return y, final, *(torch.zeros_like(x) if dx is None else dx for x, dx in zip(given, gradients, strict=True))


def worst(case, function, device, dtype):
    leaves = leaves_of(case, device, dtype)
    exact = run(reference.short_conv, case, {name: None if x is None else x.double() for name, x in leaves.items()})
    found = run(function, case, leaves)
    assert [x.dtype for x in found] == [dtype] * len(found)
    return max(relative_error(x, y) for x, y in zip(found, exact, strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    from glade.ops.short_conv.triton import short_conv

    assert worst(CASES[name], short_conv, "cuda", dtype) <= TOLERANCES[dtype].gradient


@gpu
@pytest.mark.parametrize("heads", [16, None])
def test_a_model_s_shape(heads):
    from glade.ops.short_conv.triton import short_conv

    case = (4, 2050, 3072, 4, "silu", heads, 2048 if heads else 0, False, True, False)
    assert worst(case, short_conv, "cuda", torch.bfloat16) <= TOLERANCES[torch.bfloat16].gradient
    leaves = leaves_of(case, "cuda", torch.bfloat16)
    first = run(short_conv, case, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, run(short_conv, case, leaves), strict=True))


def step_of(function, device):
    """The largest distance of a step by slots to the definition, and whether other rows stayed."""
    case = (3, 1, 24, 4, "silu", 2, 12, True, True, False)
    leaves = leaves_of(case, device, torch.float32)
    table = torch.randn(5, 24, 3, device=device)
    slots = torch.tensor([4, 0, 2], device=device)
    untouched, leaves["state"] = table[[1, 3]].clone(), table[slots].clone()
    y, state = reference.short_conv(leaves["x"], leaves["weight"], leaves["bias"], "silu", 2, 12, leaves["state"], None)
    found = function(leaves["x"][:, 0], leaves["weight"], leaves["bias"], "silu", 2, 12, table, slots)
    errors = relative_error(found, y[:, 0]), relative_error(table[slots], state)
    return max(errors), torch.equal(table[[1, 3]], untouched)


@gpu
def test_step():
    from glade.ops.short_conv.triton import step_

    error, others_stayed = step_of(step_, "cuda")
    assert error <= 1e-5 and others_stayed


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    from glade.ops.short_conv.triton import op

    op.SEGMENTS = (8,)
    for long in (op.LONG, 0):
        op.LONG = long  # 0: the segments of all documents are walked as if they were whole
        for name, case in CASES.items():
            if long > 0 or case[-1]:
                error = worst(case, op.short_conv, "cpu", torch.float32)
                assert error <= TOLERANCES[torch.float32].gradient, (name, long, error)
    error, others_stayed = step_of(op.step_, "cpu")
    assert error <= 1e-5 and others_stayed
