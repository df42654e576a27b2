"""The cross-entropy's GPU kernels against the definition in fp64: on the device, and on the CPU in Triton's
interpreter."""

import subprocess
import sys

import pytest
import torch

from glade.ops.cross_entropy import reference
from glade.ops.tolerances import TOLERANCES, relative_error

gpu = pytest.mark.gpu

# tokens, D, vocabulary, bias
CASES = {"words": ((2, 30), 16, 5000, True), "letters": ((7,), 8, 40, False), "no tokens": ((0,), 8, 40, True)}


def worst(case, function, device, dtype):
    """The largest relative error of losses and gradients; some tokens have no target."""
    shape, D, vocab, bias = case
    generator = torch.Generator().manual_seed(0)
    sizes = [(*shape, D), (vocab, D), *([(vocab,)] if bias else [])]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes]
    targets = torch.randint(0, vocab, shape, generator=generator)
    targets[..., ::5] = -1
    targets, upstream = targets.to(device), torch.randn(shape, generator=generator).to(device)
    results = []
    for f, leaves in ((function, drawn), (reference.linear_cross_entropy, [x.double() for x in drawn])):
        leaves = [x.clone().requires_grad_() for x in leaves]
        losses = f(leaves[0], leaves[1], targets, leaves[2] if bias else None)
        results.append((losses, *torch.autograd.grad(losses, leaves, upstream.to(losses))))
    assert bool((results[0][0][targets < 0] == 0).all())
    return max(relative_error(x, y) for x, y in zip(*results, strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    from glade.ops.cross_entropy.triton import linear_cross_entropy

    assert worst(CASES[name], linear_cross_entropy, "cuda", dtype) <= TOLERANCES[dtype].gradient


@gpu
def test_many_chunks(monkeypatch):
    from glade.ops.cross_entropy.triton import linear

    monkeypatch.setattr(linear, "MAX_LOGITS_BYTES", 7 * 5000 * 4)
    assert worst(CASES["words"], linear.linear_cross_entropy, "cuda", torch.float32) <= 1e-5


@gpu
def test_the_gradient_of_fp32_weights_is_summed_in_fp32(monkeypatch):
    """Under autocast products are of bf16 numbers, but what chunks add to the weight's gradient is never rounded."""
    from glade.ops.cross_entropy.triton import linear

    x, weight = torch.randn(512, 64, device="cuda"), torch.randn(1000, 64, device="cuda") / 8
    targets = torch.randint(1000, (512,), device="cuda")

    def gradient(bytes_of_chunks):
        monkeypatch.setattr(linear, "MAX_LOGITS_BYTES", bytes_of_chunks)
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            losses = linear.linear_cross_entropy(x, leaf, targets, None)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    whole = gradient(2**30)
    assert whole.dtype == torch.float32
    assert relative_error(gradient(2**17), whole) < relative_error(whole.bfloat16(), whole) / 3


@gpu
def test_a_target_outside_the_vocabulary():
    # in a process of its own, whose CUDA context it ends; the device says what was wrong, and the error is that of
    # whatever call of CUDA comes next
    program = """
import torch
from glade.ops import linear_cross_entropy
print(linear_cross_entropy(torch.randn(1, 8).cuda(), torch.randn(40, 8).cuda(), torch.tensor([40]).cuda()))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "a target is not among the 40 tokens of the vocabulary" in ran.stderr


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    from glade.ops.cross_entropy.triton import linear

    linear.MAX_LOGITS_BYTES = 17 * 5000 * 4
    for name, case in CASES.items():
        error = worst(case, linear.linear_cross_entropy, "cpu", torch.float32)
        assert error <= TOLERANCES[torch.float32].gradient, (name, error)
