"""What a request may say: every field honoured or refused, whatever the bytes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from glade.serve.protocol import ChatRequest, CompletionRequest, read_request
from glade.serve.refusal import Refusal

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def refused(kind: Any, fields: Any) -> Refusal:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(Refusal) as caught:
        asked = read_request(kind, body)
        if kind is CompletionRequest:
            asked.prompts()
    assert caught.value.response().body
    return caught.value


def test_every_field_that_openai_documents_is_known() -> None:
    for kind, documented, base in (
        (CompletionRequest, CompletionCreateParamsBase, {"prompt": "a"}),
        (ChatRequest, chat_params.CompletionCreateParamsBase, CHAT),
    ):
        for name in [*documented.__annotations__, "stream"]:
            # None is the default of each, but of what must be given
            if name not in ("messages", "prompt"):
                read_request(kind, json.dumps(base | {name: None}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperatur": 1}, "temperatur", "did you mean temperature"),
        ({"best_of_all": 1}, "best_of_all", "unknown field"),
        ({"suffix": "x"}, "suffix", "left to right"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty", "repetition_penalty"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 1001}, "stop", "at most 1000"),
        ({"stop": [None]}, "stop", "valid string"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options", "valid boolean"),
        ({"stream_options": {"more": True}}, "stream_options", "not permitted"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": [[]]}, "prompt", "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
        ({"prompt": [[1], [True]]}, "prompt", "prompt must be"),
        ({"prompt": None}, "prompt", "prompt must be"),
        ({"prompt": {"a": 1}}, "prompt", "prompt must be"),
    ],
)
def test_what_a_completion_may_not_say(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(CompletionRequest, {"prompt": "a"} | fields)
    assert (refusal.status, refusal.param) == (400, param)
    assert says in refusal.message


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
        ({"tools": [{}]}, "tools", "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "in the prompt"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"echo": True}, "echo", "unknown field"),
        ({"store": True}, "store", "nothing is stored"),
    ],
)
def test_what_a_chat_may_not_say(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(ChatRequest, CHAT | fields)
    assert (refusal.status, refusal.param) == (400, param)
    assert says in refusal.message


@pytest.mark.parametrize("body", [
    b"", b"{", b"nonsense", b"[]", b"3", b"null", b'"a"', b'{"prompt": NaN}', b'{"temperature": Infinity}',
    b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt":' * 10_000,
    b'{"seed": ' + b"9" * 5000 + b"}", b'{"temperature": 1e999, "prompt": "a"}', b"\x00" * 100,
])  # fmt: skip
def test_what_is_no_json_object(body: bytes) -> None:
    assert refused(CompletionRequest, body).status == 400


def test_neutral_values_of_what_is_not_offered_pass() -> None:
    neutral = {"tools": [], "presence_penalty": 0.0, "response_format": {"type": "text"}, "store": False, "user": "me"}
    assert read_request(ChatRequest, json.dumps(CHAT | neutral).encode()).messages[0].content == "hi"


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(
    st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields, "suffix", "x"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    ),
))  # fmt: skip
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    for kind in (CompletionRequest, ChatRequest):
        try:
            asked = read_request(kind, json.dumps(fields).encode())
            if isinstance(asked, CompletionRequest):
                asked.prompts()
        except Refusal as refusal:
            assert refusal.status == 400 and refusal.message and refusal.response().body
