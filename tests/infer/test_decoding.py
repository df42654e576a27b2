"""Generation from real models: state against recomputing, rows against rows, draws against the forward pass."""

from typing import Any

import pytest
import torch

from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError
from glade.infer import decoding
from glade.infer.config import SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.generate import generate, generate_ids, stream
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel

VOCAB = 61
PROMPTS = [[5, 9, 1], [7], [3, 3, 8, 60, 0, 2, 17, 21, 4]]
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "swa": {"mixer": "swa", "window": 4},
    "gla": {"mixer": "gla"},
    "gdn2": {"mixer": "gdn2"},
    "kla": {"mixer": "kla"},
    "rnn": {"mixer": "rnn"},
    "hybrid": {"layers": "gdn2 swa", "window": 3},
    "positions": {"mixer": "softmax", "learned_positions": 32, "rope": False},
}


def model_of(name: str, vocab_size: int = VOCAB) -> LanguageModel:
    torch.manual_seed(0)
    # untied and with wide weights, so that the model does not say one token over and over
    config = ModelConfig(
        vocab_size=vocab_size, num_layers=2, dim=32, init_std=0.3, tie_embeddings=False, **MODELS[name]
    )
    # fp64: a draw that two ways of computing must agree on should not hang on the last bit of fp32
    return LanguageModel(config).double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_with_the_state_is_greedy_that_rereads_everything(name: str) -> None:
    model = model_of(name)
    drawn = generate_ids(model, PROMPTS, SamplingParams(max_new_tokens=12, temperature=0))
    for prompt, ids in zip(PROMPTS, drawn, strict=True):
        read = list(prompt)
        for id in ids:
            logits, _ = model(torch.tensor([read]), logits="last")
            assert logits.argmax(-1).item() == id
            read.append(id)
    assert len({id for ids in drawn for id in ids}) > 3  # the model says more than one thing


@pytest.mark.parametrize("name", ["gdn2", "hybrid"])
def test_a_row_draws_the_same_whatever_lies_beside_it(name: str) -> None:
    model = model_of(name)
    params = {"max_new_tokens": 15, "top_p": 0.9, "repetition_penalty": 1.3}
    together = generate_ids(model, PROMPTS, SamplingParams(seed=7, **params), eos_id=11)
    for row, prompt in enumerate(PROMPTS):
        alone = generate_ids(model, [prompt], SamplingParams(seed=7 + row, **params), eos_id=11)
        assert alone == [together[row]]
    assert together != generate_ids(model, PROMPTS, SamplingParams(seed=8, **params), eos_id=11)


@pytest.mark.parametrize("name", ["gdn2", "swa"])
def test_logprobs_are_those_of_one_forward_pass(name: str) -> None:
    model = model_of(name)
    running = Decoding(model, PROMPTS, SamplingParams(temperature=1.5, top_k=20, seed=1, logprobs=3))
    tokens = [running.step() for _ in range(6)]
    for row, prompt in enumerate(PROMPTS):
        drawn = [step[row] for step in tokens]
        ids = prompt + [token.id for token in drawn]
        expected = model(torch.tensor([ids]))[0][0].log_softmax(-1)[len(prompt) - 1 : -1]
        for token, row_expected in zip(drawn, expected, strict=True):
            assert token.logprob == pytest.approx(row_expected[token.id].item(), abs=1e-5)
            best = row_expected.topk(3)
            assert [id for id, _ in token.top] == best.indices.tolist()
            assert [logprob for _, logprob in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["gdn2", "swa", "softmax"])
def test_a_long_prompt_read_in_pieces_is_the_prompt_read_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    whole = generate_ids(model, PROMPTS[2:], SamplingParams(max_new_tokens=8, seed=2))
    monkeypatch.setattr(decoding, "_PIECE_TOKENS", 4)
    assert generate_ids(model, PROMPTS[2:], SamplingParams(max_new_tokens=8, seed=2)) == whole


