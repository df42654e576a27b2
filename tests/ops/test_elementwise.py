"""swiglu, log_decay and rms_norm: the CPU's backends against the fp64 reference, gradients, compilation, threads."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from glade.errors import BackendError
from glade.ops import add_rms_norm, log_decay, native, rms_norm, swiglu
from glade.ops.tolerances import TOLERANCES, relative_error

WIDTHS = [1, 7, 16, 33, 128]


class Case(NamedTuple):
    run: Callable[..., Tensor]  # (leaves, backend)
    leaves: Callable[[int], list[Tensor]]


def gated(activation) -> Callable[..., Tensor]:
    return lambda x, w, gate, backend: rms_norm(x, w, eps=1e-5, gate=gate, gate_activation=activation, backend=backend)


def heads(n: int) -> list[Tensor]:
    """The gate is a slice of a wider projection, as in a mixer."""
    return [torch.randn(2, 37, 3, n), torch.randn(n), torch.randn(2, 37, 3 * n + 5)[..., 5:].unflatten(-1, (3, n))]


def decays(n: int) -> list[Tensor]:
    return [6 * torch.randn(2, 70, n), 10 * torch.rand(n), torch.randn(n)]


CASES = {
    "swiglu": Case(lambda x, backend: swiglu(x, backend=backend), lambda n: [3 * torch.randn(2, 70, 2 * n)]),
    "softplus": Case(lambda z, rate, bias, backend: log_decay(z, rate=rate, bias=bias, backend=backend), decays),
    "logsigmoid": Case(
        lambda z, rate, bias, backend: log_decay(z, rate=rate, bias=bias, form="logsigmoid", backend=backend),
        decays,
    ),
    "norm": Case(
        lambda x, w, backend: rms_norm(x, w, eps=1e-5, backend=backend),
        lambda n: [torch.randn(2, 70, n), torch.randn(n)],
    ),
    "sum": Case(
        lambda x, y, w, backend: torch.cat(add_rms_norm(x, y, w, eps=1e-5, backend=backend), -1),
        lambda n: [torch.randn(2, 70, n), torch.randn(2, 70, n), torch.randn(n)],
    ),
    "silu gate": Case(gated("silu"), heads),
    "sigmoid gate": Case(gated("sigmoid"), heads),
    "gate with a bias": Case(
        lambda x, w, gate, bias, backend: rms_norm(x, w, eps=1e-5, gate=gate, gate_bias=bias, backend=backend),
        lambda n: [*heads(n), torch.randn(3, n)],
    ),
}
FAST = [(name, backend) for name in CASES for backend in ("cpu", "torch")]


def value_and_gradients(case: Case, leaves: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = case.run(*leaves, backend=backend)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize(("name", "backend"), FAST)
def test_values_and_gradients_match_the_fp64_reference(name, backend, n, dtype) -> None:
    case = CASES[name]
    leaves = [x.to(dtype) for x in case.leaves(n)]
    exact = value_and_gradients(case, [x.double() for x in leaves], "reference")
    for found, right in zip(value_and_gradients(case, leaves, backend), exact, strict=True):
        assert relative_error(found, right) <= TOLERANCES[dtype].gradient


@pytest.mark.parametrize("isa", [] if native.LIBRARY is None else native.LIBRARY.isas)
@pytest.mark.parametrize("name", CASES)
def test_every_build_matches_the_fp64_reference(name, isa, monkeypatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", native.Library(isa=isa))
    for dtype in (torch.float32, torch.bfloat16):
        test_values_and_gradients_match_the_fp64_reference(name, "cpu", 37, dtype)


@pytest.mark.parametrize("through_sum", [False, True])
def test_a_sum_of_two_dtypes_hands_each_its_gradient(through_sum) -> None:
    x, y, w = torch.randn(3, 40), torch.randn(3, 40).bfloat16(), torch.randn(40)

    def gradients(x: Tensor, y: Tensor, w: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaves = [leaf.requires_grad_() for leaf in (x, y, w)]
        normed, total = add_rms_norm(*leaves, eps=1e-5, backend=backend)
        value = normed.square().sum() + total.pow(3).sum() * through_sum
        return torch.autograd.grad(value, leaves)

    exact = gradients(x.double(), y.double(), w.double(), "reference")
    found = gradients(x, y, w, "cpu")
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16, torch.float32]
    for gradient, right in zip(found, exact, strict=True):
        assert relative_error(gradient, right) <= TOLERANCES[gradient.dtype].gradient


@pytest.mark.parametrize(("name", "backend"), FAST)
def test_extreme_inputs_stay_finite_and_right(name, backend) -> None:
    case = CASES[name]
    leaves = case.leaves(16)
    for scale in (1e-4, 1e3):
        first = [scale * leaves[0], *leaves[1:]]
        exact = value_and_gradients(case, [x.double() for x in first], "reference")
        for found, right in zip(value_and_gradients(case, first, backend), exact, strict=True):
            assert relative_error(found, right) <= TOLERANCES[torch.float32].gradient


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name) -> None:
    case = CASES[name]
    leaves = [x[..., :3].double().contiguous().requires_grad_() for x in case.leaves(3)]
    leaves = [x[:1, :3].detach().requires_grad_() if x.dim() > 2 else x for x in leaves]
    if name == "swiglu":
        leaves = [leaves[0][..., :2].detach().requires_grad_()]
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda *x, backend=backend: case.run(*x, backend=backend), leaves)


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(name) -> None:
    case, before, found = CASES[name], torch.get_num_threads(), []
    leaves = [torch.cat([x] * 30) if x.dim() > 2 else x for x in case.leaves(33)]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(value_and_gradients(case, leaves, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(name, shape) -> None:
    case = CASES[name]
    leaves = [x.new_empty(*shape, *x.shape[2:]) if x.dim() > 2 else x for x in case.leaves(8)]
    for found, leaf in zip(value_and_gradients(case, leaves, "cpu")[1:], leaves, strict=True):
        assert found.shape == leaf.shape
        assert not found.any()


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name) -> None:
    case = CASES[name]

    def loss(*leaves: Tensor) -> Tensor:
        return case.run(*leaves, backend="auto").square().sum()

    def run(function) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    inputs = case.leaves(8)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, right in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(found, right)


def test_custom_op_contracts() -> None:
    x, w = torch.randn(3, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ops = torch.ops.glade
    torch.library.opcheck(ops.swiglu_cpu.default, (x,))
    torch.library.opcheck(ops.log_decay_cpu.default, (x, w, w, "softplus"))
    torch.library.opcheck(ops.log_decay_cpu.default, (x, w, None, "logsigmoid"))
    torch.library.opcheck(ops.rms_norm_cpu.default, (x, w, None, None, "silu", 1e-5, torch.float32))
    torch.library.opcheck(ops.rms_norm_cpu.default, (x, w, x, None, "sigmoid", 1e-5, torch.bfloat16))
    torch.library.opcheck(ops.add_rms_norm_cpu.default, (x, x, w, 1e-5, torch.bfloat16))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_the_norm_answers_in_the_dtype_it_is_told(backend) -> None:
    x, w = torch.randn(4, 32), torch.randn(32)
    whole = rms_norm(x, w, eps=1e-5, backend=backend)
    assert torch.equal(rms_norm(x, w, eps=1e-5, dtype=torch.bfloat16, backend=backend), whole.bfloat16())


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_the_norm_of_a_sum(backend) -> None:
    x, y, w = torch.randn(4, 32), torch.randn(4, 32).bfloat16(), torch.randn(32)
    normed, total = add_rms_norm(x, y, w, eps=1e-5, dtype=torch.bfloat16, backend=backend)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, rms_norm(x + y, w, eps=1e-5, dtype=torch.bfloat16, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_decays_of_bfloat16_are_fp32(backend) -> None:
    assert log_decay(torch.randn(4, 8).bfloat16(), rate=torch.ones(8), backend=backend).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(torch.zeros(3, 5)), r"shape \[3, 5\]; give floating-point \[..., 2 F\]"),
        (lambda: swiglu(torch.zeros(3, 4, dtype=torch.int64)), "x is torch.int64"),
        (lambda: log_decay(torch.zeros(3, 4), rate=torch.ones(3)), r"rate has shape \[3\]; give \[4\]"),
        (lambda: log_decay(torch.zeros(3, 4), rate=torch.ones(4), form="relu"), "form is 'relu'"),  # type: ignore[arg-type]
        (lambda: rms_norm(torch.zeros(3, 4), torch.ones(3), eps=1e-5), r"weight has shape \[3\]; give \[4\]"),
        (lambda: rms_norm(torch.zeros(4), torch.ones(4), eps=0.1, gate=torch.ones(3)), r"gate is .* \[3\]"),
        (
            lambda: rms_norm(torch.zeros(2, 4), torch.ones(4), eps=0.1, gate=torch.ones(2, 4), gate_bias=torch.ones(4)),
            r"gate_bias has shape \[4\]",
        ),
        (lambda: rms_norm(torch.zeros(4), torch.ones(4), eps=0.1, dtype=torch.int64), "dtype is torch.int64"),
        (lambda: add_rms_norm(torch.zeros(4), torch.zeros(3), torch.ones(4), eps=0.1), r"y is .* \[3\]; give"),
    ],
)
def test_errors_say_what_was_given(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_that_cannot_serve_names_those_that_can() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"'cpu' of swiglu serves fp32 and bf16.*Use 'torch' or 'reference'"):
        swiglu(x, backend="cpu")
    with pytest.raises(BackendError, match="swiglu has no backend 'fast'"):
        swiglu(x, backend="fast")


def test_a_gate_of_fp16_is_not_read_as_fp32() -> None:
    x, gate = torch.randn(4, 8), torch.randn(4, 8).half()
    exact = rms_norm(x, torch.ones(8), eps=1e-5, gate=gate, backend="reference")
    torch.testing.assert_close(rms_norm(x, torch.ones(8), eps=1e-5, gate=gate), exact)
