"""The routes: OpenAI's completions, chats and models, health and metrics. `create_app` makes the application."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from glade.errors import GladeError
from glade.infer.config import SamplingParams
from glade.infer.score import score_prompt
from glade.infer.text import TextToken
from glade.serve.answers import Task
from glade.serve.config import ServeSettings
from glade.serve.forms import ChatForm, CompletionForm, Echo
from glade.serve.guard import Guard
from glade.serve.metrics import Metrics
from glade.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, read_request
from glade.serve.refusal import Refusal
from glade.serve.respond import CLIENT_GONE, Responder
from glade.serve.served import Served, find_served

_COMPLETION_TOKENS = 16  # OpenAI's default


class Api:
    """The models of a server behind its routes."""

    def __init__(self, models: Mapping[str, Served], settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics({name: served.engine for name, served in models.items()})
        self.closing = False
        self._respond = Responder(settings, self.metrics)
        # one at a time: it reads a whole prompt beside the engine
        self._scoring = asyncio.Lock()

    async def completions(self, request: Request) -> Response:
        began = time.monotonic()
        asked = read_request(CompletionRequest, await self._body(request))
        served = self._model(asked.model)
        num, best = asked.n or 1, asked.best_of or asked.n or 1
        _check_best_of(num, best, streamed=bool(asked.stream))
        given = asked.prompts()
        self._check_choices(len(given) * best)
        prompts = await asyncio.to_thread(_completion_prompts, served, given)
        usual = min(_COMPLETION_TOKENS, self.settings.max_new_tokens)
        length = usual if asked.max_tokens is None else asked.max_tokens
        params = self._params(asked, length, asked.logprobs)
        self._check_lengths(prompts)
        echoes = await self._echoes(served, given, prompts, asked) if asked.echo else ()
        logprobs = asked.logprobs is not None
        form = CompletionForm(served.name, served.token_bytes, logprobs=logprobs, echoes=echoes, num=num)
        task = Task(prompts=prompts, params=params, num=best, ignore_eos=bool(asked.ignore_eos))
        if length == 0:
            return self._respond.without_tokens(form, task, bool(asked.stream), asked.include_usage)
        if asked.stream:
            return self._respond.stream(served, task, form, asked.include_usage, began)
        return await self._respond.whole(request, served, task, form, num, began)

    async def chat(self, request: Request) -> Response:
        began = time.monotonic()
        asked = read_request(ChatRequest, await self._body(request))
        served = self._model(asked.model)
        self._check_choices(asked.n or 1)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        lengths = [x for x in (asked.max_completion_tokens, asked.max_tokens) if x is not None]
        if len(set(lengths)) > 1:
            raise Refusal(400, "max_tokens is the older name of max_completion_tokens; give one", param="max_tokens")
        length = lengths[0] if lengths else self.settings.max_new_tokens
        params = self._params(asked, length, asked.top_logprobs if asked.logprobs else None)
        prompt = await asyncio.to_thread(_chat_prompt, served, [message.plain() for message in asked.messages])
        self._check_lengths([prompt])
        form = ChatForm(served.name, served.token_bytes, logprobs=bool(asked.logprobs))
        task = Task(prompts=[prompt], params=params, num=asked.n or 1, ignore_eos=bool(asked.ignore_eos))
        if length == 0:
            return self._respond.without_tokens(form, task, bool(asked.stream), asked.include_usage)
        if asked.stream:
            return self._respond.stream(served, task, form, asked.include_usage, began)
        return await self._respond.whole(request, served, task, form, task.num, began)

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [_describe(served) for served in self.models.values()]})

    async def get_model(self, name: str) -> Response:
        return JSONResponse(_describe(self._model(name)))

    async def health(self) -> Response:
        dead = [name for name, served in self.models.items() if not served.engine.alive]
        if self.closing or dead:
            raise Refusal(503, f"the engine of {', '.join(dead)} has stopped" if dead else "the server is stopping")
        decode = {name: served.engine.stats().decode for name, served in self.models.items()}
        return JSONResponse({"status": "ok", "models": list(self.models), "decode": decode})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # only a program, or a page of this server's, sends JSON without having asked: no other site's form does
        if kind != "application/json":
            raise Refusal(415, f"content-type is {kind[:100]!r}; send application/json")
        return await request.body()

    def _model(self, name: str | None) -> Served:
        served = find_served(self.models, name)
        if served is None:
            there = ", ".join(self.models)
            wanted = "name a model" if name is None else f"there is no model {name[:100]!r}"
            raise Refusal(
                400 if name is None else 404,
                f"{wanted}; this server has {there}",
                param="model",
                code="model_not_found",
            )
        return served

    def _params(self, asked: GenerationRequest, length: int, logprobs: int | None) -> SamplingParams:
        if length > self.settings.max_new_tokens:
            limit = self.settings.max_new_tokens
            raise Refusal(400, f"max_tokens is {length}; this server writes at most {limit}", param="max_tokens")
        return SamplingParams(
            # 0 tokens are only scored, or nothing at all
            max_new_tokens=max(length, 1),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            # OpenAI allows 0, where only the likeliest token stays
            top_p=1.0 if asked.top_p is None else max(asked.top_p, 1e-9),
            top_k=asked.top_k or 0,
            min_p=asked.min_p or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            seed=None if asked.seed is None else asked.seed % 2**63,
            stop=asked.stops,
            logprobs=logprobs or 0,
        )

    def _check_choices(self, num: int) -> None:
        if num > self.settings.max_choices:
            limit = self.settings.max_choices
            raise Refusal(400, f"prompts times n (or best_of) is {num}; this server gives at most {limit}", param="n")

    def _check_lengths(self, prompts: list[tuple[int, ...]]) -> None:
        longest = max(map(len, prompts))
        if longest > self.settings.max_prompt_tokens:
            raise Refusal(
                400,
                f"the prompt has {longest} tokens; this server reads at most {self.settings.max_prompt_tokens}",
                code="context_length_exceeded",
            )

    async def _echoes(
        self,
        served: Served,
        given: list[str | list[int]],
        prompts: list[tuple[int, ...]],
        asked: CompletionRequest,
    ) -> list[Echo]:
        """The prompts as they are repeated: a text as it was sent, its BOS left out, token ids as their text."""
        echoes = []
        for prompt, ids in zip(given, prompts, strict=True):
            skip = 1 if isinstance(prompt, str) else 0
            text = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
            tokens: list[tuple[TextToken, bool]] = []
            if asked.logprobs is not None:
                async with self._scoring:
                    scored = await asyncio.to_thread(score_prompt, served.model, served.tokenizer, ids, asked.logprobs)
                tokens = [(token, i > 0) for i, token in enumerate(scored)][skip:]
            echoes.append(Echo(text, tokens))
        return echoes


def create_app(models: Mapping[str, Served], settings: ServeSettings) -> ASGIApp:
    """The application: API, metrics and (with `settings.ui`) the page. Its lifespan starts and closes the engines."""
    api = Api(models, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in models.values():
            served.engine.start()
        try:
            yield
        finally:
            api.closing = True
            for served in models.values():
                await asyncio.to_thread(served.engine.close)

    # no pages of documentation: they would load scripts from elsewhere
    app = FastAPI(title="glade", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/models", api.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", api.get_model, methods=["GET"])
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", api.show_metrics, methods=["GET"])
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(GladeError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)
    if settings.ui:
        # a slow import, and one that a server without the page does without
        from glade.serve.ui import mount

        mount(app, models, settings)
    return Guard(app, settings, api.metrics)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _invalid(_: Request, error: Exception) -> Response:
    """What a tokenizer or an engine says of a request that it cannot serve."""
    return Refusal(400, str(error)).response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        404: f"there is nothing at {request.url.path[:200]}; see /v1/models, /v1/completions, /v1/chat/completions",
        405: f"{request.method} is not for {request.url.path[:200]}",
    }
    return Refusal(error.status_code, said.get(error.status_code, error.detail), headers=error.headers).response()


async def _gone(_: Request, __: Exception) -> Response:
    """The client left before its request was whole: nobody reads this, the status is for the metrics."""
    return Response(status_code=CLIENT_GONE)


async def _broken(_: Request, __: Exception) -> Response:
    return Refusal(500, "this is a fault of the server; its log shows what happened").response()


def _describe(served: Served) -> dict[str, object]:
    config = served.model.config
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "glade",
        "parameters": served.num_parameters,
        "layers": list(config.layer_mixers),
        "vocab_size": served.tokenizer.vocab_size,
        "chat": served.tokenizer.chat_template is not None,
    }


def _check_best_of(num: int, best: int, *, streamed: bool) -> None:
    if best < num:
        raise Refusal(400, f"best_of is {best}, n is {num}; the best n are chosen among best_of", param="best_of")
    if best > num and streamed:
        raise Refusal(400, "best_of is known only at the end, so it cannot be streamed", param="best_of")


def _completion_prompts(served: Served, given: list[str | list[int]]) -> list[tuple[int, ...]]:
    """Token ids of each prompt: a text begins a document, token ids are taken as they are."""
    return [tuple(served.tokenizer.prompt(p)) if isinstance(p, str) else tuple(p) for p in given]


def _chat_prompt(served: Served, messages: list[dict[str, str]]) -> tuple[int, ...]:
    if served.tokenizer.chat_template is None:
        raise Refusal(
            400,
            f"{served.name} has no chat template: it continues text and knows no turns. Use /v1/completions, or "
            "fine-tune it on conversations (glade sft), which gives it one",
            param="model",
            code="no_chat_template",
        )
    return tuple(served.tokenizer.chat_ids(messages))
