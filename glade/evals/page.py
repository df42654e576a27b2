"""The report on two models as one HTML page: no script, nothing fetched from anywhere, every text escaped."""

from typing import Any

import jinja2

from glade.evals.repetition import repeats

# (key, name, what it says, digits, whether it is a share)
_ROWS = (
    ("score", "score", "mean of the scorer", 3, False),
    ("rep_2", "rep-2", "word pairs that occurred before in the answer", 1, True),
    ("rep_3", "rep-3", "the same of three words", 1, True),
    ("rep_4", "rep-4", "the same of four words", 1, True),
    ("diversity", "diversity", "product of 1 − rep-n for n = 2, 3, 4", 3, False),
    ("distinct_1", "distinct-1", "different words, of all answers together", 3, False),
    ("distinct_2", "distinct-2", "different word pairs, of all answers together", 3, False),
    ("distinct_3", "distinct-3", "the same of three words", 3, False),
    ("words", "length", "words an answer", 1, False),
    ("tokens", "tokens", "tokens an answer, the end included", 1, False),
    ("finished", "finished", "answers that the model ended itself", 1, True),
)

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ base.name }} and {{ aligned.name }}</title>
<style>
:root { --text: #1c2126; --soft: #5b6670; --line: #d9dee3; --card: #ffffff; --page: #f4f6f8; --base: #8a949e;
  --aligned: #1f6f8b; --mark: #fbe3b3; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5af; --line: #343c44; --card: #1d2329;
  --page: #14181c; --base: #77828c; --aligned: #58b4d1; --mark: #5a4716; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: .75rem; }
.bar + .soft { margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.bar { display: flex; height: 1.75rem; margin: .5rem 0; border-radius: 4px; overflow: hidden;
  border: 1px solid var(--line); }
.bar span { display: block; } .wins { background: var(--aligned); } .losses { background: var(--base); }
.ties { background: repeating-linear-gradient(45deg, var(--line) 0 4px, transparent 4px 8px); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0;
  padding: 1rem 1.25rem; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; margin-top: .75rem; }
.pair > div { border-top: 3px solid var(--base); padding-top: .5rem; min-width: 0; }
.pair > div.aligned { border-color: var(--aligned); }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: var(--mark); color: inherit; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } .scroll td { white-space: nowrap; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ base.name }} and {{ aligned.name }}</h1>
<p class="soft">{{ report.num_prompts }} prompts ({{ report.settings.prompts }}), {{ report.settings.num }}
{{ "answer" if report.settings.num == 1 else "answers" }} of each model to each, at most
{{ report.settings.max_new_tokens }} tokens, temperature {{ report.settings.temperature }}, top-k
{{ report.settings.top_k or "off" }}, top-p {{ report.settings.top_p }}, seed {{ report.settings.seed }}.
{% for model in report.models %}{{ model.name }}: {{ model.path }},
{{ "{:,}".format(model.parameters) }} parameters. {% endfor %}</p>

<h2>How often {{ aligned.name }} wins</h2>
{{ contest(report.scores, "scorer: " ~ report.scorer) }}
{% if report.votes %}{{ contest(report.votes, "votes of people") }}{% endif %}

<h2>Measures</h2>
<div class="scroll"><table>
<thead><tr><th>measure</th><th class="number">{{ base.name }}</th><th class="number">{{ aligned.name }}</th>
<th class="number">change</th><th>what it is</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td class="number">{{ row.base }}</td><td class="number">{{ row.aligned }}</td>
<td class="number">{{ row.change }}</td><td class="soft">{{ row.help }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if report.kl.per_token is none %}
<p class="soft">No KL: {{ report.kl.note }}.</p>
{% else %}
<p>KL({{ aligned.name }} ‖ {{ base.name }}) on the answers of {{ aligned.name }}:
{{ "%.4f"|format(report.kl.per_token) }} nats a token, {{ "%.2f"|format(report.kl.per_answer) }} nats an answer
<span class="soft">(of the models' own distributions, at temperature 1).</span></p>
{% endif %}

<h2>Answers</h2>
<p class="soft">Highlighted: words of a three-word sequence that stood in the same answer before.</p>
{% for entry in report.answers %}
<section class="card">
{% if entry.prompt is string %}
<p class="prompt">{{ entry.prompt }}</p>
{% else %}
{% for message in entry.prompt %}<p class="prompt">{{ message.role }}: {{ message.content }}</p>{% endfor %}
{% endif %}
{% for i in range(entry.base|length) %}
<div class="pair">
{{ answer(base.name, entry.base[i], "base") }}
{{ answer(aligned.name, entry.aligned[i], "aligned") }}
</div>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""

_MACROS = """\
{% macro contest(tally, what) %}
{% set num = tally.wins + tally.losses + tally.ties %}
<p><strong>{{ "%.1f"|format(100 * tally.win_rate) }} %</strong> of {{ num }} comparisons, a tie counting half
(95 % interval {{ "%.1f"|format(100 * tally.interval[0]) }} to {{ "%.1f"|format(100 * tally.interval[1]) }} %);
{{ what }}</p>
<div class="bar" role="img"
aria-label="{{ tally.wins }} wins, {{ tally.ties }} ties, {{ tally.losses }} losses"><span class="wins"
style="width: {{ 100 * tally.wins / num }}%"></span><span class="ties"
style="width: {{ 100 * tally.ties / num }}%"></span><span class="losses"
style="width: {{ 100 * tally.losses / num }}%"></span></div>
<p class="soft">wins {{ tally.wins }}, ties {{ tally.ties }}, losses {{ tally.losses }}</p>
{% endmacro %}
{% macro answer(name, one, side) %}
<div class="{{ side }}"><p class="soft">{{ name }} · score {{ "%.3f"|format(one.score) }}
{{- "" if one.finished else " · cut off" }}</p>
<div class="answer">{% for piece, again in repeats(one.text.strip()) %}
{%- if again %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}
{%- endfor %}</div></div>
{% endmacro %}
"""


def render_page(report: dict[str, Any]) -> str:
    """The page of a report, as `glade.evals.report.make_report` gives it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals["repeats"] = repeats
    macros = environment.from_string(_MACROS).module
    base, aligned = report["models"]
    return environment.from_string(_PAGE).render(
        report=report,
        base=base,
        aligned=aligned,
        rows=table_rows(report),
        contest=macros.contest,  # pyright: ignore[reportAttributeAccessIssue]
        answer=macros.answer,  # pyright: ignore[reportAttributeAccessIssue]
    )


def table_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """The table of measures: each with the two models' values, their difference, and what it is."""
    base, aligned = report["measures"]
    rows = [_row(name, help, base[key], aligned[key], digits, share) for key, name, help, digits, share in _ROWS]
    if report["heldout"]:
        first, second = report["heldout"]
        where = f"on {first['tokens']:,} tokens of {report['heldout_text']}"
        rows.append(_row("perplexity", where, first["perplexity"], second["perplexity"], 3, False))
        rows.append(_row("bits a byte", where, first["bits_per_byte"], second["bits_per_byte"], 4, False))
    return rows


def _row(name: str, help: str, base: float, aligned: float, digits: int, share: bool) -> dict[str, str]:
    factor, unit = (100, " %") if share else (1, "")
    values = [f"{factor * value:.{digits}f}{unit}" for value in (base, aligned)]
    change = f"{factor * (aligned - base):+.{digits}f}{' points' if share else ''}"
    return {"name": name, "base": values[0], "aligned": values[1], "change": change, "help": help}
