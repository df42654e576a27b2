"""What the page draws: the meter of the state, text coloured by probability, bars. Pure: values in, HTML out."""

import html
import math
from collections.abc import Callable, Sequence

from glade.infer.text import TextToken, TokenBytes
from glade.serve.forms import token_text

Bytes = Callable[[int], int]  # number of tokens -> bytes

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 520, 190, 64, 26, 12
_STEPS = 64
_DRAWN = ("other", "drawn")


def meter(state: Bytes, softmax: Bytes, num_tokens: int) -> str:
    """What one sequence holds after `num_tokens` tokens, now and as it goes on, beside a softmax model's.

    Args:
        state, softmax: bytes after some number of tokens
    """
    longest = max(1024, 2 ** math.ceil(math.log2(max(num_tokens, 1) * 1.25)))
    highest = max(state(longest), softmax(longest))

    def at(tokens: float, size: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 10) * tokens / longest
        return f"{x:.1f},{_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * size / highest:.1f}"

    def line(size: Bytes, css: str) -> str:
        tokens = [round(longest * i / _STEPS) for i in range(_STEPS + 1)]
        return f'<polyline class="{css}" points="{" ".join(at(t, size(t)) for t in tokens)}"/>'

    def dot(size: Bytes, css: str) -> str:
        x, y = at(num_tokens, size(num_tokens)).split(",")
        return f'<circle class="{css}" cx="{x}" cy="{y}" r="5"/>'

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y}" y2="{y}"/>'
        f'<text x="{_LEFT - 8}" y="{float(y) + 4}" text-anchor="end">{size_text(highest * part / 2)}</text>'
        for part in (0, 1, 2)
        for y in [at(0, highest * part / 2).split(",")[1]]
    )
    ticks = "".join(
        f'<text x="{at(longest * part / 2, 0).split(",")[0]}" y="{_HEIGHT - 8}" '
        f'text-anchor="{("start", "middle", "end")[part]}">{longest * part // 2:,}</text>'
        for part in (0, 1, 2)
    )
    ratio = softmax(num_tokens) / state(num_tokens)
    told = f"{ratio:.1f} times as much" if ratio >= 1 else f"{1 / ratio:.1f} times less, so far"
    return (
        '<div class="meter"><div class="figures">'
        f'<span class="now"><b>{size_text(state(num_tokens))}</b> of state after {num_tokens:,} tokens</span>'
        f'<span class="then"><b>{size_text(softmax(num_tokens))}</b> in a softmax model of this size: {told}</span>'
        f'</div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="bytes held against tokens">{grid}{ticks}'
        f"{line(softmax, 'then')}{line(state, 'now')}{dot(softmax, 'then')}{dot(state, 'now')}</svg></div>"
    )


def size_text(num_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if num_bytes >= 10 or num_bytes == int(num_bytes) else f"{num_bytes:.1f} {unit}"


def coloured(tokens: Sequence[TextToken], token_bytes: TokenBytes, chosen: int) -> str:
    """A text, each token coloured by the probability that it had after those before; the one at `chosen` framed."""
    spans = []
    for i, token in enumerate(tokens):
        text = token_text(token_bytes[token.id])
        p = math.exp(token.logprob)
        title = f"{i + 1}: {text!r}, p = {p:.4f}" if i else f"1: {text!r}"
        frame = " chosen" if i == chosen else ""
        shown = html.escape(text).replace("\n", "⏎\n") if text.strip(" ") or len(text) > 1 else "␣" if frame else " "
        # from 0 (p = 1) to 1 (p below e^-6)
        heat = min(-token.logprob / 6, 1.0)
        spans.append(
            f'<span class="token{frame}" style="--heat:{heat:.2f}" title="{html.escape(title)}">{shown}</span>'
        )
    return f'<div class="tokens">{"".join(spans)}</div>'


def bars(ranked: Sequence[tuple[str, float]], drawn: str | None = None) -> str:
    """The most likely tokens at one place as bars: text and probability, best first; `drawn` is what stands there."""
    best = max((p for _, p in ranked), default=1.0)
    rows = "".join(
        f'<tr class="{_DRAWN[text == drawn]}"><td><code>{html.escape(repr(text)[1:-1].replace(" ", "␣"))}</code></td>'
        f'<td class="bar"><div style="width:{100 * p / best:.1f}%"></div></td><td>{100 * p:.2f} %</td></tr>'
        for text, p in ranked
    )
    return f'<table class="bars">{rows}</table>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Short facts, side by side."""
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in rows)
    return f'<div class="facts">{cells}</div>'


STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.masthead { display: flex; align-items: baseline; gap: .8rem; flex-wrap: wrap; padding: .2rem 0; }
.masthead h1 { font-size: 1.9rem; font-weight: 750; letter-spacing: -.03em; margin: 0; }
.masthead span { opacity: .7; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; }
.facts div { display: flex; flex-direction: column; line-height: 1.25; }
.facts b { font-weight: 650; }
.facts span { font-size: .78rem; opacity: .65; }
.answer textarea { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92rem; line-height: 1.5; }
.meter .figures { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; font-size: .9rem; margin-bottom: .2rem; }
.meter .now b { color: #0f8a6c; } .meter .then b { color: #c2571a; }
.meter svg { width: 100%; max-height: 230px; }
.meter polyline { fill: none; stroke-width: 3; } .meter text { font-size: 11px; fill: currentColor; opacity: .7; }
.meter polyline.now { stroke: #12a37f; } .meter polyline.then { stroke: #e07b39; stroke-dasharray: 7 5; }
.meter circle.now { fill: #12a37f; } .meter circle.then { fill: #e07b39; }
.meter .grid { stroke: currentColor; opacity: .14; }
.tokens { white-space: pre-wrap; line-height: 2; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.tokens .token { background: color-mix(in srgb, #e0562f calc(var(--heat) * 62%), transparent); border-radius: 3px; }
.tokens .chosen { outline: 2px solid #12a37f; }
.bars { width: 100%; border-collapse: collapse; border: none !important; }
.bars tr, .bars td { border: none !important; background: none !important; } .bars td { padding: .16rem .5rem; }
.bars td:first-child { width: 7rem; } .bars td:last-child { width: 6rem; text-align: right; }
.bars .bar div { height: .95rem; border-radius: 4px; background: #12a37f; opacity: .8; }
.bars .drawn code { font-weight: 800; } .bars .drawn .bar div { background: #e07b39; }
.curves img { width: 100%; border-radius: 8px; background: white; }
.note { opacity: .75; font-size: .9rem; }
"""