@pytest.mark.parametrize("name", ["gdn2", "swa", "positions"])
def test_a_carried_state_goes_on_as_if_all_had_been_read_at_once(name: str) -> None:
    model = model_of(name)
    params = SamplingParams(max_new_tokens=6, seed=3)
    begun = [[1, 2, 3], [4, 5], [6]]
    _, state = model(
        torch.tensor([[1, 2, 3, 4, 5, 6]]), cu_seqlens=torch.tensor([0, 3, 5, 6], dtype=torch.int32), logits="last"
    )
    for row, prompt in enumerate(PROMPTS):
        before = state.select([row])
        kept = before.clone()
        running = Decoding(model, [prompt], params, state=before)
        carried = [running.step()[0].id for _ in range(6)]
        assert [carried] == generate_ids(model, [begun[row] + prompt], params)
        for layer, kept_layer in zip(before.layers, kept.layers, strict=True):
            assert all(a.equal(b) for a, b in zip(layer, kept_layer, strict=True))
        assert before.position.equal(kept.position)


def test_the_state_of_a_recurrent_model_does_not_grow() -> None:
    model = model_of("kla")
    running = Decoding(model, [[1, 2]], SamplingParams(seed=0))
    running.step()
    first = running.state.nbytes
    for _ in range(100):
        running.step()
    assert running.state.nbytes == first == model.state_bytes(10)


def test_rows_end_at_the_eos() -> None:
    model = model_of("gdn2")
    free = generate_ids(model, PROMPTS, SamplingParams(max_new_tokens=20, seed=5))
    eos = free[1][4]
    for ids, ended in zip(
        free, generate_ids(model, PROMPTS, SamplingParams(max_new_tokens=20, seed=5), eos_id=eos), strict=True
    ):
        assert ended == (ids[: ids.index(eos) + 1] if eos in ids else ids)


def test_a_strong_penalty_repeats_nothing() -> None:
    model = model_of("gdn2")
    # weights the logits by sign, so shift them: every seen token must fall below every unseen one
    drawn = generate_ids(model, PROMPTS, SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1e6))
    for prompt, ids in zip(PROMPTS, drawn, strict=True):
        logits, _ = model(torch.tensor([prompt + ids]))
        for step, id in enumerate(ids):
            read = set((prompt + ids)[: len(prompt) + step])
            unseen_positive = [i for i, x in enumerate(logits[0, len(prompt) + step - 1]) if x > 0 and i not in read]
            assert not unseen_positive or id not in read


def test_ids_without_text_are_never_drawn() -> None:
    model = model_of("gdn2")
    running = Decoding(model, PROMPTS[:2], SamplingParams(temperature=50.0, seed=0), vocab_size=13)
    assert all(token.id < 13 for _ in range(30) for token in running.step())


def test_what_cannot_be_continued_is_refused() -> None:
    model = model_of("gdn2")
    with pytest.raises(DataError, match="token id 61 at position 1 of the prompt is unknown; this model has 61 tokens"):
        Decoding(model, [[0, 61]], SamplingParams())
    with pytest.raises(DataError, match="needs at least one token"):
        Decoding(model, [[1], []], SamplingParams())
    with pytest.raises(DataError, match="need a tokenizer"):
        generate_ids(model, [[1]], SamplingParams(stop=("x",)))
    with pytest.raises(ConfigError, match="32 learned positions"):
        generate_ids(model_of("positions"), [[1] * 30], SamplingParams(max_new_tokens=4))
    assert len(generate_ids(model_of("positions"), [[1] * 30], SamplingParams(max_new_tokens=3))[0]) == 3


def test_text_of_a_real_model_is_the_text_of_its_ids() -> None:
    tokenizer = Tokenizer.build("char", ["the quick brown fox, jumped."])
    model = model_of("gdn2", tokenizer.vocab_size)
    params = SamplingParams(max_new_tokens=40, seed=4)
    prompts = ["the", "quick brown"]
    ids = generate_ids(model, [tokenizer.prompt(text) for text in prompts], params, eos_id=tokenizer.eos_id)
    texts = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=40, seed=4)
    assert texts == [tokenizer.decode(row) for row in ids]
    assert [event.token_id for event in stream(model, tokenizer, prompts, params) if event.row == 1] == ids[1]
    with pytest.raises(DataError, match="'Z'"):
        generate(model, "Z", tokenizer=tokenizer)
