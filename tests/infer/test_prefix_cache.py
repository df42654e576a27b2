"""The prefix cache: what it finds is what would have been computed, its bytes are counted, the oldest goes first."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glade.infer.config import SamplingParams
from glade.infer.engine import Delta, Engine, Request
from glade.infer.prefix_cache import PrefixCache
from glade.infer.rows import growing_layers
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.model.mixers.rnn import RnnState
from glade.model.state import State
from glade.ops.tolerances import TOLERANCES, relative_error

VOCAB = 61
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "gdn2": {"mixer": "gdn2"},
    "hybrid": {"layers": "gdn softmax swa", "window": 3, "num_layers": 3},
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "num_layers": 2, "dim": 32, "init_std": 0.3, "tie_embeddings": False}
    return LanguageModel(ModelConfig(**(config | MODELS[name]))).to(dtype).eval()


def state_of(model: LanguageModel, tokens: list[int]) -> State:
    return model(torch.tensor([tokens]))[1]


def same(a: State, b: State) -> bool:
    """Both hold the same numbers, growing layers without the room that is not written."""
    length = int(a.position)
    pairs = [
        (x[:, :length], y[:, :length]) if x.dim() == 4 and field in "kv" else (x, y)
        for one, other in zip(a.layers, b.layers, strict=True)
        for field, x, y in zip(one._fields, one, other, strict=True)
    ]
    return a.position.equal(b.position) and all(
        relative_error(x, y) <= TOLERANCES[torch.float64].value for x, y in pairs
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_is_what_was_put_in(name: str) -> None:
    """Also where snapshots share keys and values, and after an edge between two of them was cut."""
    model = model_of(name, torch.float64)
    cache = PrefixCache(2**24, growing_layers(model))
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 3], [7], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
    for text in texts:
        cache.add(text, state_of(model, text))
    assert len(cache) == len(texts)
    for text in texts:
        for asked in (text, [*text, 60], [*text, 60, 1, 2, 3]):
            found = cache.find(asked)
            assert found.state is not None and found.length == len(text) == found.shared
            assert same(found.state, state_of(model, text))
    assert cache.find([1, 2, 8])[1:] == (0, 2)
    assert cache.find([1, 2, 3, 4, 5, 60])[1:] == (4, 5)
    assert cache.find([2]) == (None, 0, 0)
    assert cache.find([]) == (None, 0, 0)


def test_every_byte_is_counted_and_given_back() -> None:
    model = model_of("hybrid")
    cache = PrefixCache(2**24, growing_layers(model))
    whole, part, other = [1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 7]
    cache.add(whole, state_of(model, whole))
    # the constant layers, and for each token its id, its key and its value
    constant = model.init_state(1).nbytes
    per_token = 8 + sum(
        layer.k[0, 0].nbytes + layer.v[0, 0].nbytes
        for layer, grows in zip(state_of(model, [1]).layers, cache.growing, strict=True)
        if grows
    )
    assert cache.nbytes == constant + 6 * per_token
    cache.add(whole, state_of(model, whole))
    assert cache.nbytes == constant + 6 * per_token
    cache.add(part, state_of(model, part))
    assert cache.nbytes == 2 * constant + 6 * per_token
    cache.add(other, state_of(model, other))
    assert cache.nbytes == 3 * constant + 7 * per_token
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)
    assert cache.find(whole) == (None, 0, 0)


def small(value: int) -> State:
    """The state of a model whose only memory is one number."""
    return State((RnnState(torch.tensor([[float(value)]])),), torch.tensor([value]))


def test_the_least_recently_used_goes_first() -> None:
    size = small(0).nbytes + 8
    cache = PrefixCache(3 * size, [False])
    for token in (1, 2, 3):
        cache.add([token], small(token))
    assert cache.find([1, 5]).length == 1
    cache.add([4], small(4))
    assert [cache.find([token]).length for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    cache.add([1], small(1))
    cache.add([5], small(5))
    assert [cache.find([token]).length for token in (1, 2, 3, 4, 5)] == [1, 0, 0, 1, 1]
    assert cache.nbytes == 3 * size
    assert (cache.hits, cache.misses) == (7, 3)


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = PrefixCache(small(0).nbytes + 8 * 3 - 1, [False])
    cache.add([1, 2, 3], small(3))
    assert (len(cache), cache.nbytes) == (0, 0)
    cache.add([1, 2], small(2))
    assert len(cache) == 1
    nothing = PrefixCache(0, [False])
    nothing.add([1], small(1))
    assert len(nothing) == 0


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=7)), max_size=40),
    st.integers(0, 12),
)
def test_it_is_a_bounded_dictionary_of_prefixes(actions: list[tuple[bool, list[int]]], places: int) -> None:
    """Against the definition: a list of texts in the order of use, the longest that begins the one asked for."""
    cache = PrefixCache(places * (small(0).nbytes + 8 * 7), [False])
    kept: list[tuple[int, ...]] = []
    for number, (adds, tokens) in enumerate(actions):
        if adds:
            cache.add(tokens, small(len(tokens)))
            text = tuple(tokens)
            if text and text in kept:
                kept.remove(text)
                kept.append(text)
            elif text and places:
                kept.append(text)
            # what was thrown out is known by asking without using
            alive = {tuple(_text(node)) for node in cache._used}
            assert alive <= set(kept)
            gone = [each for each in kept if each not in alive]
            assert gone == kept[: len(gone)], number
            kept = [each for each in kept if each in alive]
        else:
            found = cache.find(tokens)
            best = max((each for each in kept if tuple(tokens[: len(each)]) == each), key=len, default=())
            assert found.length == len(best)
            assert (found.state is None) == (not best)
            if best:
                assert found.state is not None and int(found.state.position) == len(best)
                kept.remove(best)
                kept.append(best)
        assert cache.nbytes <= cache.max_bytes
        assert cache.nbytes == _counted(cache)


def _text(node: Any) -> list[int]:
    return [] if node.parent is None else [*_text(node.parent), *node.tokens]


def _counted(cache: PrefixCache) -> int:
    """Bytes by walking the whole tree; an edge that leads to no snapshot fails."""

    def below(node: Any) -> int:
        assert node is cache._root or node.snapshot is not None or node.children
        own = 0 if node.snapshot is None else node.snapshot.nbytes
        return own + node.edge_bytes + sum(map(below, node.children.values()))

    return below(cache._root)


def serve(engine: Engine, prompt: list[int], **params: Any) -> tuple[list[int], int]:
    """The ids of an answer, and how much of the prompt was not read."""
    deltas: list[Delta] = []
    settings = {"max_new_tokens": 6, "temperature": 0.0} | params
    engine.submit(Request(prompt=tuple(prompt), params=SamplingParams(**settings)), deltas.append)
    while engine.step():
        pass
    return [delta.token_id for delta in deltas], deltas[0].cached_tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_whose_history_grows_reads_each_turn_once(name: str) -> None:
    """The same tokens as without a cache, turn after turn, and nothing of the turns before read again."""
    model = model_of(name, torch.float64)
    engine, plain = Engine(model, max_batch=2, prefill_tokens=8), Engine(model, max_batch=2, cache_bytes=0)
    history = [1, 2, 3, 4]
    for turn in range(6):
        ids, cached = serve(engine, history)
        assert (ids, 0) == serve(plain, history)
        assert cached == (len(history) - 4 if turn else 0)
        history += [*ids, 50 + turn, 7, 8]
    # the whole conversation again, and one that leaves it in the middle
    assert serve(engine, history[:-3])[1] >= len(history) - 3 - 7
    other = [*history[:20], 59, 59, 59]
    assert serve(engine, other)[0] == serve(plain, other)[0]
    assert engine.stats().cache_bytes > 0 and plain.stats().cache_bytes == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_after_a_cached_prefix_are_those_of_reading_it_all(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    prompt = torch.randint(VOCAB, (41,)).tolist()
    engine = Engine(model, max_batch=2, prefill_tokens=16)
    serve(engine, prompt[:30])
    serve(engine, [*prompt[:36], 1, 2])
    found = engine._cache.find(prompt)
    assert found.state is not None and found.length >= 29
    cached, _ = model(torch.tensor([prompt[found.length :]]), found.state, logits="last")
    whole, _ = model(torch.tensor([prompt]), logits="last")
    assert relative_error(cached, whole) <= TOLERANCES[dtype].value


def test_a_prefix_that_several_prompts_share_is_kept_where_they_part() -> None:
    """A system text shorter than a chunk: the second prompt finds the place, the third goes on from it."""
    engine = Engine(model_of("gdn2"), max_batch=2, prefill_tokens=64)
    system = list(range(20))
    assert [serve(engine, [*system, 30 + i, 40, 41])[1] for i in range(4)] == [0, 0, 20, 20]


def test_snapshots_are_taken_every_chunk_of_a_long_prompt() -> None:
    engine = Engine(model_of("gdn2"), max_batch=1, prefill_tokens=8)
    prompt = torch.randint(VOCAB, (50,)).tolist()
    serve(engine, prompt)
    assert [engine._cache.find(prompt[:length]).length for length in (7, 8, 23, 24, 40, 48, 49)] == [
        *(0, 8, 16, 24, 40, 48, 49)
    ]


def test_requests_that_bring_a_state_neither_use_nor_feed_the_cache() -> None:
    model = model_of("gdn2")
    engine = Engine(model, max_batch=1)
    serve(engine, [1, 2, 3])
    before = engine.stats()
    deltas: list[Delta] = []
    state = state_of(model, [9, 9])
    request = Request(prompt=(1, 2, 3), params=SamplingParams(max_new_tokens=4, temperature=0), state=state)
    engine.submit(request, deltas.append)
    while engine.step():
        pass
    assert deltas[0].cached_tokens == 0
    assert engine.stats().cached_prefixes == before.cached_prefixes


@pytest.mark.parametrize("name", ["gdn2", "hybrid"])
def test_a_small_cache_stays_within_its_bytes_and_right(name: str) -> None:
    model = model_of(name, torch.float64)
    bound = 3 * model.state_bytes(40)
    engine, plain = Engine(model, max_batch=2, cache_bytes=bound, prefill_tokens=8), Engine(model, cache_bytes=0)
    generator = torch.Generator().manual_seed(0)
    stems = [torch.randint(VOCAB, (12,), generator=generator).tolist() for _ in range(3)]
    for turn in range(12):
        prompt = [*stems[turn % 3], *torch.randint(VOCAB, (turn,), generator=generator).tolist()]
        assert serve(engine, prompt)[0] == serve(plain, prompt)[0]
        assert engine.stats().cache_bytes <= bound
