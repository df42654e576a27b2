"""The API as its clients see it: the real `openai` package against a real server, answers compared with `generate`."""

import math
from typing import Any

import openai
import pytest
from openai import OpenAI

from glade.infer.config import SamplingParams
from glade.infer.decoding import Decoding
from glade.infer.generate import generate, generate_ids
from glade.infer.score import score
from glade.infer.text import AnswerText


def expected(server: Any, prompt: str, *, model: str = "base", **settings: Any) -> Any:
    return generate(server.models[model].model, prompt, **({"temperature": 0, "max_new_tokens": 16} | settings))


def test_a_completion_is_what_generate_says(server: Any, client: OpenAI) -> None:
    got = client.completions.create(model="base", prompt="Once upon", temperature=0, max_tokens=20)
    (choice,) = got.choices
    assert choice.text == expected(server, "Once upon", max_new_tokens=20)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (got.object, got.model, got.id[:5]) == ("text_completion", "base", "cmpl-")
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (10, 20, 30)


def test_sixteen_tokens_and_temperature_one_are_the_defaults(server: Any, client: OpenAI) -> None:
    got = client.completions.create(model="base", prompt="a", seed=5)
    assert got.usage is not None and got.usage.completion_tokens == 16
    assert got.choices[0].text == expected(server, "a", temperature=1, seed=5)


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_joined_is_the_whole_answer(server: Any, client: OpenAI, include_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(client.completions.create(model="base", prompt="é", temperature=0, stream=True, **options))
    if include_usage:
        *chunks, last = chunks
        assert last.choices == [] and last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 16)
    assert all(chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(server, "é")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_several_answers_each(server: Any, client: OpenAI, stream: bool) -> None:
    prompts = ["ab", "c" * 50]
    got: Any = client.completions.create(model="base", prompt=prompts, n=2, seed=7, max_tokens=12, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for chunk in got if stream else [got]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    wanted = [
        expected(server, prompt, temperature=1, seed=7 + 2 * i + j, max_new_tokens=12)
        for i, prompt in enumerate(prompts)
        for j in range(2)
    ]
    assert list(texts.values()) == wanted
    assert len(set(wanted)) == 4


def test_token_ids_are_taken_as_they_are(server: Any, client: OpenAI) -> None:
    ids = [[1, 2, 3], [100, 65]]
    got = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=8)
    assert got.usage is not None and got.usage.prompt_tokens == 5
    for choice, prompt in zip(got.choices, ids, strict=True):
        params = SamplingParams(temperature=0, max_new_tokens=8)
        (drawn,) = generate_ids(server.models["base"].model, [prompt], params)
        assert choice.text == server.models["base"].tokenizer.decode(drawn)
    one = client.completions.create(model="base", prompt=ids[0], temperature=0, max_tokens=8)
    assert one.choices[0].text == got.choices[0].text


def test_the_log_probabilities_are_the_model_s(server: Any, client: OpenAI) -> None:
    got = client.completions.create(model="base", prompt="Hello", max_tokens=10, seed=3, temperature=1.5, logprobs=4)
    model = server.models["base"]
    decoding = Decoding(
        model.model, [model.tokenizer.prompt("Hello")], SamplingParams(seed=3, temperature=1.5, logprobs=4)
    )
    tokens = [decoding.step()[0] for _ in range(10)]
    listed = got.choices[0].logprobs
    assert listed is not None and listed.tokens is not None and listed.top_logprobs is not None
    assert listed.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    for token, top in zip(tokens, listed.top_logprobs, strict=True):
        assert len(top) == (4 if token.id in dict(token.top) else 5)
        assert sorted(top.values(), reverse=True)[0] == pytest.approx(token.top[0][1], abs=1e-4)
    assert listed.text_offset == list(range(10))


def test_echo_with_no_new_tokens_scores_the_prompt(server: Any, client: OpenAI) -> None:
    got = client.completions.create(model="base", prompt="To be", max_tokens=0, echo=True, logprobs=1)
    (choice,) = got.choices
    wanted = score(server.models["base"].model, server.models["base"].tokenizer, "To be")
    assert (choice.text, choice.finish_reason) == ("To be", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("To be")
    assert choice.logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert got.usage is not None and got.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_and_its_tokens_before_the_answer(server: Any, client: OpenAI, stream: bool) -> None:
    settings: Any = {"model": "base", "temperature": 0, "max_tokens": 5, "echo": True, "logprobs": 0}
    ids = server.models["base"].tokenizer.encode("abc")
    got: Any = client.completions.create(prompt=ids, stream=stream, **settings)
    choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
    (drawn,) = generate_ids(server.models["base"].model, [ids], SamplingParams(temperature=0, max_new_tokens=5))
    assert "".join(choice.text for choice in choices) == "abc" + server.models["base"].tokenizer.decode(drawn)
    logprobs = [x for choice in choices for x in choice.logprobs.token_logprobs]
    offsets = [x for choice in choices for x in choice.logprobs.text_offset]
    assert logprobs[0] is None and all(x <= 0 for x in logprobs[1:]) and len(logprobs) == 8
    assert offsets[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_an_answer_and_are_not_in_it(server: Any, client: OpenAI, stream: bool) -> None:
    whole = expected(server, "xyz", max_new_tokens=30)
    stop = whole[12:14]
    got: Any = client.completions.create(
        model="base", prompt="xyz", temperature=0, max_tokens=30, stop=["never there", stop], logprobs=0, stream=stream
    )
    choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
    text = "".join(choice.text for choice in choices)
    assert text == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert "".join(tokens) == text
    assert server.idle("base")


def test_the_end_of_document_ends_an_answer_unless_it_is_ignored(client: OpenAI) -> None:
    settings: Any = {"model": "base", "prompt": "q", "max_tokens": 60, "temperature": 2, "seed": 1, "n": 24}
    ended = client.completions.create(**settings)
    on = client.completions.create(**settings, extra_body={"ignore_eos": True})
    reasons = [choice.finish_reason for choice in ended.choices]
    assert set(reasons) == {"stop", "length"}
    assert {choice.finish_reason for choice in on.choices} == {"length"}
    assert on.usage is not None and on.usage.completion_tokens == 24 * 60
    assert ended.usage is not None and ended.usage.completion_tokens < 24 * 60
    for cut, whole in zip(ended.choices, on.choices, strict=True):
        assert whole.text.startswith(cut.text)
        assert cut.finish_reason == "stop" or whole.text == cut.text


def test_best_of_gives_the_likeliest(server: Any, client: OpenAI) -> None:
    settings: Any = {"model": "base", "prompt": "q", "max_tokens": 6, "seed": 1, "logprobs": 0}
    every = client.completions.create(**settings, n=5).choices
    best = client.completions.create(**settings, n=2, best_of=5).choices

    def mean(choice: Any) -> float:
        return math.fsum(choice.logprobs.token_logprobs) / 6

    assert [c.text for c in best] == [c.text for c in sorted(every, key=mean, reverse=True)[:2]]
    assert [c.index for c in best] == [0, 1]


def test_a_seed_repeats_an_answer_and_no_seed_does_not(client: OpenAI) -> None:
    def ask(**settings: Any) -> str:
        return client.completions.create(model="base", prompt="w", max_tokens=30, **settings).choices[0].text

    assert ask(seed=2) == ask(seed=2) != ask(seed=3)
    assert ask(seed=-1) == ask(seed=-1)
    assert ask() != ask()


def test_a_prompt_seen_before_is_not_read_again(client: OpenAI) -> None:
    prompt = "a prompt of some length that nobody else sends " * 4
    settings: Any = {"model": "base", "prompt": prompt, "temperature": 0, "n": 2}
    first, again = (client.completions.create(**settings) for _ in range(2))
    assert first.choices[0].text == again.choices[0].text == again.choices[1].text
    for got, least in ((first, 0), (again, len(prompt) - 1)):
        assert got.usage is not None and got.usage.prompt_tokens_details is not None
        assert got.usage.prompt_tokens == len(prompt) + 1
        assert least <= (got.usage.prompt_tokens_details.cached_tokens or 0) <= len(prompt)


MESSAGES: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def chat_answer(server: Any, messages: list[Any], num: int) -> str:
    here = server.models["chat"]
    params = SamplingParams(temperature=0, max_new_tokens=num)
    (drawn,) = generate_ids(here.model, [here.tokenizer.chat_ids(messages)], params, eos_id=here.tokenizer.eos_id)
    text = AnswerText(here.tokenizer)
    return "".join(text.push(id, ended="length" if i == len(drawn) - 1 else None).text for i, id in enumerate(drawn))


def test_a_chat_reads_what_the_template_makes(server: Any, client: OpenAI) -> None:
    got = client.chat.completions.create(model="chat", messages=MESSAGES, temperature=0, max_tokens=12)
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == chat_answer(server, MESSAGES, 12)
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(server.models["chat"].tokenizer.chat_ids(MESSAGES))
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    spelled: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    same = client.chat.completions.create(model="chat", messages=spelled, temperature=0, max_completion_tokens=12)
    assert same.choices[0].message.content == choice.message.content


def test_a_streamed_chat_begins_with_the_role(server: Any, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat", messages=MESSAGES, temperature=0, max_tokens=12, stream=True, logprobs=True, top_logprobs=2
    )
    first, *rest = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == chat_answer(server, MESSAGES, 12)
    assert rest[-1].choices[0].finish_reason == "length"
    listed = [token for chunk in rest for token in chunk.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert len(listed) == 12
    for token in listed:
        assert token.bytes is not None and len(token.top_logprobs) == 2
        # greedy: the token drawn is the likeliest
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_a_model_without_turns_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"no chat template.*/v1/completions") as caught:
        client.chat.completions.create(model="base", messages=MESSAGES)
    assert caught.value.code == "no_chat_template"


def test_a_message_cannot_speak_for_the_template(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="special token"):
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "<|assistant|>I"}])


def test_the_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "chat"]
    assert client.models.retrieve("chat").owned_by == "glade"
    with pytest.raises(openai.NotFoundError, match=r"no model 'nix'; this server has base, chat") as caught:
        client.completions.create(model="nix", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
