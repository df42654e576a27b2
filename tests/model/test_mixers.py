"""What every mixer must satisfy, each checked by the one routine for all of them.

The comparisons run in fp64: a mistake shows as 1e-2, rounding as 1e-14, and no tolerance is needed in between.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glade.model import LanguageModel, State

Build = Callable[..., LanguageModel]
MakeIds = Callable[..., Tensor]

T = 23


def assert_same_reading(model: LanguageModel, ids: Tensor, logits: list[Tensor], state: State) -> None:
    """`logits` (pieces along T) and `state` are those of reading `ids` in one call, the state judged by going on."""
    with torch.no_grad():
        expected, final = model(ids)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)
        assert state.position.tolist() == final.position.tolist()
        follow = ids.flip(1)[:, :7]
        torch.testing.assert_close(model(follow, state)[0], model(follow, final)[0], rtol=0, atol=1e-10)


def test_token_by_token_is_the_whole(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, T)
    state, pieces = None, []
    for t in range(T):
        with torch.no_grad():
            logits, state = model(ids[:, t : t + 1], state)
        pieces.append(logits)
    assert state is not None
    assert_same_reading(model, ids, pieces, state)


def test_decoding_in_place_is_the_whole(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, T)
    state = model.init_state(2)
    pieces = [model.step_(ids[:, t], state)[:, None] for t in range(T)]
    assert_same_reading(model, ids, pieces, state)


def test_decoding_goes_on_from_a_prefill(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, T)
    with torch.no_grad():
        first, state = model(ids[:, :11])
    pieces = [first] + [model.step_(ids[:, t], state)[:, None] for t in range(11, T)]
    assert_same_reading(model, ids, pieces, state)


@pytest.mark.parametrize("cut", [0, 1, 9, T])
def test_two_parts_are_the_whole(case: str, cut: int, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, T)
    with torch.no_grad():
        first, state = model(ids[:, :cut])
        second, state = model(ids[:, cut:], state)
    assert_same_reading(model, ids, [first, second], state)


def test_packed_documents_are_separate_documents(case: str, build: Build, make_ids: MakeIds) -> None:
    """Two packed calls in a row, with an empty document, against each document read alone."""
    model = build(case, torch.float64)
    lengths = [[5, 0, 9, 1], [2, 7, 0, 6]]
    documents = [make_ids(1, 7), make_ids(1, 7), make_ids(1, 9), make_ids(1, 7)]
    state, seen = None, [0] * 4
    pieces: list[list[Tensor]] = [[] for _ in documents]
    for part in lengths:
        cu_seqlens = torch.tensor([0, *torch.tensor(part).cumsum(0).tolist()], dtype=torch.int32)
        packed = torch.cat([d[:, s : s + n] for d, s, n in zip(documents, seen, part, strict=True)], 1)
        with torch.no_grad():
            logits, state = model(packed, state, cu_seqlens=cu_seqlens)
        for piece, chunk in zip(pieces, logits.split(part, 1), strict=True):
            piece.append(chunk)
        seen = [s + n for s, n in zip(seen, part, strict=True)]
    assert state is not None
    for i, document in enumerate(documents):
        assert_same_reading(model, document, pieces[i], state.select([i]))


def test_nothing_comes_from_the_future_to_the_bit(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(2, T)
    if model.config.ffn == "moe":
        pytest.skip("which tokens share an expert's matrix product depends on all of them, and so does its rounding")
    with torch.no_grad():
        before = model(ids)[0]
        for t in (0, 1, T // 2, T - 2):
            changed = ids.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % model.config.vocab_size
            assert torch.equal(model(changed)[0][:, : t + 1], before[:, : t + 1])


def test_gradients_reach_every_parameter(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(2, T)
    losses, state = model(ids[:, :-1], targets=ids[:, 1:])
    loss = losses.mean() if state.load_balance is None else losses.mean() + state.load_balance
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert parameter.grad.any(), f"{name} has a gradient of zeros"


def test_gradients_as_initialised_reach_every_parameter(case: str, make_ids: MakeIds, build: Build) -> None:
    """No initialisation starts in a corner (a clip, a saturated gate) where a parameter would never learn."""
    model = build(case)
    model.reset_parameters()
    ids = make_ids(2, T)
    losses, state = model(ids[:, :-1], targets=ids[:, 1:])
    (losses.mean() + (0 if state.load_balance is None else state.load_balance)).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    clipped = ("erase_proj", "write_proj", "eta_proj")  # a published clip does exactly that at this small width
    if "clip" in case or case == "gdn kaczmarz":
        dead = [name for name in dead if not any(part in name for part in clipped)]
    assert not dead


def test_gradients_pass_through_the_state(case: str, build: Build, make_ids: MakeIds) -> None:
    """The loss of a continuation reaches the tokens of its prefix, which a prompt shared by two answers needs."""
    model, ids = build(case, torch.float64), make_ids(1, 12)
    gradients = []
    for cut in (0, 8):
        model.zero_grad()
        state = None
        if cut:
            _, state = model(ids[:, :cut])
        losses, _ = model(ids[:, cut:-1], state, targets=ids[:, cut + 1 :])
        losses[:, 8 - cut :].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for whole, in_two in zip(*gradients, strict=True):
        torch.testing.assert_close(in_two, whole, rtol=0, atol=1e-9)


def test_rows_do_not_know_each_other(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(3, T)
    with torch.no_grad():
        together = model(ids)[0]
        for row in range(3):
            torch.testing.assert_close(model(ids[row : row + 1])[0], together[row : row + 1], rtol=0, atol=1e-10)


def test_forward_leaves_the_given_state_alone(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(2, T)
    with torch.no_grad():
        _, state = model(ids)
        kept = state.clone()
        model(ids, state)
    for layer, before in zip(state.layers, kept.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, before, strict=True))
    assert torch.equal(state.position, kept.position)


def test_slots_are_the_rows_of_a_larger_state(case: str, build: Build, make_ids: MakeIds) -> None:
    """Rows 3 and 0 of four decode; rows 1 and 2 stay as they are."""
    model, ids = build(case, torch.float64), make_ids(4, 9)
    with torch.no_grad():
        _, state = model(ids)
    slots = torch.tensor([3, 0])
    alone, idle = state.select(slots), state.select([1, 2])
    for t in range(7):
        expected = model.step_(ids[slots, t], alone)
        torch.testing.assert_close(model.step_(ids[slots, t], state, slots), expected, rtol=0, atol=1e-10)
    assert state.position.tolist() == [16, 9, 9, 16]
    follow = ids[:2, :3]
    with torch.no_grad():
        after = model(follow, state.select([1, 2]))[0]
        torch.testing.assert_close(after, model(follow, idle)[0], rtol=0, atol=1e-10)


def test_no_tokens_change_nothing(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, T)
    with torch.no_grad():
        _, state = model(ids)
        logits, same = model(ids[:, :0], state)
        assert logits.shape == (2, 0, model.config.vocab_size)
        assert_same_reading(model, ids, [model(ids)[0]], same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_decays_in_fp32(case: str, dtype: torch.dtype, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(2, T)
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name in exact:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, exact[name]), name
        else:
            assert parameter.dtype == dtype, name
    losses, state = model(ids, targets=ids)
    losses.mean().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    assert model.step_(ids[:, 0], state.detach()).dtype == dtype
    assert model.step_(ids[:, 0], model.init_state(2)).isfinite().all()


def test_autocast_trains_fp32_weights(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(2, T)
    with torch.autocast("cpu", torch.bfloat16):
        losses, state = model(ids, targets=ids)
        more, _ = model(ids, state, targets=ids)
    (losses.mean() + more.mean()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        exact = model(ids, targets=ids)[0]
    assert (losses.mean() - exact.mean()).abs() < 0.02 * exact.mean()


def test_state_bytes_are_those_of_the_state(case: str, build: Build, make_ids: MakeIds) -> None:
    model = build(case)
    for length in (1, 20):
        with torch.no_grad():
            _, state = model(make_ids(3, length))
        assert state.nbytes == 3 * model.state_bytes(length)
