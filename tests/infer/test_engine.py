"""The engine against sequences decoded alone: neighbours, chunks, slots, endings, faults, threads, memory."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glade.errors import CheckpointError, ConfigError, DataError, GladeError
from glade.infer.config import SamplingParams
from glade.infer.engine import Busy, Delta, Engine, Request, Ticket
from glade.infer.generate import generate_ids
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.model.state import State

VOCAB = 61
# equal ones, one that begins another, one of a single token, and several longer than the chunks below
PROMPTS = [
    (5, 9, 1),
    (7,),
    (3, 3, 8, 60, 0, 2, 17, 21, 4),
    (5, 9, 1),
    tuple(range(30)),
    (*range(25), 3, 4),
    tuple(range(20)),
]
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "swa": {"mixer": "swa", "window": 4},
    "gdn2": {"mixer": "gdn2"},
    "rnn": {"mixer": "rnn"},
    "hybrid": {"layers": "gdn softmax swa", "window": 3, "num_layers": 3},
    "positions": {"mixer": "softmax", "learned_positions": 64, "rope": False},
}


def model_of(name: str = "gdn2", dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    # untied and with wide weights, so that the model does not say one token over and over
    config = {"vocab_size": VOCAB, "num_layers": 2, "dim": 32, "init_std": 0.3, "tie_embeddings": False}
    return LanguageModel(ModelConfig(**(config | MODELS[name]))).to(dtype).eval()


class Answer:
    """Keeps the deltas of one request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert not self.ended.is_set(), "a delta after the last one"
        self.deltas.append(delta)
        if delta.finished:
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [delta.token_id for delta in self.deltas if delta.token_id >= 0]

    @property
    def finished(self) -> str | None:
        return self.deltas[-1].finished if self.deltas else None


def ask(engine: Engine, prompt: Sequence[int], params: SamplingParams, **rest: Any) -> Answer:
    answer = Answer()
    engine.submit(Request(prompt=tuple(prompt), params=params, **rest), answer)
    return answer


def run(engine: Engine, most: int = 10_000) -> int:
    """Steps until there is nothing to do; how many."""
    for steps in range(most):
        if not engine.step():
            return steps
    raise AssertionError("the engine does not come to an end")


