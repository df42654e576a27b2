"""What the page does, without a browser: answers followed and stopped, next tokens, votes, pictures, the widgets."""

import asyncio
import base64
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import httpx
import pytest

from glade.errors import ConfigError, DataError
from glade.evals.votes import read_votes, tally
from glade.infer.config import SamplingParams
from glade.infer.generate import generate
from glade.infer.score import score
from glade.infer.text import TokenBytes
from glade.serve.config import ServeSettings
from glade.serve.page import Page, sampling
from glade.serve.pictures import bars, coloured, meter, size_text
from glade.serve.ui import build
from glade.serve.votes import Ballot, VoteBox

GREEDY = SamplingParams(temperature=0, max_new_tokens=20, seed=0)


@pytest.fixture
def page(server: Any, tmp_path: Path) -> Page:
    return Page(server.models, ServeSettings(votes=tmp_path / "votes.jsonl"))


def follow(page: Page, drafts: Any, session: str = "me", stop_after: int | None = None) -> int:
    """Draws the drafts to their end, in a loop of its own; how often there was something to show."""

    async def drawing() -> int:
        seen = 0
        async for _ in page.follow(session, drafts):
            seen += 1
            if seen == stop_after:
                page.stop(session)
        return seen

    return asyncio.run(drawing())


def test_a_draft_becomes_what_generate_says(server: Any, page: Page) -> None:
    drafts = [page.draft("base", "Hello", GREEDY), page.draft("chat", "Hello", GREEDY)]
    follow(page, drafts)
    for draft in drafts:
        model = draft.served.model
        assert draft.text == generate(model, "Hello", temperature=0, max_new_tokens=20)
        how = {"length": "reached its length", "eos": "ended by the model"}[draft.finished or ""]
        assert draft.num_tokens == 20 or draft.finished == "eos"
        assert draft.status().startswith(f"{how}: {draft.num_tokens} tokens, ") and "seed 0" in draft.status()
        assert f"after {len(draft.prompt) + draft.num_tokens:,} tokens" in draft.meter()


def test_a_stopped_draft_keeps_what_it_has_and_frees_its_slot(server: Any, page: Page) -> None:
    draft = page.draft("base", "a", SamplingParams(max_new_tokens=4000, seed=1))
    draft.served.engine.stats()
    follow(page, [draft], stop_after=3)
    assert draft.finished != "length" and draft.num_tokens < 4000
    assert server.idle("base")


def test_two_visitors_do_not_stop_each_other(server: Any, page: Page) -> None:
    async def both() -> list[Any]:
        drafts = [page.draft("base", "a", SamplingParams(max_new_tokens=100, seed=s)) for s in range(2)]

        async def visit(i: int) -> None:
            async for _ in page.follow(f"visitor {i}", [drafts[i]]):
                page.stop("somebody else")

        await asyncio.gather(visit(0), visit(1))
        return drafts

    assert all(draft.num_tokens == 100 or draft.finished == "eos" for draft in asyncio.run(both()))


def test_a_visitor_who_leaves_takes_the_answer_along(server: Any, page: Page) -> None:
    async def leave() -> None:
        following = page.follow("me", [page.draft("base", "a", SamplingParams(max_new_tokens=4000))])
        await anext(following)
        await following.aclose()

    asyncio.run(leave())
    assert server.idle("base")


def test_a_conversation_is_read_as_the_model_reads_it(server: Any, page: Page) -> None:
    turns = [("user", "one"), ("assistant", " two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in turns]
    base, chat = server.models["base"].tokenizer, server.models["chat"].tokenizer
    assert page.draft("base", messages, GREEDY).prompt == tuple(base.prompt("one two\nthree"))
    assert page.draft("chat", messages, GREEDY).prompt == tuple(chat.chat_ids(messages))


def test_the_page_keeps_the_server_s_limits(server: Any, tmp_path: Path) -> None:
    page = Page(server.models, ServeSettings(max_prompt_tokens=5, max_new_tokens=10, votes=tmp_path / "v"))
    with pytest.raises(DataError, match="reads 5"):
        page.draft("base", "too long", GREEDY)
    with pytest.raises(ConfigError, match="at most 10"):
        page.draft("base", "a", GREEDY)


def test_the_controls_make_settings() -> None:
    made = sampling(0.5, 40, 0.9, 0.1, 1.1, 64, " 7 ", "\\n\\n\nEND\n")
    assert made == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        max_new_tokens=64,
        seed=7,
        stop=("\n\n", "END"),
    )
    seeds = {sampling(1, 0, 1, 0, 1, 1, "", "").seed for _ in range(5)}
    assert len(seeds) == 5 and None not in seeds
    for seed in ("abc", "-1", "1.5", "9" * 30, "²"):
        with pytest.raises(ConfigError, match="whole number"):
            sampling(1, 0, 1, 0, 1, 1, seed, "")
    with pytest.raises(ConfigError, match="temperature"):
        sampling(math.nan, 0, 1, 0, 1, 1, "", "")


def test_next_tokens_are_those_of_score(server: Any, page: Page) -> None:
    found = asyncio.run(page.look("base", "To be"))
    wanted = score(found.served.model, found.served.tokenizer, "To be", top=12)
    assert [token.id for token in found.text_tokens] == wanted.token_ids
    assert [token.logprob for token in found.text_tokens] == pytest.approx(wanted.logprobs, abs=1e-4)
    last = found.ranked(len(wanted.token_ids))
    assert [p for _, p in last] == pytest.approx(wanted.next_probabilities, abs=1e-4)
    assert f"perplexity {wanted.perplexity:.2f}" in found.summary()
    assert asyncio.run(page.look("base", "")).summary() == "what documents begin with"


def test_a_vote_is_blind_kept_and_read_by_others(server: Any, page: Page, tmp_path: Path) -> None:
    orders = set()
    for verdict in ("left", "right", "tie") * 4:
        drafts = page.pair("base", "chat", "q", GREEDY, False)
        follow(page, drafts)
        ballot = page.ballot("q", False, drafts)
        orders.add(ballot.models)
        told = page.vote(ballot, verdict)  # type: ignore[arg-type]
        assert all(name in told for name in ballot.models)
    assert orders == {("base", "chat"), ("chat", "base")}
    votes = read_votes(tmp_path / "votes.jsonl")
    counted = tally(votes, "base", "chat")
    assert counted.num == 12 and counted.ties == 4
    assert page.votes.tally("chat", "base") == (counted.wins, counted.losses, counted.ties)
    # a server that starts again goes on counting
    assert VoteBox(tmp_path / "votes.jsonl").tally("chat", "base") == page.votes.tally("chat", "base")
    with pytest.raises(ConfigError, match="two different models"):
        page.pair("base", "base", "q", GREEDY, False)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"line 1: no vote.*--serve\.votes"):
        VoteBox(tmp_path / "other.jsonl")


