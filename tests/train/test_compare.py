"""`glade compare` on real, tiny runs."""

import json

import pytest

from glade import config as settings
from glade.errors import CheckpointError, ConfigError
from glade.train.compare import CompareConfig, run
from glade.train.config import TrainRun
from glade.train.pretrain import train

TINY = {
    "model.dim": 16,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "data.corpus": "stories:40",
    "data.context": 32,
    "train.batch_tokens": 128,
    "train.max_steps": 4,
    "train.eval_every": 2,
    "train.sample_tokens": 0,
}


def test_table_plot_and_json(tmp_path, capsys):
    folders = []
    for mixer in ("gla", "softmax"):
        folder = str(tmp_path / mixer)
        values = TINY | {"model.mixer": mixer, "run": folder, "data.cache": str(tmp_path / "cache")}
        train(settings.replace(TrainRun(), values))
        folders.append(folder)
    run(CompareConfig(runs=tuple(folders), out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "gla" in printed and "softmax" in printed and "compare.png" in printed
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["heldout_loss"] for row in table] == sorted(row["heldout_loss"] for row in table)
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"

    other = str(tmp_path / "other")
    values = TINY | {"run": other, "data.tokenizer": "byte", "data.cache": str(tmp_path / "cache")}
    train(settings.replace(TrainRun(), values))
    with pytest.raises(ConfigError, match="different held-out texts"):
        run(CompareConfig(runs=(*folders, other), out=tmp_path / "out"))
    (tmp_path / "other" / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run(CompareConfig(runs=(other,), out=tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"no results\.json"):
        run(CompareConfig(runs=(str(tmp_path),), out=tmp_path / "out"))
