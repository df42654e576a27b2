"""Steps launched before the tokens of those before them are handed over: nothing of the step too many is ever seen.

A GPU's recorded step is stood for by one that computes on the CPU, when it is launched and row by row: what it does to
the states is then what a GPU's stream does, in the same order, and a row's bits do not depend on the rows beside it.
"""

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from glade.infer import slots as slots_module
from glade.infer.config import SamplingParams
from glade.infer.endings import Endings
from glade.infer.engine import Delta, Engine, Request, Ticket
from glade.infer.generate import generate_ids
from glade.infer.rows import growing_layers, put, rest_
from glade.infer.sampler import Rules
from glade.infer.slots import Slots
from glade.infer.step import decode_step
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.model.state import State

VOCAB = 29
MODELS: dict[str, dict[str, Any]] = {
    "gdn2": {"mixer": "gdn2"},
    "rnn": {"mixer": "rnn"},
    "hybrid": {"layers": "gdn softmax swa", "window": 3, "num_layers": 3},
    "positions": {"mixer": "softmax", "learned_positions": 40, "rope": False},
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "num_layers": 2, "dim": 32, "init_std": 0.3, "tie_embeddings": False}
    return LanguageModel(ModelConfig(**(config | MODELS[name]))).to(dtype).eval()


class Recorded:
    """What `decode_step` and `Program` are to `Slots` where a GPU decodes."""

    path, reason = "captured", ""

    def __init__(self, model: LanguageModel) -> None:
        self._step, self._growing = decode_step(model), growing_layers(model)
        self.launched: list[list[int]] = []  # of each step, the rows of the state table it worked on
        self.fails = False

    @property
    def captured(self) -> "Recorded":
        return self

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bind(self, state: State) -> object:
        return state.layers

    def enqueue(self, ids: Tensor, state: State, slots: Tensor, live: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("out of luck")
        self.launched.append(slots[live > 0].tolist())
        logits = torch.cat([self._one(ids[i : i + 1], state, slot) for i, slot in enumerate(slots.tolist())])
        rest_(state, slots[live == 0])
        return logits

    def _one(self, id: Tensor, state: State, slot: int) -> Tensor:
        """In whatever row it is told: the spare one has no meaning, but it is there. No room is made here."""
        row = state.select([slot])
        logits = self._step(id, row)
        put(state, slot, row, self._growing)
        return logits

    def drawing(self, rules: Rules, most_tops: int) -> Callable[..., Tensor] | None:
        return None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines decode as on a GPU."""
    monkeypatch.setattr(slots_module, "decode_step", Recorded)


def program(engine: Engine) -> Recorded:
    assert isinstance(engine._slots._decode, Recorded)
    return engine._slots._decode


class Answer:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ticket: Ticket | None = None
        self.cancel_at: int | None = None
        self.ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert self.finished is None, "a delta after the last one"
        self.deltas.append(delta)
        if len(self.ids) == self.cancel_at and self.ticket is not None:
            self.ticket.cancel()
        if delta.finished:
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [delta.token_id for delta in self.deltas if delta.token_id >= 0]

    @property
    def finished(self) -> str | None:
        return self.deltas[-1].finished if self.deltas else None

    @property
    def said(self) -> list[tuple[object, ...]]:
        """All that was said of the tokens, to the bit."""
        return [(delta.token_id, delta.logprob, delta.top, delta.finished) for delta in self.deltas]


def ask(engine: Engine, prompt: Sequence[int], params: SamplingParams, **rest: Any) -> Answer:
    answer = Answer()
    answer.ticket = engine.submit(Request(prompt=tuple(prompt), params=params, **rest), answer)
    return answer


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def alike(a: State, b: State) -> bool:
    tensors = [(state.position, *(x for layer in state.layers for x in layer)) for state in (a, b)]
    return all(x.equal(y) for x, y in zip(*tensors, strict=True))


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_handed_over(recorded: None) -> None:
    engine = Engine(model_of("gdn2"), max_batch=4)
    launched: list[int] = []

    def listen(delta: Delta) -> None:
        launched.append(len(program(engine).launched))

    for _ in range(3):
        engine.submit(Request(prompt=(1, 2), params=SamplingParams(max_new_tokens=5, seed=1)), listen)
    run(engine)
    # and no step for nobody: lengths are known
    assert launched == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_an_ended_answer_leaves_is_what_it_has_read(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that end by length or by a stop id beside others that go on: their states, and the answers that go on
    from the cache, are to the bit those of an engine that takes one step at a time."""
    model = model_of(name)

    def talk() -> list[Answer]:
        """Prompts of one token, so that no chunk of prompts is shared; then each text goes on, from the cache."""
        engine = Engine(model, max_batch=3, deterministic=deterministic, prefill_tokens=4)
        first = [
            ask(
                engine,
                [i],
                SamplingParams(max_new_tokens=4 + i % 5, seed=i, logprobs=i % 3, repetition_penalty=1 + i % 2),
                stop_ids=frozenset(range(7 * (i % 2))),
                keep_state=True,
            )
            for i in range(12)
        ]
        run(engine)
        second = [
            ask(engine, [i, *answer.ids[:-1], 7], SamplingParams(max_new_tokens=3, seed=i, logprobs=2), keep_state=True)
            for i, answer in enumerate(first)
        ]
        run(engine)
        if not deterministic:
            assert all(x.deltas[0].cached_tokens == len(y.ids) for x, y in zip(second, first, strict=True))
        return [*first, *second]

    expected = talk()
    assert {answer.finished for answer in expected} == {"length", "eos"}
    monkeypatch.setattr(slots_module, "decode_step", Recorded)
    for answer, other in zip(talk(), expected, strict=True):
        assert answer.said == other.said
        state, other_state = answer.deltas[-1].state, other.deltas[-1].state
        assert state is not None and other_state is not None and alike(state, other_state)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_requests_at_random_are_answered_as_alone(name: str, deterministic: bool, recorded: None) -> None:
    """Prompts, lengths, stop ids, rules, cancels and arrivals at random; states handed on; a cache that evicts."""
    # fp64: packed prompts differ in their last bits, and no draw hangs on those
    model = model_of(name, torch.float64)
    engine = Engine(model, max_batch=4, prefill_tokens=4, cache_bytes=2**18, deterministic=deterministic)
    chance = random.Random(0)
    asked: list[tuple[Answer, list[int], SamplingParams, frozenset[int]]] = []
    goes_on: list[tuple[State, list[int]]] = []
    for turn in range(30):
        prompt = [chance.randrange(3) for _ in range(chance.choice([1, 1, 2, 7]))]
        read: list[int] = []
        rest: dict[str, Any] = {}
        if goes_on and chance.random() < 0.3:
            rest["state"], read = goes_on.pop()
        elif asked and chance.random() < 0.3:
            answer, before, *_ = chance.choice(asked)
            prompt = [*before, *answer.ids, *prompt][:20]
        params = SamplingParams(
            max_new_tokens=chance.randrange(1, 12),
            seed=turn,
            temperature=chance.choice([0.0, 1.0]),
            top_p=chance.choice([0.9, 1.0]),
            logprobs=chance.randrange(3),
        )
        stop_ids = frozenset(chance.sample(range(VOCAB), chance.choice([0, 1, 2, 5])))
        answer = ask(engine, prompt, params, stop_ids=stop_ids, keep_state=True, **rest)
        answer.cancel_at = chance.choice([None, None, 1, 3])
        asked.append((answer, [*read, *prompt], params, stop_ids))
        for _ in range(chance.randrange(4)):
            engine.step()
        for answer, before, *_ in asked[-4:]:
            if (
                answer.finished
                and (state := answer.deltas[-1].state) is not None
                and len(before) + len(answer.ids) < 15
            ):
                goes_on.append((state, [*before, *answer.ids[:-1]]))
    run(engine)
    for answer, prompt, params, stop_ids in asked:
        whole = generate_ids(model, [prompt], params)[0]
        stopped = next((i for i, id in enumerate(whole) if id in stop_ids), None)
        if answer.finished == "cancelled":
            assert answer.ids == whole[: answer.cancel_at]
            continue
        assert answer.ids == (whole if stopped is None else whole[: stopped + 1])
        assert answer.finished == ("length" if stopped is None else "eos")
        state, expected = answer.deltas[-1].state, model(torch.tensor([[*prompt, *answer.ids[:-1]]]))[1]
        assert state is not None and state.position.equal(expected.position)
        for layer, wanted in zip(state.layers, expected.layers, strict=True):
            for x, y in zip(layer, wanted, strict=True):
                same = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
                torch.testing.assert_close(x[same], y[same])
    stats = engine.stats()
    assert (stats.running, stats.prefilling, stats.waiting) == (0, 0, 0)
    assert stats.generated_tokens == sum(len(answer.ids) for answer, *_ in asked)
    assert {answer.finished for answer, *_ in asked} == {"length", "eos", "cancelled"}


def test_a_slot_s_next_answer_hears_nothing_of_the_one_before(recorded: None) -> None:
    """One slot: cancelled, ended by a stop id, and ended by length, while a step of theirs is under way."""
    model = model_of("gdn2", torch.float64)
    engine = Engine(model, max_batch=1)
    params = [SamplingParams(max_new_tokens=6, seed=seed) for seed in range(4)]
    whole = [generate_ids(model, [[seed, 1]], params[seed])[0] for seed in range(4)]
    stops = [frozenset[int](), frozenset({whole[1][2]}), frozenset[int](), frozenset[int]()]
    answers = [ask(engine, [seed, 1], params[seed], stop_ids=stops[seed]) for seed in range(4)]
    answers[0].cancel_at = 2
    run(engine)
    assert [answer.finished for answer in answers] == ["cancelled", "eos", "length", "length"]
    assert [answer.ids for answer in answers] == [whole[0][:2], whole[1][: whole[1].index(whole[1][2]) + 1], *whole[2:]]


def test_tokens_do_not_wait_for_a_prompt_to_be_read(recorded: None) -> None:
    """All that was drawn is handed over before a chunk of a prompt is read, and everybody gets a token a step."""
    model = model_of("gdn2")
    engine = Engine(model, max_batch=2, prefill_tokens=8, cache_bytes=0)
    running = ask(engine, (1, 2), SamplingParams(max_new_tokens=30, seed=0))
    engine.step()
    ask(engine, [3] * 81, SamplingParams(max_new_tokens=2, seed=0))
    handed_over: list[int] = []
    model.register_forward_pre_hook(lambda *_: handed_over.append(len(running.ids)))
    for _ in range(10):
        engine.step()
    assert handed_over == list(range(1, 11)) and program(engine).launched[:10] == [[0]] * 10


def test_the_spare_row_never_runs_full(recorded: None, caplog: pytest.LogCaptureFixture) -> None:
    """More answers stop by themselves than the model has positions."""
    engine = Engine(model_of("positions"), max_batch=2, prefill_tokens=8)
    params = SamplingParams(max_new_tokens=30, temperature=0)
    answers = [ask(engine, (1,), params, stop_ids=frozenset(range(VOCAB))) for _ in range(90)]
    run(engine)
    assert {(len(answer.ids), answer.finished) for answer in answers} == {(1, "eos")} and not caplog.text


def test_a_launch_that_fails_takes_nothing_back(recorded: None, caplog: pytest.LogCaptureFixture) -> None:
    """The tokens of the step before are handed over, endings included; then what runs ends."""
    engine = Engine(model_of("gdn2"), max_batch=2)
    short = ask(engine, (1, 2), SamplingParams(max_new_tokens=2, seed=0), keep_state=True)
    long = ask(engine, (1, 2), SamplingParams(max_new_tokens=9, seed=0))
    engine.step()
    engine.step()
    program(engine).fails = True
    engine.step()
    assert (short.finished, short.deltas[-1].state is None) == ("length", False)
    assert long.finished == "error" and long.ids == short.ids
    assert "the decode step failed: out of luck" in str(long.deltas[-1].error)
    program(engine).fails = False
    after = ask(engine, (1, 2), SamplingParams(max_new_tokens=2, seed=0))
    run(engine)
    assert after.said == short.said and "a decode step failed" in caplog.text


def test_keys_and_values_stay_within_their_bytes(recorded: None) -> None:
    """With the spare row, and the longest answer there is."""
    model = model_of("hybrid")
    per_token = sum(x[0, :1].nbytes for x in model(torch.tensor([[1]]))[1].layers[1][:2])
    engine = Engine(model, max_batch=2, max_state_bytes=3 * 40 * per_token + 7)
    assert engine.max_tokens == 40
    longest = ask(engine, [1] * 30, SamplingParams(max_new_tokens=11, seed=0))
    ask(engine, [1] * 3, SamplingParams(max_new_tokens=30, seed=0))
    run(engine)
    assert longest.ids == generate_ids(model, [[1] * 30], SamplingParams(max_new_tokens=11, seed=0))[0]
    assert sum(x.nbytes for x in engine._slots.state.layers[1][:2]) == 3 * 40 * per_token


def test_logits_that_are_not_finite_end_their_request_alone(recorded: None) -> None:
    model = model_of("gdn2", torch.float64)
    poisoned = model.init_state(1)
    poisoned.layers[0].recurrent.fill_(float("nan"))
    engine = Engine(model, max_batch=2)
    params = SamplingParams(max_new_tokens=4, seed=0, top_p=0.9)
    bad, good = ask(engine, (1, 2), params, state=poisoned), ask(engine, (1, 2), params)
    run(engine)
    after = [ask(engine, (1, 2), params) for _ in range(2)]
    run(engine)
    assert bad.finished == "error" and bad.ids == []
    assert good.ids == after[0].ids == after[1].ids == generate_ids(model, [(1, 2)], params)[0]


def test_an_engine_whose_model_can_be_recorded_no_more_loses_no_token(recorded: None) -> None:
    model = model_of("gdn2", torch.float64)
    engine = Engine(model, max_batch=2)
    params = [SamplingParams(max_new_tokens=5 + 4 * seed, seed=seed) for seed in range(3)]
    answers = [ask(engine, (1, 2), p) for p in params[:2]]
    for _ in range(3):
        engine.step()
    engine._slots._decode = decode_step(model)
    # who sits where is asked anew when the first one ends
    for _ in range(4):
        engine.step()
    answers.append(ask(engine, (1, 2), params[2]))
    run(engine)
    assert [answer.ids for answer in answers] == [generate_ids(model, [(1, 2)], p)[0] for p in params]


def test_closing_ends_what_is_under_way(recorded: None) -> None:
    engine = Engine(model_of("gdn2"), max_batch=2)
    answers = [ask(engine, (1, 2), SamplingParams(max_new_tokens=9, seed=i)) for i in range(3)]
    for _ in range(3):
        engine.step()
    engine.close()
    assert [answer.finished for answer in answers] == ["cancelled"] * 3
    assert [len(answer.ids) for answer in answers] == [2, 2, 0] and not engine.step()


def test_threads_that_submit_and_cancel(recorded: None) -> None:
    """With the engine in a thread of its own: every answer that was not cancelled is that of the request alone."""
    model = model_of("gdn2", torch.float64)
    expected = {i: generate_ids(model, [(i, 1)], SamplingParams(max_new_tokens=8, seed=i))[0] for i in range(6)}
    answers: list[tuple[int, Answer]] = []

    def client(number: int) -> None:
        for turn in range(6):
            i = (number + turn) % 6
            answer = Answer()
            answer.cancel_at = 3 if (number + turn) % 4 == 0 else None
            params = SamplingParams(max_new_tokens=8, seed=i)
            answer.ticket = engine.submit(Request(prompt=(i, 1), params=params), answer)
            answers.append((i, answer))
            assert answer.ended.wait(60)

    with Engine(model, max_batch=3) as engine:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(answers) == 30
    for i, answer in answers:
        # a cancel may come a few tokens late: the listener that asks for it is called in the middle of a step
        whole = expected[i][: len(answer.ids)] if answer.finished == "cancelled" else expected[i]
        assert answer.ids == whole and (answer.finished == "length" or answer.cancel_at is not None)


def test_slots_without_an_engine_take_one_step_at_a_time(recorded: None) -> None:
    slots = Slots(model_of("gdn2"), 2)
    slots.fill(0, None, 1, SamplingParams(max_new_tokens=1, temperature=0), seed=0)
    assert [len(slots.step()) for _ in range(3)] == [1, 1, 1] and len(slots.state) == 2


def test_slots_step_aside_at_their_end() -> None:
    endings = Endings(3, torch.device("cpu"))
    slots = torch.tensor([2, 0, 1])
    assert endings.places(slots).tolist() == [2, 0, 1]
    for slot, stop_ids in enumerate([(), (4, 5, 6), (8,)]):
        endings.begin(slot, 10, stop_ids)
    endings.step_aside_(slots, torch.tensor([5, 6, 3]), torch.tensor([7, 8, 9]))
    assert endings.places(slots).tolist() == [2, 0, 1]
    endings.step_aside_(slots, torch.tensor([8, 8, 6]), torch.tensor([8, 9, 9]))
    assert endings.places(slots).tolist() == [3, 0, 3]
    # for good, until another answer begins
    endings.step_aside_(slots, torch.tensor([1, 1, 1]), torch.tensor([0, 10, 0]))
    assert endings.places(slots).tolist() == [3, 3, 3]
    endings.begin(1, 10, ())
    assert endings.places(slots).tolist() == [3, 3, 1]