def alone(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    return generate_ids(model, [prompt], params)[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"max_batch": 4},
        {"max_batch": 4, "deterministic": True, "prefill_tokens": 8},
        {"max_batch": 3, "prefill_tokens": 4},
        {"max_batch": 2, "cache_bytes": 0},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_is_that_of_the_request_alone(name: str, setting: dict[str, Any]) -> None:
    """Twice over, so that the second time the cache has something to say."""
    model = model_of(name)
    engine = Engine(model, **setting)
    rules = [
        {"temperature": 0.0},
        {"top_p": 0.9, "repetition_penalty": 1.3},
        {"top_k": 5, "logprobs": 2},
        {"min_p": 0.05, "logprobs": 4},
    ]
    params = [SamplingParams(max_new_tokens=6 + i, seed=3 + i, **rules[i % len(rules)]) for i in range(len(PROMPTS))]
    expected = [alone(model, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    for _ in range(2):
        answers = [ask(engine, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
        run(engine)
        assert [answer.ids for answer in answers] == expected
        assert {answer.finished for answer in answers} == {"length"}
        for answer, p in zip(answers, params, strict=True):
            assert {len(delta.top) for delta in answer.deltas} == {p.logprobs}
            assert sum(delta.finished is not None for delta in answer.deltas) == 1
    stats = engine.stats()
    assert (stats.running, stats.prefilling, stats.waiting) == (0, 0, 0)
    assert stats.generated_tokens == 2 * sum(map(len, expected))
    assert stats.prompt_tokens == 2 * sum(map(len, PROMPTS))


def test_logprobs_are_the_model_s_whatever_the_rules() -> None:
    model = model_of()
    engine = Engine(model, max_batch=2)
    answer = ask(engine, PROMPTS[2], SamplingParams(max_new_tokens=5, seed=1, temperature=2.0, top_k=9, logprobs=3))
    run(engine)
    logits, _ = model(torch.tensor([[*PROMPTS[2], *answer.ids]]))
    expected = logits[0].log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    for delta, row in zip(answer.deltas, expected, strict=True):
        assert delta.logprob == pytest.approx(row[delta.token_id].item(), abs=1e-5)
        assert [id for id, _ in delta.top] == row.topk(3).indices.tolist()


class Witness(LanguageModel):
    """A model that counts the tokens it reads, call by call."""

    def watch(self) -> "Witness":
        self.calls: list[tuple[str, int]] = []
        return self

    def forward(self, ids: Tensor, *args: Any, **options: Any) -> Any:
        self.calls.append(("read", ids.numel()))
        return super().forward(ids, *args, **options)

    def step_(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        self.calls.append(("step", len(ids)))
        return super().step_(ids, state, slots)


def witness() -> Witness:
    plain = model_of()
    model = Witness(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    return model.watch()


@pytest.mark.parametrize("name", ["gdn2", "swa", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["fastest", "torch"])
def test_deterministic_bits_do_not_depend_on_the_neighbours(name: str, dtype: torch.dtype, path: str) -> None:
    """The same request alone, and in a full, changing batch, in another slot, after others filled the cache."""
    model = model_of(name, dtype)
    params = SamplingParams(max_new_tokens=10, seed=5, top_p=0.95)
    prompt = PROMPTS[4]

    def bits(neighbours: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[Tensor]:
        """The logits that each of the answer's tokens was drawn from."""
        engine = Engine(model, max_batch=5, prefill_tokens=8, deterministic=True)
        step = engine._slots._decode if path == "fastest" else model.step_
        logits: list[Tensor] = []

        def watched(ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
            logits.append(step(ids, state, slots))
            return logits[-1].clone()

        watched.captured = None  # type: ignore[attr-defined]
        engine._slots._decode = watched  # type: ignore[assignment]
        for other in before:
            ask(engine, other, SamplingParams(max_new_tokens=4, seed=9))
        run(engine)
        for i, other in enumerate(neighbours):
            ask(engine, other, SamplingParams(max_new_tokens=3 + 2 * i, seed=i, repetition_penalty=1.2))
        drawn: list[Tensor] = []
        sat: list[int] = []

        def listen(delta: Delta) -> None:
            sat.extend(slot for slot, seq in engine._running.items() if seq.ticket is ticket)
            drawn.append(logits[-1][sat[0]].clone())

        ticket = engine.submit(Request(prompt=prompt, params=params), listen)
        run(engine)
        assert len(drawn) == 10
        return drawn

    quiet = bits([], [])
    for neighbours, before in (
        ([PROMPTS[0]], []),
        (PROMPTS[1:4], []),
        (PROMPTS, []),
        ([], [PROMPTS[5], PROMPTS[4], (*PROMPTS[4], 7, 7)]),
    ):
        busy = bits(neighbours, before)
        assert all(a.equal(b) for a, b in zip(quiet, busy, strict=True))


def test_a_long_prompt_does_not_hold_up_those_that_run() -> None:
    """While it is read, a chunk a step, everybody else gets a token a step."""
    model = witness()
    engine = Engine(model, max_batch=3, prefill_tokens=8, cache_bytes=0)
    running = [ask(engine, (1, 2), SamplingParams(max_new_tokens=30, seed=i)) for i in range(2)]
    engine.step()
    long = ask(engine, [3] * 81, SamplingParams(max_new_tokens=2, seed=0))
    model.calls.clear()
    for step in range(10):
        engine.step()
        assert model.calls[-2:] == [("read", 8), ("step", 3 if step == 9 else 2)]
        assert [len(answer.ids) for answer in running] == [step + 2, step + 2]
    assert len(long.ids) == 1


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine = Engine(model_of(), max_batch=2, prefill_tokens=8, cache_bytes=0)
    long = ask(engine, [3] * 801, SamplingParams(max_new_tokens=1, seed=0))
    short = ask(engine, [4] * 5, SamplingParams(max_new_tokens=1, seed=0))
    engine.step()
    engine.step()
    assert (short.finished, long.finished) == ("length", None)


def test_prompts_are_packed_and_equal_ones_read_once() -> None:
    model = witness()
    engine = Engine(model, max_batch=5, cache_bytes=0)
    prompts = [PROMPTS[2], PROMPTS[4], PROMPTS[2], PROMPTS[2]]
    answers = [ask(engine, prompt, SamplingParams(max_new_tokens=4, seed=i)) for i, prompt in enumerate(prompts)]
    engine.step()
    assert model.calls == [("read", 8 + 29), ("step", 4)]
    run(engine)
    assert [answer.deltas[0].cached_tokens for answer in answers] == [0, 0, 8, 8]
    assert answers[0].ids != answers[2].ids  # another seed


def test_an_answer_ends_at_a_stop_id_or_at_its_length() -> None:
    model = model_of()
    params = SamplingParams(max_new_tokens=20, seed=5)
    free = alone(model, PROMPTS[0], params)
    stop = free[4]
    engine = Engine(model, max_batch=2)
    stopped = ask(engine, PROMPTS[0], params, stop_ids=frozenset({stop}))
    longest = ask(engine, PROMPTS[0], params)
    run(engine)
    assert (stopped.ids, stopped.finished) == (free[: free.index(stop) + 1], "eos")
    assert (longest.ids, longest.finished) == (free, "length")


@pytest.mark.parametrize("name", ["gdn2", "hybrid", "positions"])
def test_a_request_goes_on_from_a_state_and_hands_its_own_over(name: str) -> None:
    model = model_of(name)
    params = SamplingParams(max_new_tokens=5, seed=3)
    engine = Engine(model, max_batch=2, prefill_tokens=4)
    first = ask(engine, PROMPTS[2], params, keep_state=True)
    run(engine)
    state = first.deltas[-1].state
    assert state is not None and int(state.position) == len(PROMPTS[2]) + 4
    assert all(delta.state is None for delta in first.deltas[:-1])
    kept = state.clone()
    more = (first.ids[-1], 8, 8, 30, 2, 9, 1)
    second = ask(engine, more, params, state=state)
    run(engine)
    assert second.ids == alone(model, (*PROMPTS[2], *first.ids[:-1], *more), params)
    assert second.deltas[0].cached_tokens == 0
    for layer, before in zip(state.layers, kept.layers, strict=True):
        assert all(a.equal(b) for a, b in zip(layer, before, strict=True))


def test_a_cancelled_request_leaves_its_slot_to_the_next() -> None:
    engine = Engine(model_of(), max_batch=1, prefill_tokens=4)
    params = SamplingParams(max_new_tokens=50, seed=0)
    answers = [Answer() for _ in range(4)]
    decoding, reading, waiting, last = (
        engine.submit(Request(prompt=PROMPTS[4] if i == 1 else PROMPTS[0], params=params), answer)
        for i, answer in enumerate(answers)
    )
    for _ in range(5):
        engine.step()
    waiting.cancel()
    decoding.cancel()
    decoding.cancel()
    engine.step()
    assert [answer.finished for answer in answers] == ["cancelled", None, "cancelled", None]
    assert engine.stats().prefilling == 1
    reading.cancel()
    engine.step()
    assert answers[1].finished == "cancelled" and answers[1].ids == []
    assert engine.stats().running + engine.stats().prefilling == 1
    run(engine)
    last.cancel()
    assert answers[3].finished == "length" and not engine.step()
    assert answers[0].deltas[-1].token_id == -1


def test_one_of_several_forks_may_be_cancelled_while_the_prompt_is_read() -> None:
    model = model_of()
    engine = Engine(model, max_batch=2, prefill_tokens=4, cache_bytes=0)
    params = SamplingParams(max_new_tokens=3, seed=0)
    gone, stays = Answer(), Answer()
    ticket = engine.submit(Request(prompt=PROMPTS[4], params=params), gone)
    engine.submit(Request(prompt=PROMPTS[4], params=params), stays)
    engine.step()
    ticket.cancel()
    run(engine)
    assert (gone.finished, stays.ids) == ("cancelled", alone(model, PROMPTS[4], params))


def test_more_requests_than_may_wait_are_told_so() -> None:
    engine = Engine(model_of(), max_batch=1, max_waiting=2)
    params = SamplingParams(max_new_tokens=2, seed=0)
    answers = [ask(engine, PROMPTS[0], params) for _ in range(3)]
    with pytest.raises(Busy, match="wait already"):
        ask(engine, PROMPTS[0], params)
    run(engine)
    assert all(answer.finished == "length" for answer in answers)
    ask(engine, PROMPTS[0], params)


def test_what_the_model_cannot_take_is_refused_at_the_door() -> None:
    engine = Engine(model_of("positions"), max_batch=2)
    params = SamplingParams(max_new_tokens=4, seed=0)
    with pytest.raises(DataError, match="token id 61 at position 1"):
        ask(engine, (0, 61), params)
    with pytest.raises(DataError, match="at least one token"):
        ask(engine, (), params)
    with pytest.raises(ConfigError, match=r"64 learned positions.*needs 65; set max_new_tokens to at most 3"):
        ask(engine, [1] * 62, params)
    with pytest.raises(CheckpointError, match="another model"):
        ask(engine, (1,), params, state=model_of("gdn2").init_state(1))
    with pytest.raises(DataError, match="state has 2 rows"):
        ask(engine, (1,), params, state=engine.model.init_state(2))
    with pytest.raises(ConfigError, match="max_batch is 0; it must be at least 1"):
        Engine(engine.model, max_batch=0)
    assert not engine.step()


def test_keys_and_values_stay_within_their_bytes() -> None:
    model = model_of("softmax", torch.float32)
    per_token = sum(2 * layer.k[0, :1].nbytes for layer in model(torch.tensor([[1]]))[1].layers)
    engine = Engine(model, max_batch=2, max_state_bytes=2 * 40 * per_token + 7)
    assert engine.max_tokens == 40
    with pytest.raises(ConfigError, match=r"40 tokens of room .*max_state_bytes.* needs 41; set max_new_tokens to at"):
        ask(engine, [1] * 30, SamplingParams(max_new_tokens=12))
    longest = ask(engine, [1] * 30, SamplingParams(max_new_tokens=11, seed=0))
    run(engine)
    assert len(longest.ids) == 11
    layers = engine._slots.state.layers
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in layers) == 2 * 40 * per_token
    with pytest.raises(ConfigError, match="give more, or a smaller max_batch"):
        Engine(model, max_batch=2, max_state_bytes=per_token)


def test_experts_cannot_be_deterministic() -> None:
    config = ModelConfig(vocab_size=VOCAB, num_layers=1, dim=32, ffn="moe", num_experts=4, experts_per_token=2)
    with pytest.raises(ConfigError, match="mixture of experts"):
        Engine(LanguageModel(config), deterministic=True)


class Faulty(LanguageModel):
    """Raises while it reads a prompt with the id 13 in it, and at a decode step of the id 60 when told to."""

    raises_at_step = False

    def forward(self, ids: Tensor, *args: Any, **options: Any) -> Any:
        if (ids == 13).any():
            raise RuntimeError("thirteen")
        return super().forward(ids, *args, **options)

    def step_(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        if self.raises_at_step:
            raise RuntimeError("out of luck")
        return super().step_(ids, state, slots)


def faulty() -> Faulty:
    plain = model_of()
    model = Faulty(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_a_prompt_that_makes_the_model_raise_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = faulty()
    engine = Engine(model, max_batch=3)
    params = SamplingParams(max_new_tokens=4, seed=0)
    answers = [ask(engine, prompt, params) for prompt in ((1, 2, 3), (1, 13, 3), (4, 5, 6))]
    run(engine)
    assert [answer.finished for answer in answers] == ["length", "error", "length"]
    assert answers[1].deltas == [Delta(-1, finished="error", error="the prompt could not be read: thirteen")]
    assert answers[2].ids == alone(model, (4, 5, 6), params)
    assert "a prompt could not be read" in caplog.text


def test_a_step_that_raises_ends_its_sequences_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    model = faulty()
    engine = Engine(model, max_batch=2)
    params = SamplingParams(max_new_tokens=4, seed=0)
    hit, later = ask(engine, (1, 2, 3), params), Answer()
    engine.step()
    model.raises_at_step = True
    engine.step()
    assert hit.finished == "error" and hit.deltas[-1].error == "the decode step failed: out of luck"
    model.raises_at_step = False
    engine.submit(Request(prompt=(1, 2, 3), params=params), later)
    run(engine)
    assert later.ids == alone(model, (1, 2, 3), params)
    assert "a decode step failed" in caplog.text


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    model = model_of()
    poisoned = model.init_state(1)
    poisoned.layers[0].recurrent.fill_(float("nan"))
    engine = Engine(model, max_batch=2)
    params = SamplingParams(max_new_tokens=4, seed=0, top_p=0.9)
    bad, good = ask(engine, (1, 2), params, state=poisoned), ask(engine, (1, 2), params)
    run(engine)
    assert bad.finished == "error" and "not finite" in str(bad.deltas[-1].error) and bad.ids == []
    # also whoever sits in the same slot afterwards
    after = [ask(engine, (1, 2), params) for _ in range(2)]
    run(engine)
    assert good.ids == after[0].ids == after[1].ids == alone(model, (1, 2), params)


def test_a_listener_that_raises_ends_its_own_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(model_of(), max_batch=2)
    params = SamplingParams(max_new_tokens=6, seed=0)
    heard: list[Delta] = []

    def broken(delta: Delta) -> None:
        heard.append(delta)
        if len(heard) == 2:
            raise KeyError("lost")

    engine.submit(Request(prompt=PROMPTS[0], params=params), broken)
    other = ask(engine, PROMPTS[0], params)
    run(engine)
    assert [delta.finished for delta in heard] == [None, None, "error"]
    assert len(other.ids) == 6 and "a listener of the engine raised" in caplog.text


def test_closing_ends_everything() -> None:
    engine = Engine(model_of(), max_batch=1, prefill_tokens=4)
    params = SamplingParams(max_new_tokens=1000, seed=0)
    answers = [ask(engine, prompt, params) for prompt in (PROMPTS[0], PROMPTS[4], PROMPTS[2])]
    engine.step()
    engine.close()
    engine.close()
    assert [answer.finished for answer in answers] == ["cancelled"] * 3
    assert engine.stats().running == engine.stats().waiting == 0
    with pytest.raises(GladeError, match="closed"):
        ask(engine, PROMPTS[0], params)
    assert not engine.step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_of(), max_batch=1)
    params = SamplingParams(max_new_tokens=1000, seed=0)
    assert not engine.alive
    answers = [ask(engine, PROMPTS[0], params) for _ in range(2)]

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "_admit", fail)
    engine.start()
    for answer in answers:
        assert answer.ended.wait(60)
        assert answer.deltas == [Delta(-1, finished="error", error="the engine failed: a bug")]
    with pytest.raises(GladeError, match="closed"):
        ask(engine, PROMPTS[0], params)
    engine.close()
    assert not engine.alive


@pytest.mark.parametrize("threaded", [True, False])
def test_a_listener_may_submit_cancel_and_close(threaded: bool) -> None:
    engine = Engine(model_of(), max_batch=2)
    params = SamplingParams(max_new_tokens=1000, seed=0)
    second = Answer()

    def listen(delta: Delta) -> None:
        first(delta)
        if len(first.deltas) == 3:
            engine.submit(Request(prompt=PROMPTS[2], params=params), second)
        if len(first.deltas) == 6:
            engine.close()

    first = Answer()
    engine.submit(Request(prompt=PROMPTS[0], params=params), listen)
    if threaded:
        engine.start()
        assert first.ended.wait(60) and second.ended.wait(60)
        engine.close()
    else:
        run(engine)
    assert first.finished == second.finished == "cancelled"


def test_many_threads_submit_and_cancel_at_random() -> None:
    """Every request gets one ending, and every answer that was not cancelled is that of the request alone."""
    model = model_of()
    params = [SamplingParams(max_new_tokens=8, seed=seed) for seed in range(4)]
    expected = {(p, i): alone(model, PROMPTS[p], params[i]) for p in range(len(PROMPTS)) for i in range(4)}
    answers: list[tuple[int, int, Answer, bool]] = []

    def client(number: int) -> None:
        for turn in range(12):
            prompt, i, cancel = (number + turn) % len(PROMPTS), turn % 4, (number + turn) % 5 == 0
            answer = Answer()
            ticket = _submit(engine, Request(prompt=PROMPTS[prompt], params=params[i]), answer)
            if cancel:
                ticket.cancel()
            answers.append((prompt, i, answer, cancel))
            if turn % 3 == 0:
                assert answer.ended.wait(60)

    with Engine(model, max_batch=4, max_waiting=8, prefill_tokens=8) as engine:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert all(answer.ended.wait(60) for _, _, answer, _ in answers)
        stats = engine.stats()
    assert len(answers) == 72 and (stats.running, stats.waiting, stats.prefilling) == (0, 0, 0)
    for prompt, i, answer, cancelled in answers:
        whole = expected[prompt, i]
        if answer.finished == "cancelled":
            assert cancelled and answer.ids == whole[: len(answer.ids)]
        else:
            assert answer.ids == whole


def _submit(engine: Engine, request: Request, listener: Callable[[Delta], None]) -> Ticket:
    pause = threading.Event()
    while True:
        try:
            return engine.submit(request, listener)
        except Busy:
            pause.wait(0.002)


@pytest.mark.slow
def test_memory_is_flat() -> None:
    """The state and the process do not grow with the tokens generated, nor with the requests served."""
    engine = Engine(model_of("hybrid", torch.float32), max_batch=8, cache_bytes=2**18, max_state_bytes=2**20)

    def serve(rounds: int) -> None:
        for turn in range(rounds):
            for i in range(8):
                ask(engine, [turn % VOCAB, i, 5], SamplingParams(max_new_tokens=40, seed=turn))
            run(engine)

    serve(3)
    before, state_bytes = resident_bytes(), engine.stats().state_bytes
    serve(7)
    stats = engine.stats()
    assert stats.generated_tokens == 10 * 8 * 40 and stats.state_bytes == state_bytes
    assert stats.cache_bytes <= 2**18
    assert resident_bytes() - before < 8 * 2**20


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here to ask how large this process is")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
