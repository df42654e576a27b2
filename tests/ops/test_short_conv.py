"""short_conv: values, gradients, state, packed documents, causality, compilation and the decoding step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glade.errors import BackendError
from glade.ops.short_conv import BACKENDS as EVERYWHERE
from glade.ops.short_conv import short_conv, short_conv_step_
from glade.ops.tolerances import TOLERANCES, relative_error

BACKENDS = {n: b for n, b in EVERYWHERE.items() if b.refuses(torch.device("cpu"), torch.float32) is None}
FAST = sorted(set(BACKENDS) - {"reference"})
# those that compute in fp64
EXACT = [name for name in FAST if BACKENDS[name].refuses(torch.device("cpu"), torch.float64) is None]


def inputs(B: int, T: int, D: int, W: int, num_states: int, dtype=torch.float32) -> dict[str, Tensor]:
    return {
        "x": torch.randn(B, T, D, dtype=dtype),
        "weight": torch.randn(D, W, dtype=dtype) / W**0.5,
        "bias": torch.randn(D, dtype=dtype),
        "state": torch.randn(num_states, D, W - 1, dtype=dtype),
    }


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def outputs_and_gradients(tensors: dict[str, Tensor], **settings) -> list[Tensor]:
    """y, the final state, and the gradients of every tensor for random but repeatable upstream gradients of both."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, state = short_conv(leaves["x"], leaves["weight"], bias=leaves["bias"], state=leaves["state"], **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream)
    return [y, state, *gradients]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("T", "W"), [(1, 1), (1, 4), (2, 4), (3, 4), (17, 4), (65, 8), (17, 1), (17, 2)])
def test_values_and_gradients_match_the_fp64_reference(backend, activation, heads, T, W) -> None:
    tensors = inputs(2, T, 12, W, 2)
    how = {"activation": activation, "l2norm_heads": heads}
    exact = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, backend="reference", **how)
    for found, right in zip(outputs_and_gradients(tensors, backend=backend, **how), exact, strict=True):
        assert relative_error(found, right) <= TOLERANCES[torch.float32].gradient


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("T", "heads", "unit"), [(5, 2, 8), (300, 3, 12), (1, 1, 5), (9, 2, 0)])
def test_the_norm_may_stop_at_a_channel(backend, T, heads, unit) -> None:
    """Queries, keys and values in one call: only the first channels become unit heads."""
    tensors = inputs(2, T, 21, 4, 2)
    how = {"l2norm_heads": heads, "l2norm_channels": unit}
    exact = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, backend="reference", **how)
    for found, right in zip(outputs_and_gradients(tensors, backend=backend, **how), exact, strict=True):
        assert relative_error(found, right) <= TOLERANCES[torch.float32].gradient


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = inputs(3, 400, 40, 4, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(outputs_and_gradients(tensors, backend="cpu", l2norm_heads=4))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("lengths", [[5, 0, 1, 2, 3, 0, 11], [0], [1, 1, 1], [0, 0], [9], [0, 4, 0]])
def test_packed_documents_match_the_fp64_reference(backend, lengths) -> None:
    tensors = inputs(1, sum(lengths), 6, 4, len(lengths))
    how = {"l2norm_heads": 2, "cu_seqlens": borders(lengths)}
    exact = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, backend="reference", **how)
    for found, right in zip(outputs_and_gradients(tensors, backend=backend, **how), exact, strict=True):
        assert relative_error(found, right) <= TOLERANCES[torch.float32].gradient


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_written_out_by_hand(backend) -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    y, state = short_conv(x, torch.tensor([[10.0, 1.0]]), activation=None, backend=backend)
    assert y.flatten().tolist() == [1.0, 12.0, 23.0]
    assert state.flatten().tolist() == [3.0]
    state = torch.tensor([[[7.0]]])
    y, _ = short_conv(x, torch.tensor([[10.0, 1.0]]), activation=None, state=state, backend=backend)
    assert y.flatten().tolist() == [71.0, 12.0, 23.0]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("lengths", [None, [4, 0, 1, 2]])
def test_gradcheck(backend, lengths) -> None:
    packed = lengths is not None
    cu_seqlens = borders(lengths) if packed else None
    tensors = inputs(1 if packed else 2, 7, 4, 4, 4 if packed else 2, torch.float64)

    def run(x, weight, bias, state):
        return short_conv(x, weight, bias=bias, l2norm_heads=2, state=state, cu_seqlens=cu_seqlens, backend=backend)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), W=st.integers(1, 8))
