"""The GPU kernels of rms_norm, swiglu, sigmoid, log_decay and rope against the definitions in fp64: on the device, and
in Triton's interpreter on the CPU."""

import pytest
import torch

from glade.ops.log_decay import reference as log_decay_reference
from glade.ops.rms_norm import reference as rms_norm_reference
from glade.ops.rope import eager
from glade.ops.swiglu import reference as swiglu_reference
from glade.ops.tolerances import TOLERANCES, relative_error

gpu = pytest.mark.gpu

WIDTHS = (1, 7, 128, 300)


def added(x, y, weight):
    total = x + y
    return rms_norm_reference.rms_norm(total, weight, None, None, "silu", 1e-5, x.dtype), total


def cases(n):
    """name -> sizes of the leaves, the definition; a gate is a slice of a wider projection, as in a mixer."""
    tokens, heads = (2, 37), (2, 37, 3)

    def norm(activation):
        def run(x, weight, gate=None, bias=None):
            return rms_norm_reference.rms_norm(x, weight, gate, bias, activation, 1e-5, x.dtype)

        return run

    def decay(form):
        return lambda z, rate, bias=None: log_decay_reference.log_decay(z, rate, bias, form)

    def of_constant_rate(z, bias):
        return decay("logsigmoid")(z, torch.full_like(bias, 0.1), bias)

    return {
        "norm": ([(*tokens, n), (n,)], norm("silu")),
        "silu": ([(*heads, n), (n,), (*heads, n)], norm("silu")),
        "sigmoid": ([(*heads, n), (n,), (*heads, n)], norm("sigmoid")),
        "gate with a bias": ([(2, 37, 4, n), (n,), (2, 37, 4, n), (4, n)], norm("silu")),
        "add": ([(*tokens, n), (*tokens, n), (n,)], added),
        "swiglu": ([(*tokens, 2 * n)], swiglu_reference.swiglu),
        "sigmoid alone": ([(*tokens, n)], torch.sigmoid),
        "softplus": ([(*tokens, n), (n,), (n,)], decay("softplus")),
        "logsigmoid": ([(*tokens, n), (n,)], decay("logsigmoid")),
        "logsigmoid, constant rate": ([(*tokens, n), (n,)], of_constant_rate),
        "rope": ([(*heads, n)], turned(eager.rope, n - n % 2)),
        "rope, part": ([(*heads, n)], turned(eager.rope, n // 3 * 2, of_rows=True)),
    }


def turned(rope, dims, of_rows=False):
    """`rope` at positions that are all rows' or each row's own."""

    def run(x):
        positions = torch.arange(x.shape[1], device=x.device)
        return rope(x, torch.stack([positions + 3, positions.flip(0)]) if of_rows else positions, 100.0, dims)

    return run


def kernels(n):
    """name -> the same by the kernels."""
    from glade.ops.log_decay.triton.op import log_decay
    from glade.ops.rms_norm.triton.op import add_rms_norm, rms_norm
    from glade.ops.rope.triton.op import rope
    from glade.ops.sigmoid.triton.op import sigmoid
    from glade.ops.swiglu.triton.op import swiglu

    return {
        "norm": lambda x, weight: rms_norm(x, weight, None, None, "silu", 1e-5, x.dtype),
        "silu": lambda x, weight, gate: rms_norm(x, weight, gate, None, "silu", 1e-5, x.dtype),
        "sigmoid": lambda x, weight, gate: rms_norm(x, weight, gate, None, "sigmoid", 1e-5, x.dtype),
        "gate with a bias": lambda x, weight, gate, b: rms_norm(x, weight, gate, b, "silu", 1e-5, x.dtype),
        "add": lambda x, y, weight: add_rms_norm(x, y, weight, 1e-5, x.dtype),
        "swiglu": swiglu,
        "sigmoid alone": sigmoid,
        "softplus": lambda z, rate, bias: log_decay(z, rate, bias, "softplus"),
        "logsigmoid": lambda z, rate: log_decay(z, rate, None, "logsigmoid"),
        "logsigmoid, constant rate": lambda z, b: log_decay(z, torch.full_like(b, 0.1), b, "logsigmoid"),
        "rope": turned(rope, n - n % 2),
        "rope, part": turned(rope, n // 3 * 2, of_rows=True),
    }


def run(function, leaves, dtype):
    """Values and gradients for fixed random weights on the values, which are of `dtype` whatever the values are."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    values = function(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values]
    weights = [w.to(dtype).to(v) for w, v in zip(drawn, values, strict=True)]
    return [*values, *torch.autograd.grad(values, leaves, weights)]


def leaves_of(sizes, device, dtype, scale=1.0):
    """Random leaves; the last axis of each is a slice of a wider tensor."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(*s[:-1], s[-1] + 5, generator=generator, dtype=torch.float64) for s in sizes]
    wide[0] *= scale
    return [x.to(device, dtype)[..., 5:] for x in wide]


def worst(name, n, device, dtype, scale=1.0):
    sizes, reference = cases(n)[name]
    leaves = leaves_of(sizes, device, dtype, scale)
    found, exact = run(kernels(n)[name], leaves, dtype), run(reference, [x.double() for x in leaves], dtype)
    assert all(x.shape == y.shape for x, y in zip(found, exact, strict=True))
    return max(relative_error(x, y) for x, y in zip(found, exact, strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [*WIDTHS, 2816, 5000])
@pytest.mark.parametrize("name", cases(1))
def test_parity(name, n, dtype):
    assert worst(name, n, "cuda", dtype) <= TOLERANCES[dtype].gradient


@gpu
@pytest.mark.parametrize("name", cases(1))
def test_extreme_inputs(name):
    for scale in (1e-4, 1e3):
        assert worst(name, 128, "cuda", torch.float32, scale) <= TOLERANCES[torch.float32].gradient


@gpu
@pytest.mark.parametrize("name", cases(1))
def test_the_same_call_gives_the_same_bits(name):
    leaves = leaves_of(cases(1024)[name][0], "cuda", torch.bfloat16)
    leaves = [x.repeat(40, *[1] * (x.dim() - 1)) if x.dim() > 1 else x for x in leaves]
    first = run(kernels(1024)[name], leaves, torch.bfloat16)
    for _ in range(3):
        assert all(
            torch.equal(x, y) for x, y in zip(first, run(kernels(1024)[name], leaves, torch.bfloat16), strict=True)
        )


@gpu
def test_a_stream_of_fp32_and_branches_of_bf16():
    mixed_dtypes("cuda")


def mixed_dtypes(device):
    """The residual stream of autocast: x fp32, the branch and the norm bf16."""
    from glade.ops.rms_norm.triton.op import add_rms_norm

    x, y, weight = leaves_of([(2, 37, 96), (2, 37, 96), (96,)], device, torch.float32)
    y = y.bfloat16()
    found = run(lambda x, y, weight: add_rms_norm(x, y, weight, 1e-5, torch.bfloat16), [x, y, weight], torch.bfloat16)
    assert [v.dtype for v in found[:4]] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    exact = run(added, [x.double(), y.double(), weight.double()], torch.bfloat16)
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) <= TOLERANCES[torch.bfloat16].gradient
    # bf16 is rounded to once, on the way out; the sum never sees it
    assert errors[1] <= TOLERANCES[torch.float32].value


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    for name in cases(1):
        for n in WIDTHS:
            error = worst(name, n, "cpu", torch.float32)
            assert error <= TOLERANCES[torch.float32].gradient, (name, n, error)
        for scale in (1e-4, 1e3):
            error = worst(name, 16, "cpu", torch.float32, scale)
            assert error <= TOLERANCES[torch.float32].gradient, (name, scale, error)
    mixed_dtypes("cpu")
    no_tokens()
    several_tiles_a_program()


def several_tiles_a_program():
    """As where there are programs enough; the last of them have rows for some of their tiles only."""
    from glade.ops.log_decay.triton import op as of_log_decay
    from glade.ops.rms_norm.triton import op as of_rms_norm

    of_log_decay.PROGRAMS = of_rms_norm.PROGRAMS = 2
    for name in ("norm", "silu", "gate with a bias", "add", "softplus", "logsigmoid, constant rate"):
        error = worst(name, 300, "cpu", torch.float32)
        assert error <= TOLERANCES[torch.float32].gradient, (name, error)


def no_tokens():
    for name in cases(1):
        sizes, _ = cases(8)[name]
        leaves = leaves_of([(0, *s[1:]) if len(s) > 1 else s for s in sizes], "cpu", torch.float32)
        for gradient, leaf in zip(run(kernels(8)[name], leaves, torch.float32)[-len(leaves) :], leaves, strict=True):
            assert gradient.shape == leaf.shape and not gradient.any()
