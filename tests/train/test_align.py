"""Fine-tuning and preference training, tiny: what is scored, what is written, and that stopping changes nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import glade
from glade import config as settings
from glade.data.instruction import Example
from glade.data.preference import Pair
from glade.errors import CheckpointError, ConfigError, DataError
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.model.lora import has_lora
from glade.train import compare
from glade.train import reference as reference_module
from glade.train.align import weights_digest
from glade.train.align_config import DpoRun, SftRun
from glade.train.compare import CompareConfig
from glade.train.config import TrainRun
from glade.train.dpo import PreferenceTraining, dpo
from glade.train.examples import grouped, samples, spaced
from glade.train.log import read_metrics
from glade.train.loop import NonFiniteLoss
from glade.train.passes import Direct
from glade.train.pretrain import train
from glade.train.reference import pack_pairs
from glade.train.sft import FineTuning, pack_examples, sft

TINY = {
    "train.max_steps": 8,
    "train.batch_size": 4,
    "train.eval_every": 3,
    "train.eval_examples": 4,
    "train.sample_tokens": 6,
    "train.precision": "fp32",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, pairs whose better answers are in order, and instructions."""
    folder = tmp_path_factory.mktemp("align")
    base = {
        "model.dim": 32,
        "model.num_layers": 2,
        "model.layers": "gla softmax",
        "model.num_heads": 2,
        "model.dropout": 0.1,
        "data.corpus": "stories:40",
        "data.tokenizer": "byte",
        "data.context": 32,
        "data.cache": str(folder / "cache"),
        "train.batch_tokens": 256,
        "train.max_steps": 6,
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        "train.precision": "fp32",
        "run": str(folder / "base"),
    }
    train(settings.replace(TrainRun(), base))
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "a", "tree"]
    with open(folder / "pairs.jsonl", "w") as pairs, open(folder / "answers.jsonl", "w") as answers:
        for i in range(20):
            answer = " ".join(words[i % 5 : i % 5 + 4 + i % 3])
            row = {"prompt": f"Tell me {'a' * (i % 10)} ", "chosen": answer, "rejected": answer[::-1]}
            pairs.write(json.dumps(row) + "\n")
            answers.write(json.dumps({"instruction": f"Say {words[i % 7]}", "output": answer}) + "\n")
    return folder


@pytest.fixture
def run_config(place, tmp_path):
    def build(kind, name="run", **changes):
        values = {**TINY, "model": str(place / "base"), "run": str(tmp_path / name)}
        values["data.file"] = str(place / ("pairs.jsonl" if kind is DpoRun else "answers.jsonl"))
        if kind is DpoRun:
            values["reference_cache"] = str(tmp_path / "reference")
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return settings.load(kind, overrides=values)

    return build


def weights(results):
    return load_file(results.run / "checkpoints" / "last" / "model.safetensors")


def metrics(results):
    clock = ("seconds", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in read_metrics(results.run)]


def assert_same_run(a, b):
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert metrics(a) == metrics(b)


KINDS = pytest.mark.parametrize("kind, start", [(SftRun, sft), (DpoRun, dpo)])
LORA = pytest.mark.parametrize("rank", [0, 2])


@KINDS
@LORA
def test_a_run_leaves_what_the_contract_says_and_learns(run_config, kind, start, rank):
    lr = {"train__lr": 0.03 if rank else 0.003}
    results = start(run_config(kind, train__max_steps=30, train__eval_every=10, lora__rank=rank, **lr))
    assert results.finished and results.stopped is None
    for name in ("config.yaml", "metrics.jsonl", "samples.txt", "curves.png", "results.json"):
        assert (results.run / name).stat().st_size > 0, name
    rows = read_metrics(results.run)
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert len(heldout) == 4 and rows[0]["step"] == 0  # before the first step, along the way, at the end
    assert heldout[-1] < heldout[0] - 0.02
    model = glade.load(results.run)
    assert not has_lora(model) and model.config.layer_mixers == ("gla", "softmax")
    assert glade.generate(model, "Tell", max_new_tokens=3, seed=0) is not None
    assert load_config(kind, results).train.max_steps == 30


def load_config(kind, results):
    return settings.load(kind, results.run / "config.yaml")


@KINDS
@LORA
@pytest.mark.parametrize("stop", [3, 5])
def test_resumed_equals_uninterrupted_to_the_bit(run_config, kind, start, rank, stop):
    changes = dict(lora__rank=rank, train__accumulate=2) | (dict(lora__dropout=0.2) if rank else {})
    whole = start(run_config(kind, "whole", **changes))
    first = start(run_config(kind, "parts", **changes, train__stop_after=stop))
    assert first.progress.step == stop and not first.finished
    second = start(run_config(kind, "parts", **changes, resume=True))
    assert_same_run(whole, second)
    assert whole.progress.best == second.progress.best