def test_packed_equals_separate(backend, lengths, W) -> None:
    tensors = inputs(1, sum(lengths), 4, W, len(lengths))
    y, state = short_conv(**tensors, cu_seqlens=borders(lengths), backend=backend)
    start = 0
    for i in range(len(lengths)):
        alone = {**tensors, "x": tensors["x"][:, start : start + lengths[i]], "state": tensors["state"][i : i + 1]}
        y_alone, state_alone = short_conv(**alone, backend=backend)
        torch.testing.assert_close(y[:, start : start + lengths[i]], y_alone)
        torch.testing.assert_close(state[i : i + 1], state_alone)
        start += lengths[i]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("middle", [0, 1, 2, 8, 16, 17])
def test_two_halves_equal_the_whole(backend, middle) -> None:
    tensors = inputs(2, 17, 6, 4, 2)
    x = tensors.pop("x")
    y, state = short_conv(x, **tensors, backend=backend)
    y1, handed_over = short_conv(x[:, :middle], **tensors, backend=backend)
    y2, end = short_conv(x[:, middle:], **{**tensors, "state": handed_over}, backend=backend)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize("backend", FAST)
def test_a_later_token_changes_no_earlier_bit(backend) -> None:
    tensors = inputs(1, 33, 8, 4, 1)
    before, _ = short_conv(**tensors, l2norm_heads=2, backend=backend)
    tensors["x"][:, 20] += 3
    after, _ = short_conv(**tensors, l2norm_heads=2, backend=backend)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:24], after[:, 20:24])
    assert torch.equal(before[:, 24:], after[:, 24:])


@pytest.mark.parametrize("backend", FAST)
def test_nothing_leaks_over_a_border_not_even_nan(backend) -> None:
    tensors = inputs(1, 12, 4, 4, 3)
    cu_seqlens = borders([5, 1, 6])
    clean = outputs_and_gradients(tensors, cu_seqlens=cu_seqlens, backend=backend)
    tensors["x"][:, 5] = float("nan")
    dirty = outputs_and_gradients(tensors, cu_seqlens=cu_seqlens, backend=backend)
    others = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert torch.equal(clean[0][:, others], dirty[0][:, others])
    assert torch.equal(clean[2][:, others], dirty[2][:, others])


@pytest.mark.parametrize("backend", FAST)
def test_inputs_may_be_slices_of_one_projection(backend) -> None:
    whole = torch.randn(2, 9, 12)
    weight = torch.randn(4, 4)
    found, _ = short_conv(whole[..., 4:8], weight, backend=backend)
    right, _ = short_conv(whole[..., 4:8].contiguous(), weight, backend=backend)
    assert torch.equal(found, right)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_bfloat16_is_rounded_at_the_end_only(backend) -> None:
    tensors = {name: t.bfloat16() for name, t in inputs(2, 17, 8, 4, 2).items()}
    y, state = short_conv(**tensors, l2norm_heads=2, backend=backend)
    exact, _ = short_conv(**{n: t.double() for n, t in tensors.items()}, l2norm_heads=2, backend="reference")
    assert y.dtype == state.dtype == torch.bfloat16
    assert relative_error(y, exact) <= TOLERANCES[torch.bfloat16].value


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_the_state_keeps_the_dtype_it_came_in(backend) -> None:
    tensors = inputs(2, 2, 4, 4, 2)
    _, state = short_conv(tensors["x"].bfloat16(), tensors["weight"], state=tensors["state"], backend=backend)
    assert state.dtype == torch.float32
    torch.testing.assert_close(state[..., 0], tensors["state"][..., 2], rtol=0, atol=0)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_no_documents_at_all(backend) -> None:
    y, state = short_conv(torch.zeros(1, 0, 4), torch.zeros(4, 3), cu_seqlens=borders([]), backend=backend)
    assert y.shape == (1, 0, 4)
    assert state.shape == (0, 4, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 70, 2]])
def test_on_a_gpu(lengths) -> None:
    cu_seqlens = None if lengths is None else borders(lengths)
    tensors = inputs(2, 78, 12, 4, 2) if lengths is None else inputs(1, 78, 12, 4, 5)
    exact = outputs_and_gradients(
        {n: t.double() for n, t in tensors.items()}, l2norm_heads=3, cu_seqlens=cu_seqlens, backend="reference"
    )
    on_gpu = None if cu_seqlens is None else cu_seqlens.cuda()
    found = outputs_and_gradients({n: t.cuda() for n, t in tensors.items()}, l2norm_heads=3, cu_seqlens=on_gpu)
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.cpu(), b) <= TOLERANCES[torch.float32].gradient
    state = tensors["state"].cuda()
    step = short_conv_step_(tensors["x"][:1, 0].cuda(), tensors["weight"].cuda(), state=state[:1])
    right, after = short_conv(tensors["x"][:1, :1], tensors["weight"], state=tensors["state"][:1])
    torch.testing.assert_close(step.cpu(), right[:, 0])
    torch.testing.assert_close(state[:1].cpu(), after)


