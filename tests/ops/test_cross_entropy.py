"""linear_cross_entropy: values, gradients, ignored targets, dtypes, compilation, and the memory it exists to save."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glade.ops.cross_entropy import chunked, linear_cross_entropy, reference
from glade.ops.cross_entropy.register import chunks_of
from glade.ops.tolerances import TOLERANCES, relative_error


def inputs(shape: tuple[int, ...], D: int, vocab: int, dtype=torch.float32) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias; and targets of which some are ignored."""
    tensors = [
        torch.randn(*shape, D, dtype=dtype),
        torch.randn(vocab, D, dtype=dtype) / D**0.5,
        torch.randn(vocab, dtype=dtype),
    ]
    targets = torch.randint(-3, vocab, shape)
    return tensors, targets


def losses_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    """The losses, and the gradients for a different upstream gradient on every token."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    losses = function(*leaves)
    upstream = torch.linspace(-1, 2, losses.numel()).view(losses.shape).to(losses)
    return [losses, *torch.autograd.grad(losses, leaves, upstream)]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(chunked, "MAX_LOGITS_BYTES", 3 * 11 * 4)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("shape", [(), (1,), (2, 7), (0, 3), (2, 2, 2)])
def test_values_and_gradients_match_the_fp64_reference(shape) -> None:
    tensors, targets = inputs(shape, 5, 11)
    exact = losses_and_gradients(
        lambda x, w, b: reference.linear_cross_entropy(x, w, targets, b), [t.double() for t in tensors]
    )
    found = losses_and_gradients(lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b), tensors)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) <= TOLERANCES[torch.float32].gradient


@pytest.mark.gpu
@pytest.mark.usefixtures("chunks")
def test_on_a_gpu() -> None:
    tensors, targets = inputs((2, 7), 5, 11)
    exact = losses_and_gradients(
        lambda x, w, b: reference.linear_cross_entropy(x, w, targets, b), [t.double() for t in tensors]
    )
    found = losses_and_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, targets.cuda(), bias=b), [t.cuda() for t in tensors]
    )
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.cpu(), b) <= TOLERANCES[torch.float32].gradient


@pytest.mark.usefixtures("chunks")
def test_gradcheck() -> None:
    tensors, targets = inputs((2, 4), 3, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b), [t.requires_grad_() for t in tensors]
    )


@pytest.mark.usefixtures("chunks")
def test_it_is_what_torch_calls_cross_entropy() -> None:
    (x, weight, _), targets = inputs((14,), 5, 11)
    right = torch.nn.functional.cross_entropy(x @ weight.T, targets.clamp(min=-1), reduction="none", ignore_index=-1)
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), right)


def test_any_negative_target_is_ignored_even_where_x_is_nan() -> None:
    (x, weight, _), _ = inputs((4,), 5, 11)
    x[1:3] = float("nan")
    x.requires_grad_()
    weight.requires_grad_()
    losses = linear_cross_entropy(x, weight, torch.tensor([3, -1, -100, 0]))
    losses.sum().backward()
    assert losses[1:3].tolist() == [0, 0]
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad[1:3] == 0).all()
    assert weight.grad.isfinite().all()


def test_all_ignored() -> None:
    (x, weight, _), _ = inputs((4,), 5, 11)
    x.requires_grad_()
    linear_cross_entropy(x, weight, torch.full((4,), -1)).sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_large_logits_stay_finite() -> None:
    losses = linear_cross_entropy(torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    assert losses.tolist() == [0.0, 2e4]


@pytest.mark.usefixtures("chunks")
def test_autocast_multiplies_in_bfloat16_and_sums_in_fp32() -> None:
    tensors, targets = inputs((3, 7), 16, 11)
    exact = losses_and_gradients(
        lambda x, w, b: reference.linear_cross_entropy(x, w, targets, b),
        [*(t.bfloat16().double() for t in tensors[:2]), tensors[2].double()],
    )

    def under_autocast(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x, w, targets, bias=b)

    found = losses_and_gradients(under_autocast, tensors)
    assert [t.dtype for t in found] == [torch.float32] * 4
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) <= TOLERANCES[torch.bfloat16].gradient


def test_bfloat16_inputs_give_fp32_losses_and_bfloat16_gradients() -> None:
    tensors, targets = inputs((9,), 8, 11)
    found = losses_and_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b), [t.bfloat16() for t in tensors]
    )
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]


def test_compiles_without_a_graph_break() -> None:
    tensors, targets = inputs((2, 5), 4, 11)

    def run(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.nn.functional.linear(x, torch.eye(4))
            return linear_cross_entropy(h, w, targets, bias=b) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(losses_and_gradients(compiled, tensors), losses_and_gradients(run, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_custom_op_contract() -> None:
    (x, weight, bias), targets = inputs((2, 5), 4, 11)
    arguments = (x.requires_grad_(), weight.requires_grad_(), targets, bias.requires_grad_(), torch.float32)
    torch.library.opcheck(torch.ops.glade.linear_cross_entropy_torch.default, arguments)


def largest_allocation_bytes(function) -> int:
    """The most memory that any one operation took, those inside custom ops and the backward included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    return max(event.cpu_memory_usage for event in recorded.events() or [])


def test_no_tensor_is_as_large_as_all_logits(monkeypatch) -> None:
    tokens, D, vocab = 256, 8, 300
    chunk_bytes = 16 * vocab * 4
    monkeypatch.setattr(chunked, "MAX_LOGITS_BYTES", chunk_bytes)
    (x, weight, bias), targets = inputs((tokens,), D, vocab)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ours = largest_allocation_bytes(lambda: linear_cross_entropy(x, weight, targets, bias=bias).sum().backward())
    assert all(leaf.grad is not None for leaf in leaves)
    assert ours == chunk_bytes
    # the measure itself works: the definition does hold them all
    whole = largest_allocation_bytes(lambda: reference.linear_cross_entropy(x, weight, targets, bias).sum().backward())
    assert whole >= tokens * vocab * 4


@pytest.mark.parametrize(
    ("num_tokens", "vocab", "most", "sizes"),
    [
        (32768, 32000, 4194, [4096] * 8),
        (10, 5, 4, [4, 4, 2]),
        (9, 5, 8, [5, 4]),
        (3, 5, 8, [3]),
        (2, 5, 0, [1, 1]),
        (0, 5, 8, []),
    ],
)
def test_chunks_are_of_one_size(num_tokens, vocab, most, sizes) -> None:
    chunks = list(chunks_of(num_tokens, vocab, torch.bfloat16, 2 * vocab * most))
    assert [c.stop - c.start for c in chunks] == sizes
    assert torch.arange(num_tokens).tolist() == [t for c in chunks for t in range(c.start, c.stop)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 11, 3])}, "largest target is 11, but the vocabulary has 11 tokens, 0 to 10"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \[2\]; give \[3\]"),
        ({"targets": torch.zeros(3)}, "targets is torch.float32; give int32 or int64"),
        ({"x": torch.zeros(3, 4)}, r"x has shape \[3, 4\] and weight \[11, 5\]"),
        ({"bias": torch.zeros(5)}, r"bias has shape \[5\]; give \[11\]"),
        ({"x": torch.zeros(3, 5, dtype=torch.int64)}, "x is torch.int64"),
    ],
)
def test_errors_say_what_was_given(change, message) -> None:
    call = {"x": torch.zeros(3, 5), "weight": torch.zeros(11, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**call, **change})