def test_the_answer_that_was_preferred_is_the_chosen_one() -> None:
    ballot = Ballot("q", ("left text", "right text"), ("x", "y"), {"seed": 1})
    assert ballot.row("right")["chosen"] == "right text" and ballot.row("right")["model_chosen"] == "y"
    assert ballot.row("left")["rejected"] == "right text" and not ballot.row("left")["tie"]
    assert ballot.row("tie")["tie"]


def test_the_meter_is_flat_where_the_state_is() -> None:
    drawn = meter(lambda t: 84_008, lambda t: 8 + 4096 * t, 300)
    lines = [line.get("points", "") for line in ET.fromstring(drawn).iter("polyline")]
    growing, flat = ({point.split(",")[1] for point in line.split()} for line in lines)
    assert len(flat) == 1 and len(growing) > 50
    assert "82 KiB" in drawn and "1.2 MiB" in drawn and "14.6 times as much" in drawn
    assert "times less, so far" in meter(lambda t: 84_008, lambda t: 8 + 4096 * t, 3)
    assert "1,048,576" in meter(lambda t: 84_008, lambda t: 8 + 4096 * t, 600_000)


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (0, 1000, 1024, 1536, 20_000_000, 5 * 2**40)] == [
        "0 B", "1000 B", "1 KiB", "1.5 KiB", "19 MiB", "5120 GiB",
    ]  # fmt: skip


def test_a_text_of_tags_stays_a_text(server: Any, page: Page) -> None:
    found = asyncio.run(page.look("base", '<script>"&'))
    drawn = coloured(found.text_tokens, TokenBytes(found.served.tokenizer), 2)
    spans = list(ET.fromstring(drawn.replace("&nbsp;", " ")).iter("span"))
    assert "".join(span.text or "" for span in spans) == '<script>"&'
    assert [i for i, span in enumerate(spans) if "chosen" in span.get("class", "")] == [2]
    rows = list(ET.fromstring(bars([("<b>", 0.5), ("\n", 0.25)], "\n")).iter("tr"))
    assert [row[0][0].text for row in rows] == ["<b>", "\\n"]
    assert [row.get("class") for row in rows] == ["other", "drawn"]


