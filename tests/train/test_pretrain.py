"""Whole runs, tiny: what is written, that training learns, and that stopping changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import glade
from glade import config as settings
from glade.errors import CheckpointError, ConfigError
from glade.train.config import TrainRun
from glade.train.log import read_metrics
from glade.train.loop import NonFiniteLoss
from glade.train.pretrain import train
from glade.train.resume import next_run

BASE = {
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "data.corpus": "stories:60",
    "data.context": 32,
    "train.batch_tokens": 256,
    "train.max_steps": 12,
    "train.eval_every": 4,
    "train.eval_tokens": 500,
    "train.log_every": 1,
    "train.sample_tokens": 8,
    "train.precision": "fp32",
}


@pytest.fixture
def run_config(tmp_path):
    def build(name="run", **changes):
        values = {**BASE, "data.cache": str(tmp_path / "cache"), "run": str(tmp_path / name)}
        return settings.replace(TrainRun(), values | {key.replace("__", "."): v for key, v in changes.items()})

    return build


def weights(results):
    return load_file(results.run / "checkpoints" / "last" / "model.safetensors")


def metrics(results):
    clock = ("seconds", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in read_metrics(results.run)]


def assert_same_run(a, b):
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert metrics(a) == metrics(b)


def test_a_run_leaves_what_the_contract_says(run_config):
    config = run_config(train__max_steps=40, train__eval_every=20, train__lr=0.01)
    results = glade.train(config)
    folder = results.run
    for name in ("config.yaml", "metrics.jsonl", "samples.txt", "curves.png", "results.json"):
        assert (folder / name).stat().st_size > 0, name
    for link in ("best", "last"):
        path = folder / "checkpoints" / link
        assert path.is_symlink() and not os.path.isabs(os.readlink(path))
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
                     "training_metadata.json", "trainer"):  # fmt: skip
            assert (path / name).exists(), name
    losses = [row["loss"] for row in read_metrics(folder) if "loss" in row]
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.5
    assert results.heldout is not None and results.heldout.tokens > 1000
    written = json.loads((folder / "results.json").read_text())
    assert written["results"]["heldout"]["loss"] == results.heldout.loss
    assert settings.load(TrainRun, folder / "config.yaml").model.vocab_size == written["data"]["vocab_size"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"

    model = glade.load(folder)
    assert glade.generate(model, "The", max_new_tokens=5, seed=0) == glade.generate(
        model, "The", max_new_tokens=5, seed=0
    )


def test_what_is_said_is_said_to_the_letter(run_config, capsys):
    train(run_config(data__corpus="stories:100", train__max_steps=1, train__sample_tokens=0))
    assert "text stories:100:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layers, folder",
    [("", "gdn2-001"), ("kda", "kda-001"), ("gdn2 swa gdn2 gla", "gdn2-swa-gla-001")],
)
def test_a_run_is_called_after_its_mixers(tmp_path, monkeypatch, layers, folder):
    monkeypatch.chdir(tmp_path)
    config = settings.replace(TrainRun(), {**BASE, "model.num_layers": 4, "model.layers": layers})
    assert str(next_run(config.name)) == f"runs/{folder}"


def test_checkpoints_kept(run_config):
    results = train(run_config(train__save_every=1, train__eval_every=5, train__keep=2))
    steps = sorted(p.name for p in (results.run / "checkpoints").iterdir() if not p.is_symlink())
    best = f"step-{results.progress.best_step:08d}"
    assert steps == sorted({best, "step-00000012", "step-00000010", "step-00000011"})


def test_the_same_config_gives_the_same_run(run_config):
    assert_same_run(train(run_config("a")), train(run_config("b")))


@pytest.mark.parametrize("mixer", ["gdn2", "softmax"])
@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_equals_uninterrupted_to_the_bit(run_config, mixer, stop):
    changes = dict(model__mixer=mixer, model__dropout=0.1, train__accumulate=2)
    whole = train(run_config("whole", **changes))
    first = train(run_config("parts", **changes, train__stop_after=stop))
    assert first.progress.step == stop and first.heldout is None
    second = train(run_config("parts", **changes, resume=True))
    assert_same_run(whole, second)
    assert whole.progress.best == second.progress.best


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_is_the_same(run_config, tmp_path):
    changes = dict(train__max_steps=120, train__eval_every=50, train__sample_tokens=0)
    whole = train(run_config("whole", **changes))
    config = run_config("parts", **changes)
    settings.save(config, tmp_path / "parts.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "glade", "train", str(tmp_path / "parts.yaml")], stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "parts" / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < 20:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in output
    assert 20 <= len(read_metrics(tmp_path / "parts")) < 120
    assert_same_run(whole, train(replace(config, resume=True)))


def test_resuming_after_a_crash_repeats_what_was_not_saved(run_config):
    whole = train(run_config("whole"))
    train(run_config("parts", train__stop_after=6))
    with open(whole.run.parent / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "tokens": 1792, "loss": 99.0}\n{"step": 8, "tok')
    assert_same_run(whole, train(run_config("parts", resume=True)))


def test_going_on_with_a_larger_budget_and_a_longer_context(run_config):
    train(run_config())
    results = train(run_config(resume=True, train__max_steps=20, data__context=64))
    assert results.progress.step == 20 and results.progress.tokens == 20 * 256


def test_resume_refuses_another_model_and_a_missing_run(run_config):
    with pytest.raises(CheckpointError, match="no checkpoints/last to resume from"):
        train(run_config(resume=True))
    train(run_config(train__max_steps=2))
    with pytest.raises(ConfigError, match=r"trained otherwise \(model\.dim: 32 to 48"):
        train(run_config(resume=True, model__dim=48))
    with pytest.raises(ConfigError, match="--resume"):
        train(run_config())


def test_accumulated_passes_are_one_step(run_config):
    losses = []
    for name, accumulate in (("one", 1), ("four", 4)):
        results = train(run_config(name, train__accumulate=accumulate, train__max_steps=5))
        losses.append([row["loss"] for row in read_metrics(results.run) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_clock_limits_a_run(run_config):
    results = train(run_config(train__max_steps=None, train__max_minutes=0.03, train__eval_every=0))
    assert results.progress.step > 0 and results.heldout is not None
    rates = [row["lr"] for row in read_metrics(results.run) if "lr" in row]
    assert rates[-1] < 0.5 * max(rates)


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(run_config, monkeypatch):
    # the steps after the fourth are taken too before any is looked at
    config = run_config(train__max_steps=6, train__log_every=6)
    from glade.train import loop

    take, diagnosis = loop.Trainer._take, loop.Trainer._diagnosis

    def poisoned(self, step):
        if step == 3:
            self.before = {name: p.clone() for name, p in self.model.named_parameters()}
            with torch.no_grad():
                self.model.layers[1].mixer.v_proj.weight[0, 0] = float("inf")
        return take(self, step)

    def healed(self, *args):
        told = diagnosis(self, *args)
        for name, p in self.model.named_parameters():
            p.data.copy_(self.before[name])
        return told

    monkeypatch.setattr(loop.Trainer, "_take", poisoned)
    monkeypatch.setattr(loop.Trainer, "_diagnosis", healed)
    with pytest.raises(NonFiniteLoss) as error:
        train(config)
    message = str(error.value)
    assert "step 4" in message and "layers.1.mixer.v_proj" in message and "not moved" in message
    folder = config.run
    assert (load_file(f"{folder}/checkpoints/last/model.safetensors")["embed.weight"]).isfinite().all()
    assert load_file(f"{folder}/non-finite-step-4.safetensors")["ids"].numel() == 256
    monkeypatch.setattr(loop.Trainer, "_take", take)
    monkeypatch.setattr(loop.Trainer, "_diagnosis", diagnosis)
    assert_same_run(
        train(run_config("clean", train__max_steps=6, train__log_every=6)), train(replace(config, resume=True))
    )


def test_starting_from_a_checkpoint(run_config):
    first = train(run_config("first"))
    checkpoint = first.run / "checkpoints" / "last"
    tokenizer = str(checkpoint / "tokenizer.json")
    tuned = train(run_config("tuned", train__init_from=str(first.run), data__tokenizer=tokenizer, train__max_steps=1))
    assert read_metrics(tuned.run)[0]["loss"] < read_metrics(first.run)[0]["loss"] - 0.3

    parts = dict(train__init_from=str(first.run), train__init_parts=("embed", "final_norm"), model__mixer="gla")
    results = train(run_config("parts", **parts, data__tokenizer=tokenizer, train__max_steps=1, train__lr=1e-12))
    torch.testing.assert_close(weights(results)["embed.weight"], weights(first)["embed.weight"])

    with pytest.raises(ConfigError, match=r"another tokenizer.*--data\.tokenizer="):
        train(run_config("wrong", train__init_from=str(first.run), data__tokenizer="byte"))
    with pytest.raises(ConfigError, match=r"no weight in .* starts with 'nothing'"):
        train(run_config("none", **parts | dict(train__init_parts=("nothing",)), data__tokenizer=tokenizer))


def test_bf16_trains(run_config):
    results = train(run_config(train__precision="bf16", train__max_steps=8))
    assert weights(results)["embed.weight"].dtype == torch.float32
    losses = [row["loss"] for row in read_metrics(results.run) if "loss" in row]
    assert losses[-1] < losses[0]


def test_experts_report_their_balance_apart(run_config):
    results = train(run_config(model__ffn="moe", model__num_experts=4, model__load_balance=0.5, train__max_steps=3))
    rows = [row for row in read_metrics(results.run) if "loss" in row]
    assert all(row["load_balance"] > 0.1 for row in rows)


def test_tensorboard_and_mixtures(run_config):
    corpus = "stories:30*0.5 + stories:20*0.5"
    results = train(run_config(data__corpus=corpus, train__max_steps=3, train__tensorboard=True))
    assert list((results.run / "tensorboard").iterdir())
