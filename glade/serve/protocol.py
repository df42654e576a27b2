"""What a request may say: OpenAI's fields and a few more, each honoured or refused, none ignored."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from glade.serve.refusal import Refusal

R = TypeVar("R", bound="GenerationRequest")

_SEED = 2**63
_WITHOUT_TOOLS = "this server calls no tools"
_TEXT_ONLY = "this server reads and writes text only"
_NO_JSON = "answers are not forced into a format; ask for it in the prompt"
_PENALTY = "use repetition_penalty, which weakens tokens that occurred"

# field -> values under which it asks for nothing, and why others are refused
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _TEXT_ONLY),
    "frequency_penalty": ((0,), _PENALTY),
    "function_call": (("none", "auto"), _WITHOUT_TOOLS),
    "functions": (([],), _WITHOUT_TOOLS),
    "logit_bias": (({},), "token biases are not offered; use top_k, top_p or min_p"),
    "modalities": ((["text"],), _TEXT_ONLY),
    "moderation": ((), "this server judges no content"),
    "parallel_tool_calls": ((True, False), _WITHOUT_TOOLS),
    "prediction": ((), "predicted outputs are not offered; prompts seen before are reused without being asked"),
    "presence_penalty": ((0,), _PENALTY),
    "prompt_cache_options": ((), "prompts seen before are always reused; there is nothing to choose"),
    "prompt_cache_retention": (("in_memory",), "states are kept in memory as long as there is room"),
    "reasoning_effort": (("none",), "these models have no separate reasoning"),
    "response_format": (({"type": "text"},), _NO_JSON),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is stored"),
    "suffix": (("",), "these models write from left to right, and cannot fill in before a suffix"),
    "tool_choice": (("none", "auto"), _WITHOUT_TOOLS),
    "tools": (([],), _WITHOUT_TOOLS),
    "verbosity": (("medium",), "ask for it in the prompt"),
    "web_search_options": ((), "this server does not search"),
}
# what a client may tell about itself; it has no effect here, and is not kept
_LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class GenerationRequest(_Strict):
    """The fields that completions and chats share; None is the default."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions; the prompts are checked by `prompts`, since a union would report every token."""

    prompt: Any = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of token ids."""
        given = self.prompt
        if isinstance(given, str) or _is_ids(given):
            return [given]
        if isinstance(given, list) and given and all(isinstance(p, str) or _is_ids(p) for p in given):
            return given
        raise Refusal(
            400,
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; none may be empty "
            "of tokens",
            param="prompt",
        )


def _is_ids(value: Any) -> bool:
    # a bool is an int to Python, not to JSON
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1000)]
    name: Literal[None] = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # OpenAI's newer word for it, which templates do not know
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def read_request(kind: type[R], body: bytes) -> R:
    """The request in a body.

    Raises:
        Refusal: it is no JSON object, a field is unknown, of the wrong type, out of range, or not offered.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise Refusal(400, f"the body is a JSON {type(fields).__name__}; send an object", code="invalid_json")
    try:
        return kind.model_validate(_offered(kind, fields))
    except ValidationError as error:
        raise _explained(error) from error


def _offered(kind: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are this server's to honour; a Refusal for those that nobody here can."""
    offered = {}
    for name, value in fields.items():
        if name in kind.model_fields:
            offered[name] = value
        elif name in _REFUSED:
            neutral, why = _REFUSED[name]
            if value is not None and value not in neutral:
                allowed = f" (only {' or '.join(map(repr, neutral))})" if neutral else ""
                raise Refusal(400, f"{name} is not supported{allowed}: {why}", param=name, code="unsupported_parameter")
        elif name not in _LABELS:
            near = get_close_matches(name[:100], kind.model_fields, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Refusal(400, f"unknown field {name[:100]!r}{hint}", param=name[:100], code="unknown_parameter")
    return offered


def _explained(error: ValidationError) -> Refusal:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # of a field that takes one of several types, the error of the type that came nearest
    first = max(
        (e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]),
        key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])),
    )
    # the names of types in the path are left out
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES]
    return Refusal(400, f"{'.'.join(path)}: {first['msg']}", param=path[0] if path else None)


_NAMES = {
    name for kind in (CompletionRequest, ChatRequest, StreamOptions, Message, TextPart) for name in kind.model_fields
}
