"""rnn: values, gradients, state, packed documents, causality; and what makes the bidirectional one an encoder."""

import pytest
import torch
from torch import Tensor

from glade.ops.rnn import bidirectional_rnn, reference, rnn
from glade.ops.tolerances import TOLERANCES, relative_error

ACTIVATIONS = ["tanh", "slide"]


def inputs(B: int, T: int, D: int, num_states: int, dtype=torch.float32) -> list[Tensor]:
    """x, w_hh and state; x around 1/2, so that slide is neither always open nor always saturated."""
    x = 0.5 + 0.6 * torch.randn(B, T, D, dtype=dtype)
    return [x, torch.randn(D, D, dtype=dtype) / (2 * D**0.5), torch.rand(num_states, D, dtype=dtype)]


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def outputs_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 9, 3], [7], [0, 2], [1, 1, 1]])
def test_values_and_gradients_match_the_fp64_reference(activation, lengths) -> None:
    cu_seqlens = None if lengths is None else borders(lengths)
    tensors = inputs(3, 8, 5, 3) if lengths is None else inputs(1, sum(lengths), 5, len(lengths))
    exact = outputs_and_gradients(
        lambda x, w, s: reference.rnn(x, w, activation, s, cu_seqlens), [t.double() for t in tensors]
    )
    found = outputs_and_gradients(
        lambda x, w, s: rnn(x, w, activation=activation, state=s, cu_seqlens=cu_seqlens), tensors
    )
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) <= TOLERANCES[torch.float32].gradient


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu(activation) -> None:
    tensors, cu_seqlens = inputs(1, 18, 5, 4), borders([5, 0, 10, 3])
    exact = outputs_and_gradients(
        lambda x, w, s: reference.rnn(x, w, activation, s, cu_seqlens), [t.double() for t in tensors]
    )
    found = outputs_and_gradients(
        lambda x, w, s: rnn(x, w, activation=activation, state=s, cu_seqlens=cu_seqlens.cuda()),
        [t.cuda() for t in tensors],
    )
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.cpu(), b) <= TOLERANCES[torch.float32].gradient


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation) -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 7, 3, 3, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda x, w, s: rnn(x, w, activation=activation, state=s, cu_seqlens=borders([4, 1, 2])), tensors
    )


def test_written_out_by_hand() -> None:
    x, w_hh = torch.tensor([0.5, 0.25, 0.0, -2.0, 3.0]).view(1, 5, 1), torch.tensor([[1.0]])
    h, state = rnn(x, w_hh, activation="slide")
    assert h.flatten().tolist() == [0.5, 0.75, 0.75, 0.0, 1.0]
    assert state.tolist() == [[1.0]]
    # W_hh's rows make the new state: a shift register
    h, _ = rnn(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), activation="slide")
    assert h.tolist() == [[[1.0, 0.0], [0.0, 1.0]]]


@pytest.mark.parametrize("middle", [0, 1, 6, 11])
def test_two_halves_equal_the_whole(middle) -> None:
    x, w_hh, state = inputs(2, 11, 4, 2)
    h, final = rnn(x, w_hh, state=state)
    first, handed_over = rnn(x[:, :middle], w_hh, state=state)
    second, end = rnn(x[:, middle:], w_hh, state=handed_over)
    torch.testing.assert_close(torch.cat([first, second], 1), h)
    torch.testing.assert_close(end, final)


def test_packed_equals_separate() -> None:
    lengths = [4, 0, 6, 1]
    x, w_hh, state = inputs(1, 11, 4, 4, torch.float64)
    h, final = rnn(x, w_hh, state=state, cu_seqlens=borders(lengths))
    start = 0
    for i in range(4):
        alone, end = rnn(x[:, start : start + lengths[i]], w_hh, state=state[i : i + 1])
        torch.testing.assert_close(h[:, start : start + lengths[i]], alone)
        torch.testing.assert_close(final[i : i + 1], end)
        start += lengths[i]


