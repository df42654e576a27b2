"""The web page, in Gradio: widgets and what happens when they are used. What they show is made in `page`.

Nothing is loaded from elsewhere, nothing is reported to anybody, and no file is served: what the page shows of a run
is inside the page.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Soft
from starlette.responses import RedirectResponse, Response

from glade.errors import GladeError
from glade.infer.config import SamplingParams
from glade.serve.config import ServeSettings
from glade.serve.page import Look, Page, other_seed, sampling
from glade.serve.pictures import STYLE, bars, coloured
from glade.serve.served import Served
from glade.serve.votes import Verdict

PATH = "/ui"

_EXAMPLES = [
    "ROMEO:",
    "To be, or not to be, that is",
    "Once upon a time",
    "The meaning of life is",
    "It was a dark night",
]
_VERDICTS: tuple[tuple[Verdict, str], ...] = (("left", "A is better"), ("tie", "Equal"), ("right", "B is better"))
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif")
_MONO_FONTS = ("ui-monospace", "Menlo", "DejaVu Sans Mono", "monospace")


def mount(app: FastAPI, models: Mapping[str, Served], settings: ServeSettings) -> None:
    """The page under `PATH`, / leading there, and the votes as a file at /votes.jsonl."""
    page = Page(models, settings)

    async def home() -> Response:
        return RedirectResponse(f"{PATH}/")

    async def votes() -> Response:
        headers = {"Content-Disposition": 'attachment; filename="votes.jsonl"'}
        return Response(page.votes.read(), headers=headers, media_type="application/jsonl")

    app.add_api_route("/", home, methods=["GET"])
    app.add_api_route("/votes.jsonl", votes, methods=["GET"])
    theme = Soft(primary_hue="emerald", neutral_hue="slate", font=_SYSTEM_FONTS, font_mono=_MONO_FONTS).set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_label_background_fill="none",
        block_label_text_color="*neutral_600",
    )
    gr.mount_gradio_app(
        app,
        build(page),
        path=PATH,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=STYLE,
    )


def build(page: Page) -> gr.Blocks:
    """All tabs, wired to `page`."""
    blocks = gr.Blocks(title="glade", analytics_enabled=False)
    with blocks:
        gr.HTML('<div class="masthead"><h1>glade</h1><span>language models whose memory does not grow</span></div>')
        with gr.Row():
            with gr.Column(scale=0, min_width=300):
                model, controls = _controls(page)
            with gr.Column(scale=1):
                _tabs(page, model, controls)
        blocks.unload(_leaver(page))
    return blocks.queue(default_concurrency_limit=64, max_size=256, api_open=False)


# no event is offered as an API: that is what /v1 is for
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def _tabs(page: Page, model: gr.Dropdown, controls: list[Any]) -> None:
    facts = gr.HTML(page.describe(next(iter(page.models))))
    model.change(_guarded(page.describe), model, facts, **_PRIVATE)
    with gr.Tab("Write"):
        _write_tab(page, model, controls)
    with gr.Tab("Chat"):
        _chat_tab(page, model, controls)
    with gr.Tab("Side by side"):
        _compare_tab(page, controls)
    with gr.Tab("Next token"):
        _look_tab(page, model)
    with gr.Tab("Blind vote"):
        _vote_tab(page, controls)
    with gr.Tab("Training run"):
        curves = gr.HTML(page.curves(next(iter(page.models))))
        model.change(_guarded(page.curves), model, curves, **_PRIVATE)


def _controls(page: Page) -> tuple[gr.Dropdown, list[Any]]:
    names = list(page.models)
    model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model", filterable=False)
    gr.Markdown("### Sampling")
    longest = page.settings.max_new_tokens
    temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 always takes the likeliest token")
    length = gr.Slider(1, longest, min(200, longest), step=1, label="Most new tokens", elem_id="length")
    top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", info="fewest likeliest tokens that reach p; 1 keeps all")
    top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0 keeps all")
    min_p = gr.Slider(0, 1, 0, step=0.01, label="Min-p", info="relative to the likeliest token; 0 keeps all")
    penalty = gr.Slider(0.5, 2, 1, step=0.01, label="Repetition penalty", info="1 is off")
    seed = gr.Textbox("", label="Seed", placeholder="a new one each time", elem_id="seed", max_lines=1)
    stops = gr.Textbox("", label="Stop texts", info="one a line; \\n is a line end", lines=2, max_lines=4)
    return model, [temperature, top_k, top_p, min_p, penalty, length, seed, stops]


def _write_tab(page: Page, model: gr.Dropdown, controls: list[Any]) -> None:
    with gr.Row():
        with gr.Column(scale=5):
            prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, elem_id="prompt", placeholder="Begin a text ...")
            go, stop = _buttons("Write", "write")
            output = _answer_box("Text", "output", lines=12)
            status = gr.Markdown(elem_classes="note", elem_id="status")
        with gr.Column(scale=4):
            gr.Markdown("**Memory of this text**")
            meter = _meter(page, model, "meter")
            gr.Examples(_EXAMPLES, prompt, label="Examples")

    async def write(request: gr.Request, name: str, prompt: str, *values: Any) -> AsyncIterator[tuple[str, str, str]]:
        with _shown():
            draft = page.draft(name, prompt, sampling(*values))
            async for _ in page.follow(_session(request), [draft]):
                yield prompt + draft.text, draft.status(), draft.meter()

    _answering([go.click, prompt.submit], write, [model, prompt, *controls], [output, status, meter], stop, page)


def _chat_tab(page: Page, model: gr.Dropdown, controls: list[Any]) -> None:
    history = gr.State([])
    with gr.Row():
        with gr.Column(scale=5):
            talk = gr.Chatbot(height=430, label="Conversation", render_markdown=False, buttons=["copy"], elem_id="talk")
            said = gr.Textbox(show_label=False, placeholder="Say something ...", elem_id="said", max_lines=6)
            go, stop = _buttons("Send", "send")
        with gr.Column(scale=4):
            system = gr.Textbox(label="System message", info="for models with a chat template", max_lines=4)
            anew = gr.Button("New conversation", elem_id="anew")
            status = gr.Markdown(elem_classes="note")
            gr.Markdown("**Memory of this conversation**")
            meter = _meter(page, model, "chat-meter")

    async def chat(
        request: gr.Request, name: str, said: str, system: str, history: list[dict[str, str]], *values: Any
    ) -> AsyncIterator[Any]:
        with _shown():
            if not said:
                return
            if system and page.models[name].tokenizer.chat_template is None:
                raise GladeError("a system message needs a chat template, and this model has none; leave it empty")
            turns = [*history, {"role": "user", "content": said}]
            before = [{"role": "system", "content": system}] if system else []
            draft = page.draft(name, [*before, *turns], sampling(*values))
            async for _ in page.follow(_session(request), [draft]):
                shown = [*turns, {"role": "assistant", "content": draft.text}]
                yield shown, shown, "", draft.status(), draft.meter()

    inputs, outputs = [model, said, system, history, *controls], [talk, history, said, status, meter]
    _answering([go.click, said.submit], chat, inputs, outputs, stop, page)
    talk.clear(lambda: [], None, history, **_PRIVATE)
    anew.click(lambda: ([], []), None, [talk, history], **_PRIVATE)
    model.change(lambda: ([], []), None, [talk, history], **_PRIVATE)


def _compare_tab(page: Page, controls: list[Any]) -> None:
    first, second = _pickers(page)
    prompt = gr.Textbox(label="Prompt for both", lines=2, max_lines=12, elem_id="both")
    as_chat = gr.Checkbox(False, label="As a turn of a chat", elem_id="both-chat")
    go, stop = _buttons("Compare", "compare")
    with gr.Row():
        outputs = [_answer_box(side, elem_id, lines=12) for side, elem_id in (("First", "left"), ("Second", "right"))]
    with gr.Row():
        statuses = [gr.Markdown(elem_classes="note") for _ in range(2)]
    gr.Examples(_EXAMPLES, prompt, label="Examples")

    async def compare(
        request: gr.Request, first: str, second: str, prompt: str, as_chat: bool, *values: Any
    ) -> AsyncIterator[Any]:
        with _shown():
            params = sampling(*values)
            said = [{"role": "user", "content": prompt}] if as_chat else prompt
            # of one model, two answers that differ; of two models, the same draw
            seconds = other_seed(params) if first == second else params
            drafts = [page.draft(first, said, params), page.draft(second, said, seconds)]
            before = "" if as_chat else prompt
            async for _ in page.follow(_session(request), drafts):
                yield *(before + draft.text for draft in drafts), *(draft.status() for draft in drafts)

    inputs = [first, second, prompt, as_chat, *controls]
    _answering([go.click, prompt.submit], compare, inputs, [*outputs, *statuses], stop, page)


def _look_tab(page: Page, model: gr.Dropdown) -> None:
    looked = gr.State(None)
    text = gr.Textbox(label="Text", lines=3, max_lines=12, elem_id="look", value="To be, or not to be")
    with gr.Row():
        go = gr.Button("Look", variant="primary", elem_id="look-go")
        greedy = gr.Button("Append the likeliest token", elem_id="append")
    with gr.Row():
        with gr.Column(scale=5):
            tokens = gr.HTML(elem_id="tokens")
            summary = gr.Markdown(elem_classes="note")
        with gr.Column(scale=4):
            place = gr.Slider(1, 2, 1, step=1, label="Place in the text", elem_id="place", interactive=True)
            heading = gr.Markdown()
            ranked = gr.HTML(elem_id="ranked")
    gr.Markdown("The redder a token, the less the model expected it. Move the slider to see what it did expect.")

    async def look(name: str, text: str) -> Any:
        with _shown():
            found = await page.look(name, text)
        last = len(found.tokens)
        return found, gr.Slider(maximum=max(last, 2), value=last), found.summary(), *_place(found, last)

    async def append(name: str, text: str) -> Any:
        with _shown():
            found = await page.look(name, text)
        likeliest = next(id for id, _ in found.tokens[-1].top if id != found.served.tokenizer.eos_id)
        return text + found.served.tokenizer.decode([likeliest])

    shown = [looked, place, summary, tokens, heading, ranked]
    go.click(look, [model, text], shown, **_PRIVATE)
    text.submit(look, [model, text], shown, **_PRIVATE)
    greedy.click(append, [model, text], text, **_PRIVATE).then(look, [model, text], shown, **_PRIVATE)
    place.release(lambda found, at: _place(found, at), [looked, place], [tokens, heading, ranked], **_PRIVATE)


def _place(found: Look | None, place: int) -> tuple[str, str, str]:
    """The text with its token number `place` (from 1) framed, a heading, and what was likely there."""
    if found is None:
        return "", "", ""
    at = min(max(int(place), 1), len(found.tokens)) - 1
    after = at == len(found.tokens) - 1
    drawn = None if after else found.name(found.tokens[at].id)
    heading = "**What may come next**" if after else f"**What could have stood at place {at + 1}**"
    return coloured(found.text_tokens, found.served.token_bytes, at), heading, bars(found.ranked(at), drawn)


def _vote_tab(page: Page, controls: list[Any]) -> None:
    gr.Markdown(
        "Two models answer the same prompt. You are told which is which only after you have voted. Votes are lines of "
        "a file, which `glade dpo` reads as preference pairs: [votes.jsonl](/votes.jsonl)"
    )
    first, second = _pickers(page)
    ballot = gr.State(None)
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, elem_id="vote-prompt")
    as_chat = gr.Checkbox(False, label="As a turn of a chat")
    go, stop = _buttons("New pair", "pair")
    with gr.Row():
        boxes = [_answer_box(side, f"vote-{side}", lines=8) for side in ("A", "B")]
    with gr.Row():
        buttons = [gr.Button(label, interactive=False, elem_id=f"vote-{verdict}") for verdict, label in _VERDICTS]
    told = gr.Markdown(elem_id="told")
    tally = gr.Markdown(elem_classes="note", elem_id="tally")
    gr.Examples(_EXAMPLES, prompt, label="Examples")

    async def pair(
        request: gr.Request, first: str, second: str, prompt: str, as_chat: bool, *values: Any
    ) -> AsyncIterator[Any]:
        with _shown():
            drafts = page.pair(first, second, prompt, sampling(*values), as_chat)
            async for _ in page.follow(_session(request), drafts):
                yield *(draft.text for draft in drafts), None, "", *_enabled(buttons, False)
            failure = next((draft.failure for draft in drafts if draft.failure), None)
            if failure:
                raise GladeError(failure)
            # half an answer is nothing to vote on
            if all(draft.finished for draft in drafts):
                yield *(d.text for d in drafts), page.ballot(prompt, as_chat, drafts), "", *_enabled(buttons, True)

    inputs = [first, second, prompt, as_chat, *controls]
    _answering([go.click, prompt.submit], pair, inputs, [*boxes, ballot, told, *buttons], stop, page)
    for (verdict, _), button in zip(_VERDICTS, buttons, strict=True):
        button.click(
            _voter(page, verdict, buttons), [ballot, first, second], [told, tally, ballot, *buttons], **_PRIVATE
        )


def _voter(page: Page, verdict: Verdict, buttons: Sequence[gr.Button]) -> Callable[..., Any]:
    def vote(ballot: Any, first: str, second: str) -> Any:
        with _shown():
            if ballot is None:
                raise GladeError("there is nothing to vote on; ask for a new pair")
            return page.vote(ballot, verdict), page.tally(first, second), None, *_enabled(buttons, False)

    return vote


def _enabled(buttons: Sequence[gr.Button], enabled: bool) -> list[gr.Button]:
    return [gr.Button(interactive=enabled) for _ in buttons]


def _meter(page: Page, model: gr.Dropdown, elem_id: str) -> gr.HTML:
    """The meter of the chosen model, before the first token."""

    def unread(name: str) -> str:
        return page.draft(name, "", SamplingParams()).meter()

    meter = gr.HTML(unread(next(iter(page.models))), elem_id=elem_id)
    model.change(_guarded(unread), model, meter, **_PRIVATE)
    return meter


def _pickers(page: Page) -> tuple[gr.Dropdown, gr.Dropdown]:
    names = list(page.models)
    with gr.Row():
        first = gr.Dropdown(names, value=names[0], label="First model", filterable=False)
        second = gr.Dropdown(names, value=names[-1], label="Second model", filterable=False)
    return first, second


def _answer_box(label: str, elem_id: str, lines: int) -> gr.Textbox:
    return gr.Textbox(
        label=label,
        lines=lines,
        max_lines=24,
        interactive=False,
        elem_id=elem_id,
        elem_classes="answer",
        buttons=["copy"],
    )


def _buttons(label: str, elem_id: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(label, variant="primary", elem_id=elem_id)
        stop = gr.Button("Stop", variant="stop", elem_id=f"{elem_id}-stop")
    return go, stop


def _answering(
    triggers: Sequence[Any], answer: Callable[..., Any], inputs: Any, outputs: Any, stop: gr.Button, page: Page
) -> None:
    """Start `answer` by any of the triggers, and end it by the stop button."""
    for trigger in triggers:
        trigger(answer, inputs, outputs, concurrency_limit=None, **_PRIVATE)
    stop.click(_leaver(page), None, None, concurrency_limit=None, **_PRIVATE)


def _leaver(page: Page) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        page.stop(_session(request))

    return leave


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


class _shown:
    """Errors of the caller's making, inside the block, are shown on the page as they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, GladeError):
            raise gr.Error(str(error), duration=None, print_exception=False) from error


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*values: Any) -> Any:
        with _shown():
            return function(*values)

    return guarded
