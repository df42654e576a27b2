"""attention: values, gradients, windows, states, packed documents, causality, score functions and the decoding step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glade.errors import BackendError
from glade.ops.attention import (
    BACKENDS,
    AdditiveWeight,
    AttentionState,
    attention,
    attention_scores,
    attention_step_,
    empty_state,
    flash,
    intervals,
    reserve,
)
from glade.ops.tolerances import TOLERANCES, relative_error

FAST = sorted(set(BACKENDS) - {"reference"})


def inputs(B: int, T: int, H: int = 4, HKV: int = 2, K: int = 6, V: int = 5, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(B, T, heads, dim, dtype=dtype) for heads, dim in ((H, K), (HKV, K), (HKV, V))]


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def state_after(lengths: list[int], window: int | None, dtype=torch.float32) -> AttentionState:
    """A state whose rows have really seen so many random tokens."""
    q, k, v = inputs(1, sum(lengths), dtype=dtype)
    _, state = attention(q, k, v, window=window, cu_seqlens=borders(lengths), backend="reference")
    return state


def outputs_and_gradients(q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, **how) -> dict[str, Tensor]:
    """o, the new state, and the gradients of all inputs for repeatable upstream gradients of all outputs."""
    leaves = {"q": q, "k": k, "v": v}
    if state is not None:
        leaves |= {"state.k": state.k, "state.v": state.v}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    if state is not None:
        state = AttentionState(leaves["state.k"], leaves["state.v"], state.length)
    o, after = attention(leaves["q"], leaves["k"], leaves["v"], state=state, **how)
    generator = torch.Generator().manual_seed(1)
    outputs = [o, after.k, after.v]
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = dict(zip([f"d {name}" for name in leaves], gradients, strict=True))
    return {"o": o, "after.k": after.k, "after.v": after.v, "after.length": after.length, **named}


def assert_matches_reference(tensors: list[Tensor], state: AttentionState | None = None, **how) -> None:
    exact_state = None if state is None else AttentionState(state.k.double(), state.v.double(), state.length)
    q, k, v = (t.double() for t in tensors)
    exact = outputs_and_gradients(q, k, v, exact_state, **{**how, "backend": "reference"})
    found = outputs_and_gradients(*tensors, state, **how)
    tolerance = TOLERANCES[tensors[0].dtype]
    for name, right in exact.items():
        allowed = tolerance.gradient if name.startswith("d ") else tolerance.value
        assert relative_error(found[name], right) <= allowed, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 1, 3, 16, 64, 65, 400])
@pytest.mark.parametrize("T", [1, 2, 17, 65, 200])
def test_rows(backend, T, window) -> None:
    assert_matches_reference(inputs(2, T), window=window, backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("H", "HKV", "K", "V"), [(1, 1, 4, 4), (4, 4, 6, 6), (6, 2, 8, 8), (6, 1, 3, 8)])
@pytest.mark.parametrize("window", [None, 7])
def test_heads(backend, H, HKV, K, V, window) -> None:
    assert_matches_reference(inputs(2, 33, H, HKV, K, V), window=window, scale=0.7, backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("T", [1, 2, 70])
def test_states_of_rows_with_different_pasts(backend, T, window) -> None:
    assert_matches_reference(inputs(4, T), state_after([5, 0, 13, 9], window), window=window, backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 2, 90, 0, 11], [0, 2, 0], [1, 1, 1], [9], [70, 70]])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents(backend, lengths, window, with_state) -> None:
    past = [(7 * i + 3) % 11 for i in range(len(lengths))]
    state = state_after(past, window) if with_state else None
    assert_matches_reference(
        inputs(1, sum(lengths)), state, window=window, cu_seqlens=borders(lengths), backend=backend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("how", ["rows", "state", "packed", "packed with states"])
def test_on_a_gpu(how, window) -> None:
    packed, with_state = "packed" in how, "state" in how
    tensors = inputs(1, 150, V=6) if packed else inputs(3, 50, V=6)
    q, k, v = inputs(1, 18, V=6)
    state = attention(q, k, v, window=window, cu_seqlens=borders([5, 0, 13]))[1] if with_state else None
    cu_seqlens = borders([10, 1, 139]) if packed else None
    exact_state = None if state is None else AttentionState(state.k.double(), state.v.double(), state.length)
    q, k, v = (t.double() for t in tensors)
    exact = outputs_and_gradients(q, k, v, exact_state, window=window, cu_seqlens=cu_seqlens, backend="reference")
    on_gpu = None if state is None else AttentionState(*(x.cuda() for x in state))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.cuda()
    found = outputs_and_gradients(*(t.cuda() for t in tensors), on_gpu, window=window, cu_seqlens=cu_seqlens)
    for name, right in exact.items():
        assert relative_error(found[name].cpu(), right) <= TOLERANCES[torch.float32].gradient, name


def rows_and_documents(how: str, window: int | None, K: int, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    """q, k, v of one kind of call, and what goes with them: a state whose rows have seen different numbers of tokens
    (one of them nothing), borders with an empty document."""
    sizes = dict(K=K, V=K, dtype=dtype)
    packed = "packed" in how
    tensors = inputs(1, 300, **sizes) if packed else inputs(4, 75, **sizes)
    past = torch.tensor([0, 5, 0, 13, 90]).cumsum(0)
    _, state = attention(*inputs(1, 108, **sizes), window=window, cu_seqlens=past.int(), backend="reference")
    return tensors, {
        "state": state if "state" in how else None,
        "cu_seqlens": borders([10, 0, 161, 129]) if packed else None,
        "window": window,
    }


KINDS = ["rows", "state", "packed", "packed with states"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [8, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("how", KINDS)
def test_16_bits_on_a_gpu(how, window, K, dtype) -> None:
    tensors, given = rows_and_documents(how, window, K, dtype)
    state, cu_seqlens = given["state"], given["cu_seqlens"]
    exact_state = None if state is None else AttentionState(state.k.double(), state.v.double(), state.length)
    q, k, v = (t.double() for t in tensors)
    exact = outputs_and_gradients(q, k, v, exact_state, window=window, cu_seqlens=cu_seqlens, backend="reference")
    on_gpu = None if state is None else AttentionState(*(x.cuda() for x in state))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.cuda()
    q, k, v = (t.cuda() for t in tensors)
    assert flash.serves(q, k, v)
    found, again = (outputs_and_gradients(q, k, v, on_gpu, window=window, cu_seqlens=cu_seqlens) for _ in range(2))
    for name, right in exact.items():
        allowed = TOLERANCES[dtype].gradient if name.startswith("d ") else TOLERANCES[dtype].value
        assert relative_error(found[name].cpu(), right) <= allowed, name
        assert torch.equal(found[name], again[name]) or (K == 256 and name == "d q"), name


def by_sequence(q, k, v, starts, key_starts, cu_seqlens, T, P, scale, window) -> tuple[Tensor, None]:
    """What flash attention's kernel is asked for: each sequence's last query sees up to its last key."""
    longest = max(starts.diff().tolist())
    assert longest <= T and max(key_starts.diff().tolist()) <= P + T
    outputs = []
    for i in range(len(starts) - 1):
        queries = q[starts[i] : starts[i + 1]]
        keys, values = (x[key_starts[i] : key_starts[i + 1]].repeat_interleave(2, 1) for x in (k, v))
        apart = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        hidden = (apart < 0) | (apart >= (window or len(keys) + 1))
        scores = torch.einsum("thk,shk->hts", queries, keys) * scale
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        outputs.append(torch.einsum("hts,shv->thv", p, values))
    return torch.cat(outputs), None


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("how", KINDS)
def test_what_flash_attention_is_given(how, window, monkeypatch) -> None:
    monkeypatch.setattr(flash, "serves", lambda *_: True)
    monkeypatch.setattr(flash, "_flash", by_sequence)
    tensors, given = rows_and_documents(how, window, 8, torch.float32)
    assert_matches_reference(tensors, given.pop("state"), **given)


@pytest.mark.parametrize("given_state", [False, True])
def test_what_a_compiler_sees_of_flash_attention(given_state) -> None:
    """The custom op, its gradient and their shapes, by tensors without values."""
    with FakeTensorMode():
        leaves = [x.requires_grad_() for x in inputs(3, 20, K=8, V=8, dtype=torch.bfloat16)]
        state = empty_state(3, 9, 2, 8, 8, dtype=torch.bfloat16) if given_state else None
        o = flash.attention(*leaves, None, 0.5, state, None)
        gradients = torch.autograd.grad(o.sum(), leaves)
    assert o.shape == leaves[0].shape
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_steps_on_a_gpu(window) -> None:
    q, k, v = inputs(2, 9, V=6)
    o, after = attention(q, k, v, window=window)
    state = AttentionState(*(x.cuda() for x in empty_state(2, window or 12, 2, 6, 6)))
    steps = [
        attention_step_(q[:, t].cuda(), k[:, t].cuda(), v[:, t].cuda(), state=state, window=window) for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, 1).cpu(), o)
    torch.testing.assert_close(state.k[:, : after.k.shape[1]].cpu(), after.k)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("how", ["rows", "window", "packed", "state", "packed with states"])
def test_gradcheck(backend, how, monkeypatch) -> None:
    monkeypatch.setattr(intervals, "BLOCK", 3)
    cu_seqlens = borders([4, 0, 3]) if "packed" in how else None
    window = None if how == "rows" else 3
    state = None
    if "state" in how:
        state = state_after([5, 1, 0] if "packed" in how else [5], window, torch.float64)
    leaves = [*inputs(1, 7, 2, 1, 3, 2, torch.float64)]
    if state is not None:
        q, k, v = inputs(1, 7, dtype=torch.float64)
        leaves = [q, k, v, state.k, state.v]

    def run(q, k, v, *past):
        before = None if state is None else AttentionState(*past, state.length)
        o, after = attention(q, k, v, window=window, state=before, cu_seqlens=cu_seqlens, backend=backend)
        return o, after.k, after.v

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves], fast_mode=state is not None)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 7)),
    with_state=st.booleans(),
)
def test_packed_equals_separate(backend, lengths, window, with_state) -> None:
    q, k, v = inputs(1, sum(lengths), dtype=torch.float64)
    past = state_after([(5 * i) % 8 for i in range(len(lengths))], window, torch.float64) if with_state else None
    how = {"window": window, "backend": backend}
    o, after = attention(q, k, v, state=past, cu_seqlens=borders(lengths), **how)
    start = 0
    for i in range(len(lengths)):
        part = slice(start, start + lengths[i])
        alone = None if past is None else AttentionState(*(x[i : i + 1] for x in past))
        o_alone, after_alone = attention(q[:, part], k[:, part], v[:, part], state=alone, **how)
        torch.testing.assert_close(o[:, part], o_alone)
        used = after_alone.k.shape[1]
        torch.testing.assert_close(after.k[i : i + 1, :used], after_alone.k)
        torch.testing.assert_close(after.v[i : i + 1, :used], after_alone.v)
        assert after.length[i] == after_alone.length[0]
        start += lengths[i]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("middle", [0, 1, 6, 12, 17])
def test_two_halves_equal_the_whole(backend, window, middle) -> None:
    q, k, v = inputs(2, 17, dtype=torch.float64)
    how = {"window": window, "backend": backend}
    o, after = attention(q, k, v, **how)
    o1, handed_over = attention(q[:, :middle], k[:, :middle], v[:, :middle], **how)
    o2, end = attention(q[:, middle:], k[:, middle:], v[:, middle:], state=handed_over, **how)
    torch.testing.assert_close(torch.cat([o1, o2], 1), o)
    for found, right in zip(end, after, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("V", [6, 5])
def test_a_later_token_changes_no_earlier_bit(backend, window, V) -> None:
    q, k, v = inputs(1, 200, V=V)
    before, _ = attention(q, k, v, window=window, backend=backend)
    for x in (q, k, v):
        x[:, 130] += 3
    after, _ = attention(q, k, v, window=window, backend=backend)
    assert torch.equal(before[:, :130], after[:, :130])
    changed = slice(130, None if window is None else 180)
    assert (before[:, changed] != after[:, changed]).any(-1).all()
    if window is not None:
        assert torch.equal(before[:, 180:], after[:, 180:])


def test_the_first_token_returns_its_own_value() -> None:
    q, k, v = inputs(1, 3, 2, 2)
    o, _ = attention(q, k, v)
    torch.testing.assert_close(o[:, 0], v[:, 0])
    o, _ = attention(q, k, v, window=1)
    torch.testing.assert_close(o, v)


def test_written_out_by_hand() -> None:
    """One head of one channel with scores 0 and log 3: a quarter of the first value and three of the second."""
    k = torch.tensor([0.0, 3.0]).log().clamp(min=0).view(1, 2, 1, 1)
    o, _ = attention(torch.ones(1, 2, 1, 1), k, torch.tensor([4.0, 8.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(o.flatten(), torch.tensor([4.0, 7.0]))


def test_the_state_without_a_window_is_the_keys_themselves() -> None:
    q, k, v = inputs(2, 5)
    _, state = attention(q, k, v)
    assert state.k.data_ptr() == k.data_ptr()
    assert state.v.data_ptr() == v.data_ptr()
    assert state.length.tolist() == [5, 5]


def test_the_ring_keeps_position_p_in_slot_p_mod_window() -> None:
    q, k, v = inputs(1, 7, 1, 1)
    _, state = attention(q, k, v, window=4)
    assert torch.equal(state.k[0], k[0, [4, 5, 6, 3]])
    _, state = attention(q[:, :2], k[:, :2], v[:, :2], window=4)
    assert torch.equal(state.k[0, :2], k[0, :2])
    assert (state.k[0, 2:] == 0).all()


def test_attention_does_not_change_the_state_it_is_given() -> None:
    for window in (None, 3):
        state = state_after([4, 2], window)
        kept = [x.clone() for x in state]
        attention(*inputs(2, 3), window=window, state=state)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_return_state_false_gives_none_and_the_same_output() -> None:
    q, k, v = inputs(1, 9)
    for backend in BACKENDS:
        how = {"cu_seqlens": borders([4, 5]), "backend": backend}
        with_state, _ = attention(q, k, v, **how)
        without, state = attention(q, k, v, return_state=False, **how)
        assert state is None
        assert torch.equal(with_state, without)


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize(("H", "HKV", "V"), [(4, 2, 6), (4, 2, 5), (3, 3, 6)])
def test_steps_equal_the_whole(window, H, HKV, V) -> None:
    """Rows with different pasts, decoded together in place."""
    past = [3, 0, 9]
    q, k, v = inputs(1, 9, H, HKV, V=V)
    cu_seqlens = borders(past)
    packed = [torch.cat([x[:, :n] for n in past], 1) for x in (q, k, v)]
    _, state = attention(*packed, window=window, cu_seqlens=cu_seqlens)
    q, k, v = inputs(3, 11, H, HKV, V=V)
    o, after = attention(q, k, v, window=window, state=state)
    own = reserve(state, 20) if window is None else state
    own = AttentionState(*(x.clone() for x in own))
    steps = [attention_step_(q[:, t], k[:, t], v[:, t], state=own, window=window) for t in range(11)]
    torch.testing.assert_close(torch.stack(steps, 1), o)
    assert own.length.tolist() == after.length.tolist() == [14, 11, 20]
    torch.testing.assert_close(own.k, after.k)
    torch.testing.assert_close(own.v, after.v)


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_of_some_rows_is_that_of_each_alone(window) -> None:
    """To the bit, whatever the lengths of the others; the rows not asked for stay what they were."""
    q, k, v = inputs(5, 1, 4, 2)
    state = empty_state(5, window or 9, 2, 6, 5)
    past = inputs(5, state.k.shape[1], 4, 2)
    state = AttentionState(past[1], past[2], torch.tensor([3, 0, 8, 5, 1]))
    slots = torch.tensor([3, 0, 2])
    own = AttentionState(*map(torch.clone, state))
    o = attention_step_(*(x[slots, 0] for x in (q, k, v)), state=own, window=window, slots=slots)
    for i, row in enumerate(slots.tolist()):
        one = AttentionState(*(x[row : row + 1].clone() for x in state))
        assert torch.equal(
            o[i : i + 1], attention_step_(*(x[row : row + 1, 0] for x in (q, k, v)), state=one, window=window)
        )
        assert all(torch.equal(part[row], alone[0]) for part, alone in zip(own, one, strict=True))
    assert all(torch.equal(part[[1, 4]], before[[1, 4]]) for part, before in zip(own, state, strict=True))
    with pytest.raises(ValueError, match=r"slots has shape \[2\]; give \[3\]"):
        attention_step_(*(x[slots, 0] for x in (q, k, v)), state=own, window=window, slots=slots[:2])


def test_decoding_from_nothing() -> None:
    q, k, v = inputs(2, 6)
    state = empty_state(2, 6, 2, 6, 5)
    steps = [attention_step_(q[:, t], k[:, t], v[:, t], state=state) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), attention(q, k, v)[0])


def test_a_step_writes_into_the_state_and_copies_nothing_of_its_size() -> None:
    state = empty_state(1, 4096, 2, 8, 8)
    state.length.fill_(4000)
    q, k, v = inputs(1, 1, 4, 2, 8, 8)
    step = [x[:, 0] for x in (q, k, v)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        attention_step_(*step, state=state)
    assert torch.equal(state.k[:, 4000], k[:, 0])
    assert state.length.tolist() == [4001]
    largest = max(event.cpu_memory_usage for event in recorded.events() or [])
    assert largest < state.k.nbytes / 4


def test_a_full_state_says_how_to_grow() -> None:
    state = empty_state(2, 3, 2, 6, 5)
    state.length[1] = 3
    q, k, v = (x[:, 0] for x in inputs(2, 1))
    with pytest.raises(ValueError, match=r"holds 3 tokens and is full; give it room with reserve\(state, 6\)"):
        attention_step_(q, k, v, state=state)
    attention_step_(q, k, v, state=reserve(state, 6))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("window", [None, 5])
def test_bfloat16_is_rounded_at_the_end_only(backend, window) -> None:
    tensors = [x.bfloat16() for x in inputs(2, 40, K=16, V=8)]
    o, state = attention(*tensors, window=window, backend=backend)
    exact, _ = attention(*(x.double() for x in tensors), window=window, backend="reference")
    assert o.dtype == state.k.dtype == torch.bfloat16
    assert relative_error(o, exact) <= TOLERANCES[torch.bfloat16].value


@pytest.mark.parametrize("window", [None, 8])
def test_the_dtype_is_the_tensors_not_autocast_s(window) -> None:
    q, k, v = inputs(1, 90, V=6)
    plain, state = attention(q, k, v, window=window)
    state = reserve(state, 91) if window is None else state
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, _ = attention(q, k, v, window=window)
        step = attention_step_(q[:, 0], k[:, 0], v[:, 0], state=AttentionState(*map(torch.clone, state)), window=window)
    assert torch.equal(plain, under_autocast)
    assert torch.equal(step, attention_step_(q[:, 0], k[:, 0], v[:, 0], state=state, window=window))


@pytest.mark.parametrize("window", [None, 8])
def test_queries_and_keys_in_a_wider_dtype_than_values(window) -> None:
    q, k, v = inputs(1, 20, V=6)
    o, state = attention(q, k, v.bfloat16(), window=window)
    exact, _ = attention(q.double(), k.double(), v.bfloat16().double(), window=window, backend="reference")
    assert o.dtype == state.v.dtype == torch.bfloat16
    assert relative_error(o, exact) <= TOLERANCES[torch.bfloat16].value


def additive(K: int, hidden: int = 3, dtype=torch.float64) -> AdditiveWeight:
    return AdditiveWeight(*(torch.randn(*shape, dtype=dtype) for shape in ((hidden, K), (hidden, K), (hidden,))))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("score", ["multiplicative", "multiplicative per head", "additive"])
@pytest.mark.parametrize("how", ["rows", "window", "packed", "state"])
def test_score_functions(backend, score, how) -> None:
    shape = (4, 6, 6) if "head" in score else (6, 6)
    weight = additive(6) if score == "additive" else torch.randn(shape, dtype=torch.float64)
    window = 3 if how == "window" else None
    assert_matches_reference(
        inputs(1, 12, dtype=torch.float64),
        state_after([4], window, torch.float64) if how == "state" else None,
        window=window,
        cu_seqlens=borders([5, 7]) if how == "packed" else None,
        score=score.split()[0],
        score_weight=weight,
        backend=backend,
    )


def test_the_score_weights_are_learned() -> None:
    q, k, v = inputs(1, 5)
    for score, weight in (("multiplicative", torch.randn(6, 6)), ("additive", additive(6, dtype=torch.float32))):
        parts = [weight] if isinstance(weight, Tensor) else list(weight)
        for part in parts:
            part.requires_grad_()
        attention(q, k, v, score=score, score_weight=weight)[0].sum().backward()
        assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)


def is_symmetric(scores: Tensor) -> bool:
    return torch.allclose(scores, scores.transpose(-1, -2))


def test_when_the_scores_of_self_attention_are_symmetric() -> None:
    """With the same vectors as queries and keys: does s attend to t as t to s, before mask and softmax?"""
    x = torch.randn(1, 7, 2, 5, dtype=torch.float64)
    assert is_symmetric(attention_scores(x, x))
    assert not is_symmetric(attention_scores(x, torch.randn_like(x)))

    W = torch.randn(5, 5, dtype=torch.float64)
    assert not is_symmetric(attention_scores(x, x, score="multiplicative", score_weight=W))
    assert is_symmetric(attention_scores(x, x, score="multiplicative", score_weight=W + W.T))
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        attention_scores(x, x, score="multiplicative", score_weight=identity), attention_scores(x, x)
    )

    w_q, w_k, v = additive(5)
    assert not is_symmetric(attention_scores(x, x, score="additive", score_weight=AdditiveWeight(w_q, w_k, v)))
    assert is_symmetric(attention_scores(x, x, score="additive", score_weight=AdditiveWeight(w_q, w_q, v)))


def test_scores_written_out() -> None:
    q, k = torch.tensor([2.0, 3.0]).view(1, 1, 1, 2), torch.tensor([5.0, 7.0]).view(1, 1, 1, 2)
    W = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert attention_scores(q, k, scale=1.0).item() == 31
    assert attention_scores(q, k, score="multiplicative", score_weight=W, scale=1.0).item() == 2 * 7
    hidden = AdditiveWeight(torch.tensor([[0.1, 0.0]]), torch.tensor([[0.0, 0.1]]), torch.tensor([2.0]))
    right = 2 * torch.tanh(torch.tensor(0.9)).item()
    assert attention_scores(q, k, score="additive", score_weight=hidden).item() == pytest.approx(right)


@pytest.mark.parametrize("how", ["rows", "window", "packed", "packed window"])
def test_compiles_without_a_graph_break(how) -> None:
    cu_seqlens = borders([4, 0, 6]) if "packed" in how else None
    window = 3 if "window" in how else None

    def run(q, k, v):
        o, _ = attention(q, k, v, window=window, cu_seqlens=cu_seqlens, return_state=False)
        return o * o.cos()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in inputs(1, 10)]
    found, right = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(found, right)
    found, right = (torch.autograd.grad(o.sum(), leaves) for o in (found, right))
    torch.testing.assert_close(found, right)


def test_custom_op_contract() -> None:
    token = torch.arange(6)[None]
    q, k, v = (t.requires_grad_() for t in inputs(2, 6))
    arguments = (q, k, v, (token - 2).clamp(min=0), token, 0.5)
    torch.library.opcheck(torch.ops.glade.interval_attention.default, arguments)


@pytest.mark.parametrize("N", [256, 1024])
def test_memory_of_a_window_does_not_grow_with_the_row(N) -> None:
    """No operation of forward or backward takes more than a block of scores or the three gradients it returns."""
    window = 16
    q, k, v = (x.requires_grad_() for x in inputs(1, N, 4, 4, 8, 8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        attention(q, k, v, window=window, return_state=False)[0].sum().backward()
    block = 4 * intervals.BLOCK * (intervals.BLOCK + window) * 4
    assert max(event.cpu_memory_usage for event in recorded.events() or []) <= max(block, 3 * q.nbytes)


def test_documents_with_long_pasts_do_not_look_at_each_other_s() -> None:
    """A few new tokens for each of many long histories: the scores held are one document's, not all against all."""
    state = state_after([500] * 8, None)
    tensors, cu_seqlens = inputs(1, 32), borders([4] * 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        attention(*tensors, state=state, cu_seqlens=cu_seqlens, return_state=False)
    all_against_all = 4 * 32 * 8 * 504 * 4
    assert max(event.cpu_memory_usage for event in recorded.events() or []) < all_against_all / 4


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_no_tokens(backend) -> None:
    for window in (None, 3):
        state = state_after([4, 2], window)
        o, after = attention(*inputs(2, 0), window=window, state=state, backend=backend)
        assert o.shape == (2, 0, 4, 5)
        assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
        o, after = attention(*inputs(2, 0), window=window, backend=backend)
        assert after.k.shape == (2, window or 0, 2, 6)
        assert after.length.tolist() == [0, 0]
        o, after = attention(*inputs(1, 0), window=window, cu_seqlens=torch.tensor([0]), backend=backend)
        assert o.shape == (1, 0, 4, 5)
        assert after.length.shape == (0,)


def test_reserve_keeps_what_is_there() -> None:
    state = state_after([4, 2], None)
    roomy = reserve(state, 9)
    assert roomy.k.shape[1] == 9
    assert torch.equal(roomy.k[:, :4], state.k)
    assert (roomy.v[:, 4:] == 0).all()
    roomy.length.add_(1)
    assert state.length.tolist() == [4, 2]
    assert reserve(roomy, 3) is roomy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 6)}, r"shapes \[\[2, 5, 6\]"),
        ({"q": torch.zeros(2, 4, 4, 6)}, "B and T must agree"),
        ({"v": torch.zeros(2, 5, 4, 5)}, "HKV of k and v"),
        ({"q": torch.zeros(2, 5, 3, 6)}, "q has 3 heads, not a multiple of k's 2"),
        ({"q": torch.zeros(2, 5, 4, 6, dtype=torch.int64)}, "q, k, v are torch.int64"),
        ({"window": 0}, "window is 0; give at least 1"),
        ({"score": "cosine"}, "score is 'cosine'"),
        ({"score_weight": torch.zeros(6, 6)}, "score 'dot' has no weight"),
        ({"score": "multiplicative"}, r"was given NoneType; give W \[6, 6\] or \[4, 6, 6\]"),
        ({"score": "multiplicative", "score_weight": torch.zeros(5, 6)}, r"was given \[5, 6\]"),
        ({"score": "additive", "score_weight": torch.zeros(6, 6)}, "was given Tensor; give an AdditiveWeight"),
        (
            {"score": "additive", "score_weight": additive(5)},
            r"shapes \[\[3, 5\], \[3, 5\], \[3\]\]; give w_q \[A, 6\]",
        ),
        ({"state": empty_state(3, 4, 2, 6, 5)}, r"state.k has shape \[3, 4, 2, 6\]; give \[2, 4, 2, 6\]"),
        ({"state": empty_state(2, 4, 2, 6, 5), "window": 5}, r"state.k has shape .* give \[2, 5, 2, 6\]"),
        ({"state": empty_state(2, 4, 2, 6, 6)}, r"state.v has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "the batch is 2"),
    ],
)
def test_errors_say_what_was_given(change, message) -> None:
    q, k, v = inputs(2, 5)
    call = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(ValueError, match=message):
        attention(**call)


@pytest.mark.parametrize("wrong", [[0, 4], [1, 5], [0, 4, 3, 5]])
def test_borders_that_do_not_fit(wrong) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(*inputs(1, 5), cu_seqlens=torch.tensor(wrong), return_state=False)


def test_a_ring_is_no_state_for_attention_without_a_window() -> None:
    state = state_after([9], 4)
    with pytest.raises(ValueError, match="seen 9 tokens but holds 4: it is the ring of a window of 4"):
        attention(*inputs(1, 2), state=state)


def test_an_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(BackendError, match=r"no backend 'flash'.*'reference', 'torch'"):
        attention(*inputs(1, 2), backend="flash")