@KINDS
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(run_config, kind, start, by, tmp_path):
    changes = dict(train__max_steps=100, train__eval_every=40, train__sample_tokens=0)
    whole = start(run_config(kind, "whole", **changes))
    config = run_config(kind, "parts", **changes)
    settings.save(config, tmp_path / "parts.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "glade", config.name, str(tmp_path / "parts.yaml")], stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "parts" / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < 10:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.05)
    process.send_signal(by)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + by
    assert f"glade {config.name} --run={tmp_path / 'parts'} --resume" in output
    steps = [row["step"] for row in read_metrics(tmp_path / "parts")]
    assert 9 <= steps[-1] < 100
    assert_same_run(whole, start(replace(config, resume=True)))


@KINDS
def test_runs_on_the_same_heldout_examples_are_compared(run_config, kind, start, tmp_path, capsys):
    folders = tuple(str(start(run_config(kind, f"seed{lr}", train__lr=lr)).run) for lr in (1e-3, 1e-4))
    compare.run(CompareConfig(runs=folders, out=tmp_path / "out"))
    assert ("margin" in capsys.readouterr().out) == (kind is DpoRun)
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    ranks = [(-row.get("accuracy", 0), row["heldout_loss"]) for row in table]
    assert ranks == sorted(ranks) and len(table) == 2
    other = str(start(run_config(kind, "other", seed=5)).run)
    with pytest.raises(ConfigError, match="different held-out"):
        compare.run(CompareConfig(runs=(folders[0], other), out=tmp_path / "out"))


@KINDS
def test_accumulated_passes_are_one_step(run_config, kind, start):
    # fine-tuning keeps the model's dropout, which another split of the batch draws otherwise
    losses = []
    for accumulate in (1, 4):
        config = run_config(kind, f"by{accumulate}", train__accumulate=accumulate, train__max_steps=3)
        task_losses = [row["loss"] for row in read_metrics(start(config).run) if "loss" in row]
        losses.append(task_losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if kind is DpoRun else 0.1)


@KINDS
def test_resume_keeps_what_the_weights_mean(run_config, kind, start, place, tmp_path):
    start(run_config(kind, train__max_steps=2))
    with pytest.raises(ConfigError, match=r"trained otherwise \(seed: 0 to 1\)"):
        start(run_config(kind, resume=True, seed=1))
    with pytest.raises(ConfigError, match="--resume"):
        start(run_config(kind))


def test_resume_notices_another_source(run_config, place, tmp_path):
    model = glade.load(place / "base")
    source = tmp_path / "source"
    model.save_pretrained(source, model.tokenizer)
    dpo(run_config(DpoRun, model=str(source), train__stop_after=2))
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    model.save_pretrained(source, model.tokenizer)
    with pytest.raises(CheckpointError, match="no longer the model"):
        dpo(run_config(DpoRun, model=str(source), resume=True))


def test_only_answers_are_scored_and_examples_do_not_meet():
    examples = [
        Example((9, 1, 2, 3, 0), (False, False, True, True, True)),
        Example((9, 4, 0, 5, 0), (False, True, True, False, True)),
    ]
    ids, targets, borders = pack_examples(examples)
    assert ids.tolist() == [[9, 1, 2, 3, 9, 4, 0, 5]]
    assert targets.tolist() == [[-1, 2, 3, 0, 4, 0, -1, 0]]
    assert borders.tolist() == [0, 4, 8]


def test_samples_begin_as_in_training(run_config, tmp_path):
    turn = "{{ message['role'] + ':' + message['content'] + eos_token }}"
    opening = "{% if add_generation_prompt %}assistant:{% endif %}"
    (tmp_path / "template").write_text(f"{{% for message in messages %}}{turn}{{% endfor %}}{opening}")
    results = sft(run_config(SftRun, data__chat_template=str(tmp_path / "template"), train__max_steps=1))
    assert re.match(r"user:Say \w+<\|endoftext\|>assistant:", results.sample)
    task = FineTuning(run_config(SftRun, "other", data__chat_template=str(tmp_path / "template")))
    # no BOS in this template: what is read is what was trained on, the marks of turns as special ids
    assert task.prompt().count(task.tokenizer.eos_id) == 1 and task.prompt()[0] != task.tokenizer.bos_id


def test_the_order_of_samples_is_a_function_of_seed_and_step():
    seen = [samples(10, 4, 3, step) for step in range(5)]
    assert sorted(i for step in seen for i in step) == sorted([*range(10), *range(10)])  # two epochs
    assert samples(10, 4, 3, 2) == seen[2] == samples(10, 4, 3, 2, 0, 2) + samples(10, 4, 3, 2, 1, 2)
    assert samples(10, 4, 4, 0) != seen[0]
    assert spaced(5, None) == [0, 1, 2, 3, 4] and spaced(10, 3) == [0, 3, 6]
    assert [(s.start, s.stop) for s in grouped([3, 3, 9, 1, 1, 1], 6)] == [(0, 2), (2, 3), (3, 6)]
    assert list(grouped([], 6)) == []


def test_prompts_stay_on_one_side(run_config):
    task = PreferenceTraining(run_config(DpoRun))
    train_prompts = {pair.prompt for pair in task.examples.train}
    assert task.examples.heldout and not train_prompts & {pair.prompt for pair in task.examples.heldout}


def test_the_reference_is_computed_once_and_known_by_content(run_config, tmp_path, monkeypatch):
    calls = []
    original = reference_module._compute
    monkeypatch.setattr(reference_module, "_compute", lambda *args: calls.append(1) or original(*args))
    dpo(run_config(DpoRun, "a", train__max_steps=2))
    dpo(run_config(DpoRun, "b", train__max_steps=1, dpo__beta=0.3, dpo__loss="ipo"))
    assert len(calls) == 1
    dpo(run_config(DpoRun, "c", train__max_steps=1, data__separator="-"))
    assert len(calls) == 2
    (file, *_) = sorted((tmp_path / "reference").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        dpo(run_config(DpoRun, "d", train__max_steps=1))
        dpo(run_config(DpoRun, "e", train__max_steps=1, data__separator="-"))


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_compute_none(run_config, tmp_path, loss):
    results = dpo(run_config(DpoRun, dpo__loss=loss, train__max_steps=2))
    assert not (tmp_path / "reference").exists()
    assert "kl" not in read_metrics(results.run)[1]


def test_the_reference_is_the_model_itself(run_config):
    task = PreferenceTraining(run_config(DpoRun, lora__rank=2))
    judged = task.preferences(Direct(task.model.eval(), task.device)).judge(range(len(task.pairs)))
    torch.testing.assert_close(judged.metrics["margin"], torch.zeros(len(task.pairs)), rtol=0, atol=1e-5)
    torch.testing.assert_close(judged.metrics["kl"], torch.zeros(len(task.pairs)), rtol=0, atol=1e-9)


def test_reference_of_some_pairs():
    pairs = [Pair((1, 2), (3, 4), (5,)), Pair((1,), (2,), (3, 4, 5))]
    known = reference_module.Reference(torch.arange(7.0), [0, 2, 3, 4, 7])
    assert pack_pairs(pairs).borders.tolist() == known.borders
    assert known.of([1, 0]).tolist() == [3, 4, 5, 6, 0, 1, 2]


def test_logged_margins_are_those_of_whole_runs(run_config):
    """The masks: log p of an answer's tokens, first and EOS included, given its own prompt alone."""
    task = PreferenceTraining(run_config(DpoRun))
    model = task.model.eval()
    judged = task.preferences(Direct(model, task.device)).judge([0, 3])
    for i, got in zip((0, 3), judged.metrics["logp_rejected"], strict=True):
        pair = task.pairs[i]
        logits, _ = model(torch.tensor([pair.prompt + pair.rejected]))
        log_p = logits.log_softmax(-1)[0, len(pair.prompt) - 1 : -1]
        expected = log_p.gather(1, torch.tensor(pair.rejected)[:, None]).sum()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        assert pair.rejected[-1] == task.tokenizer.eos_id


def test_best_is_chosen_by_accuracy_then_loss(run_config):
    task = PreferenceTraining(run_config(DpoRun))
    before = task.evaluate(whole=True)
    assert before is not None and task.rank(before) == [-before.measures["accuracy"], before.loss]
    assert [-0.9, 0.5] < [-0.8, 0.1] and [-0.9, 0.4] < [-0.9, 0.5]


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(run_config):
    config = run_config(DpoRun, train__lr=1e30, train__clip=0.0)
    with pytest.raises(NonFiniteLoss, match="not moved") as error:
        dpo(config)
    step = int(str(error.value).split(" at step ")[1].split(",")[0])
    assert Path(config.run or "", f"non-finite-step-{step}.safetensors").is_file()


def test_answers_longer_than_a_position_table_are_refused(run_config, place, tmp_path):
    tokenizer = glade.load(place / "base").tokenizer
    short = ModelConfig(mixer="softmax", dim=32, num_layers=1, learned_positions=33, vocab_size=tokenizer.vocab_size)
    LanguageModel(short).save_pretrained(tmp_path / "short", tokenizer)
    with pytest.raises(DataError, match="learned positions; drop longer ones"):
        sft(run_config(SftRun, model=str(tmp_path / "short")))


def test_weights_digest_knows_every_bit(place):
    model = glade.load(place / "base")
    before = weights_digest(model)
    assert before == weights_digest(glade.load(place / "base"))
    with torch.no_grad():
        model.layers[0].mixer.q_proj.weight[0, 0] *= 1.0000001
    assert weights_digest(model) != before


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dpo.beta", 0, "must be positive"),
        ("dpo.label_smoothing", 0.5, "less than 0.5"),
        ("dpo.gamma", 1, "belongs to dpo.loss=simpo"),
        ("lora.alpha", 8, "lora.rank is 0"),
        ("train.accumulate", 3, "not a multiple"),
    ],
)
def test_settings_at_odds(run_config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        run_config(DpoRun, **{key.replace(".", "__"): value})