def test_the_curves_of_the_run_are_inside_the_page(start: Any, make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    picture = b"\x89PNG not really"
    (tmp_path / "run" / "curves.png").write_bytes(picture)
    heldout = {"loss": 1.25, "bits_per_byte": 1.8, "accuracy": 0.5}
    results = {"results": {"tokens": 1000, "step": 10, "heldout": heldout}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    with start() as server:
        models = {name: _at(served, folder) for name, served in server.models.items()}
        shown = Page(models, ServeSettings(votes=tmp_path / "v")).curves("base")
        assert base64.b64encode(picture).decode() in shown and "1.2500 nats" in shown and "50.0 %" in shown
        # of answers, and of preference pairs
        for measures, told in (({}, "1.2500 nats"), ({"accuracy": 0.75, "margin": 2.0}, "chosen rated above rejected")):
            results["results"]["heldout"] = {"loss": 1.25, **measures}
            (tmp_path / "run" / "results.json").write_text(json.dumps(results))
            assert told in Page(models, ServeSettings(votes=tmp_path / "v")).curves("base")
        assert "no run folder" in Page(server.models, ServeSettings(votes=tmp_path / "v")).curves("base")


def _at(served: Any, folder: Path) -> Any:
    from dataclasses import replace

    return replace(served, folder=folder)


def test_the_page_is_built_of_everything_it_promises(page: Page) -> None:
    config = build(page).get_config_file()
    tabs = [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]
    assert tabs == ["Write", "Chat", "Side by side", "Next token", "Blind vote", "Training run"]
    assert config["analytics_enabled"] is False
    for dependency in config["dependencies"]:
        assert dependency["api_visibility"] != "public"


@pytest.fixture(scope="module")
def with_page(tmp_path_factory: pytest.TempPathFactory, session_start: Any) -> Any:
    folder = tmp_path_factory.mktemp("page")
    with session_start(folder, ui=True, votes=folder / "votes.jsonl") as server:
        yield server


def test_the_page_is_served_and_nothing_else_of_gradio_s(with_page: Any) -> None:
    url = with_page.url
    assert httpx.get(url).headers["location"] == "/ui/"
    assert "language models whose memory does not grow" in httpx.get(f"{url}/ui/").text
    assert httpx.get(f"{url}/votes.jsonl").text == ""
    for method, path in (
        ("POST", "/ui/gradio_api/upload"),
        ("GET", "/ui/gradio_api/file=/etc/passwd"),
        ("GET", "/ui/gradio_api/proxy=http://example.com"),
        ("POST", "/ui/gradio_api/run/predict"),
        ("GET", "/ui/gradio_api/info"),
        ("GET", "/ui/monitoring"),
        ("GET", "/ui/login"),
    ):
        answer = httpx.request(method, url + path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", path
    crossing = httpx.post(f"{url}/ui/gradio_api/queue/join", json={}, headers={"sec-fetch-site": "cross-site"})
    assert crossing.status_code == 403
    # the API is beside it
    assert len(list(with_page.client().models.list())) == 2


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(with_page: Any, chromium: Any) -> None:
    """Load, type, stream, stop, chat, compare, look, vote; no request leaves the machine."""
    elsewhere: list[str] = []

    def local_only(route: Any) -> None:
        if route.request.url.startswith((with_page.url, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context = chromium.new_context(viewport={"width": 1360, "height": 1000})
    context.route("**/*", local_only)
    view = context.new_page()
    view.set_default_timeout(60_000)
    view.goto(with_page.url)

    def open_tab(name: str) -> None:
        view.get_by_role("tab", name=name).click()

    def holds(selector: str, condition: str) -> None:
        view.wait_for_function(f"(e => {condition})(document.querySelector({selector!r}))")

    model = with_page.models["base"].model
    # one that goes on for a while: there is something to watch, and to stop
    texts = ((seed, generate(model, "Once", max_new_tokens=150, seed=seed)) for seed in range(1000))
    view.fill("#seed input, #seed textarea", str(next(seed for seed, text in texts if len(text) == 150)))
    view.fill("#length input[type=number]", "4000")
    view.fill("#prompt textarea", "Once")
    view.click("#write")
    holds("#output textarea", "e.value.startsWith('Once') && e.value.length > 30")
    holds("#meter", "/after [0-9,]+ tokens/.test(e.innerText) && !e.innerText.includes('after 1 tokens')")
    view.click("#write-stop")
    holds("#status", "e.innerText.startsWith('stopped') || e.innerText.startsWith('ended by')")
    assert with_page.idle("base")

    view.fill("#length input[type=number]", "20")
    view.fill("#seed input, #seed textarea", "5")
    view.click("#write")
    holds("#status", "e.innerText.includes('20 tokens') && e.innerText.includes('seed 5')")
    wanted = generate(model, "Once", max_new_tokens=20, temperature=0.8, seed=5)
    assert view.input_value("#output textarea") == "Once" + wanted

    open_tab("Chat")
    view.fill("#said textarea", "Hello")
    view.click("#send")
    holds("#talk", "e.innerText.includes('Hello')")
    holds("#said textarea", "e.value === ''")
    assert with_page.idle("base")

    open_tab("Side by side")
    view.fill("#both textarea", "Two")
    view.click("#compare")
    holds("#left textarea", "e.value.length > 5")
    holds("#right textarea", "e.value.length > 5")
    assert with_page.idle("base") and with_page.idle("chat")

    open_tab("Next token")
    view.click("#look-go")
    holds("#tokens", "e.innerText.replace(/[^a-z]/gi, '') === 'Tobeornottobe'")
    holds("#ranked", "e.querySelectorAll('tr').length === 12")

    open_tab("Blind vote")
    view.fill("#vote-prompt textarea", "Q")
    view.click("#pair")
    view.wait_for_selector("#vote-left:not([disabled])")
    view.click("#vote-left")
    holds("#told", "e.innerText.includes('You preferred A')")
    (vote,) = httpx.get(f"{with_page.url}/votes.jsonl").text.splitlines()
    assert {json.loads(vote)["model_chosen"], json.loads(vote)["model_rejected"]} == {"base", "chat"}

    open_tab("Write")
    view.fill("#seed input, #seed textarea", "no number")
    view.click("#write")
    view.wait_for_selector("text=give a whole number")
    assert elsewhere == []
    context.close()