def test_unit_norm_per_head() -> None:
    y, _ = short_conv(torch.randn(1, 9, 12), torch.randn(12, 4), l2norm_heads=3)
    torch.testing.assert_close(y.view(1, 9, 3, 4).norm(dim=-1), torch.ones(1, 9, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("lengths", [None, [4, 0, 5]])
def test_compiles_without_a_graph_break(lengths) -> None:
    cu_seqlens = None if lengths is None else borders(lengths)
    tensors = inputs(1, 9, 4, 4, 1 if lengths is None else 3)
    how = {"l2norm_heads": 2, "cu_seqlens": cu_seqlens}

    def loss(x, weight, bias, state):
        y, final = short_conv(x, weight, bias=bias, state=state, **how)
        return (y * y.cos()).sum() + final.square().sum()

    def run(function) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        value = function(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, right in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("given_state", [True, False])
def test_custom_op_contract(given_state) -> None:
    tensors = inputs(1, 6, 4, 4, 2)
    state = tensors["state"].requires_grad_() if given_state else None
    arguments = (tensors["x"].requires_grad_(), tensors["weight"], None, state, borders([2, 4]), "silu", 2, 4)
    for op in (torch.ops.glade.short_conv_torch.default, torch.ops.glade.short_conv_cpu.default):
        torch.library.opcheck(op, arguments)


def test_without_bias_or_state() -> None:
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y, state = short_conv(x, weight)
    zeros = short_conv(x, weight, bias=torch.zeros(4), state=torch.zeros(2, 4, 2))
    torch.testing.assert_close((y, state), zeros, rtol=0, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("slots", [None, [4, 0]])
def test_steps_equal_the_whole(W, slots) -> None:
    tensors = inputs(2, 7, 6, W, 2)
    weight, bias = tensors["weight"], tensors["bias"]
    y, final = short_conv(**tensors, l2norm_heads=2)
    rows = torch.arange(2) if slots is None else torch.tensor(slots)
    state = torch.full((2 if slots is None else 5, 6, W - 1), 9.0)
    state[rows] = tensors["state"]
    steps = [
        short_conv_step_(
            tensors["x"][:, t],
            weight,
            bias=bias,
            l2norm_heads=2,
            state=state,
            slots=None if slots is None else rows,
        )
        for t in range(7)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(state[rows], final)
    others = [i for i in range(len(state)) if i not in rows.tolist()]
    assert (state[others] == 9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \[2, 5\]"),
        ({"x": torch.zeros(2, 5, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"weight": torch.zeros(4, 9)}, r"weight has shape \[4, 9\].*1 to 8"),
        ({"weight": torch.zeros(3, 4)}, r"weight has shape \[3, 4\]; give \[4, W\]"),
        ({"bias": torch.zeros(3)}, r"bias has shape \[3\]; give \[4\]"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"l2norm_heads": 3}, "l2norm_heads is 3"),
        ({"l2norm_heads": 1, "l2norm_channels": 5}, "l2norm_channels is 5; give 0 to 4"),
        ({"l2norm_channels": 2}, "l2norm_channels is 2 without l2norm_heads"),
        ({"state": torch.zeros(2, 4, 4)}, r"shape \[2, 4, 4\]; give floating-point \[2, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "the batch is 2"),
        ({"x": torch.zeros(1, 5, 4), "cu_seqlens": torch.tensor([0, 4])}, "from 0 to 4"),
        ({"x": torch.zeros(1, 5, 4), "cu_seqlens": torch.tensor([0, 3, 2, 5])}, "falls from 3 to 2"),
    ],
)
def test_errors_say_what_was_given(change, message) -> None:
    call = {"x": torch.zeros(2, 5, 4), "weight": torch.zeros(4, 4), **change}
    with pytest.raises(ValueError, match=message):
        short_conv(**call)


def test_an_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(BackendError, match=r"no backend 'fast'.*'cpu', 'reference', 'torch'"):
        short_conv(torch.zeros(1, 2, 4), torch.zeros(4, 4), backend="fast")


def test_a_backend_that_cannot_serve_names_those_that_can() -> None:
    with pytest.raises(BackendError, match=r"'cpu' of short_conv serves fp32 and bf16.*Use 'torch' or 'reference'"):
        short_conv(torch.zeros(1, 2, 4).double(), torch.zeros(4, 4).double(), backend="cpu")


def test_step_refuses_slots_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"slots is torch.int64 of shape \[3\]; give int64 \[2\]"):
        short_conv_step_(torch.zeros(2, 4), torch.zeros(4, 4), state=torch.zeros(5, 4, 3), slots=torch.arange(3))
