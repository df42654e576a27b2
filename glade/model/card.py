"""The model card: the README.md of a checkpoint folder, made from the model and what the trainer recorded."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glade.model.lm import LanguageModel


def model_card(model: "LanguageModel", metadata: Mapping[str, Any]) -> str:
    """Markdown: architecture, size, state, how to load, and the training metadata, data credit first."""
    config = model.config
    rows = {
        "layers": _layers(config.layer_mixers),
        "width": config.dim,
        "feed-forward": config.ffn + (f", {config.ffn_dim} hidden" if config.ffn_dim else ""),
        "norm": f"{config.norm}, {config.norm_placement}-norm",
        "vocabulary": config.vocab_size,
        "head": "tied to the embedding" if config.tie_embeddings else "its own",
        "parameters": f"{model.num_parameters():,}",
        "without embeddings": f"{model.num_parameters(embeddings=False):,}",
        "state after 1,024 tokens": f"{model.state_bytes(1024):,} bytes a sequence",
        "state after 8,192 tokens": f"{model.state_bytes(8192):,} bytes a sequence",
    }
    parts = ["# A glade language model", _table(rows)]
    parts.append('## Use\n\n```python\nimport glade\n\nmodel = glade.load("path/to/this/folder")\n```')
    if metadata.get("credit"):
        parts.append(f"## Data credit\n\n{metadata['credit']}")
    rest = {key: value for key, value in metadata.items() if key != "credit"}
    if rest:
        parts.append("## Training\n\n" + _table(rest))
    parts.append("Every setting is in `config.json`, every recorded fact of the training in `training_metadata.json`.")
    return "\n\n".join(parts) + "\n"


def _layers(mixers: tuple[str, ...]) -> str:
    runs = [(mixer, len(list(run))) for mixer, run in groupby(mixers)]
    if len(runs) > 8:
        runs = [(mixer, mixers.count(mixer)) for mixer in dict.fromkeys(mixers)]
    return f"{len(mixers)}: " + ", ".join(f"{count} {mixer}" for mixer, count in runs)


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for key, value in rows.items():
        text = " ".join(str(value).split()).replace("|", "\\|")
        lines.append(f"| {key} | {text} |")
    return "\n".join(lines)