@pytest.mark.parametrize("T", [1, 7])
def test_rows_are_documents_of_one_length(T) -> None:
    def of_documents(x: Tensor, w_hh: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, final = rnn(x.reshape(1, 3 * T, 4), w_hh, state=state, cu_seqlens=borders([T] * 3))
        return h.view_as(x), final

    tensors = inputs(3, T, 4, 3)
    of_rows = outputs_and_gradients(lambda x, w_hh, state: rnn(x, w_hh, state=state), tensors)
    for found, expected in zip(of_rows, outputs_and_gradients(of_documents, tensors), strict=True):
        assert torch.equal(found, expected)


def test_a_later_token_changes_no_earlier_bit() -> None:
    x, w_hh, _ = inputs(1, 20, 6, 1)
    before, _ = rnn(x, w_hh)
    x[:, 13] += 1
    after, _ = rnn(x, w_hh)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


def test_the_future_leaks_into_a_bidirectional_rnn() -> None:
    """Why LanguageModel refuses it: the first output already knows the last token, so predicting it is no feat."""
    x, w_forward, _ = inputs(1, 5, 4, 1, torch.float64)
    w_backward = torch.randn(4, 4, dtype=torch.float64) / 2
    x.requires_grad_()
    h = bidirectional_rnn(x, w_forward, w_backward)
    assert h.shape == (1, 5, 8)
    (of_first,) = torch.autograd.grad(h[:, 0].sum(), x)
    assert (of_first[:, 4] != 0).all()
    changed = x.detach().clone()
    changed[:, 4] += 1
    after = bidirectional_rnn(changed, w_forward, w_backward)
    assert torch.equal(h[:, :4, :4], after[:, :4, :4])
    assert (h[:, :4, 4:] != after[:, :4, 4:]).all()


def test_bidirectional_is_the_two_directions_side_by_side() -> None:
    x, w_forward, _ = inputs(2, 5, 4, 1)
    w_backward = torch.randn(4, 4)
    h = bidirectional_rnn(x, w_forward, w_backward, activation="slide")
    torch.testing.assert_close(h[..., :4], rnn(x, w_forward, activation="slide")[0])
    torch.testing.assert_close(h[..., 4:].flip(1), rnn(x.flip(1), w_backward, activation="slide")[0])


def test_bfloat16_is_rounded_at_the_end_only_and_the_state_stays_fp32() -> None:
    tensors = [t.bfloat16() for t in inputs(2, 9, 4, 2)]
    h, state = rnn(tensors[0], tensors[1], state=tensors[2].float())
    exact, _ = reference.rnn(tensors[0].double(), tensors[1].double(), "tanh", tensors[2].double(), None)
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(h, exact) <= TOLERANCES[torch.bfloat16].value


def test_autocast_does_not_reach_into_the_recurrence() -> None:
    tensors = inputs(2, 9, 4, 2)

    def under_autocast(x, w, s):
        with torch.autocast("cpu", torch.bfloat16):
            return rnn(x, w, state=s)

    plain = outputs_and_gradients(lambda x, w, s: rnn(x, w, state=s), tensors)
    for a, b in zip(outputs_and_gradients(under_autocast, tensors), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_compiles_without_a_graph_break(lengths) -> None:
    cu_seqlens = None if lengths is None else borders(lengths)
    tensors = inputs(1, 6, 4, 1 if lengths is None else 3)

    def run(x, w, s):
        h, final = rnn(x, w, state=s, cu_seqlens=cu_seqlens)
        return h.sin(), final * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(run, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_custom_op_contract() -> None:
    x, w_hh, state = (t.requires_grad_() for t in inputs(1, 6, 4, 2))
    torch.library.opcheck(torch.ops.glade.rnn.default, (x, w_hh, state, borders([2, 4]), "tanh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"shape \[2, 4\]; give floating-point \[B, T, D\]"),
        ({"w_hh": torch.zeros(4, 3)}, r"w_hh has shape \[4, 3\]; give \[4, 4\]"),
        ({"activation": "relu"}, "activation is 'relu'; give 'tanh' or 'slide'"),
        ({"state": torch.zeros(3, 4)}, r"state has shape \[3, 4\]; give \[2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "the batch is 2"),
        ({"x": torch.zeros(1, 5, 4), "cu_seqlens": torch.tensor([0, 6])}, "from 0 to 6"),
    ],
)
def test_errors_say_what_was_given(change, message) -> None:
    call = {"x": torch.zeros(2, 5, 4), "w_hh": torch.zeros(4, 4), **change}
    with pytest.raises(ValueError, match=message):
        rnn(**call)
