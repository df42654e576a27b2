"""The program as a new user meets it: from text to talk, and one readable message for all that can go wrong."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

TINY = [
    "--model.dim=32",
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--data.context=32",
    "--train.batch_tokens=256",
    "--train.max_steps=6",
    "--train.eval_every=3",
    "--train.sample_tokens=10",
]


def glade(*arguments, cwd, check=True, **options):
    done = subprocess.run(
        [sys.executable, "-m", "glade", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained run in runs/first and a little text file; its own cache."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "notes.txt").write_text("The sea was calm. The boat was small. " * 60, encoding="utf-8")
    glade(
        "train", *TINY, "--data.corpus=stories:40", "--run=runs/first", f"--data.cache={folder / 'cache'}", cwd=folder
    )
    return folder


@pytest.mark.slow
def test_text_to_talk(place):
    said = glade("generate", "runs/first", "The ", "--max_new_tokens=12", "--seed=1", cwd=place).stdout
    assert len(said) >= 12
    assert said == glade("generate", "runs/first", "The ", "--max_new_tokens=12", "--seed=1", cwd=place).stdout

    scored = json.loads(glade("score", "runs/first", "The cat", "--top=3", "--json", cwd=place).stdout)
    assert scored["logprob"] < 0 and len(scored["next"]) == 3

    chat = glade("chat", "runs/first", "--max_new_tokens=5", cwd=place, input="Hello\n/quit\n")
    assert chat.stdout

    prepared = glade("prepare", "notes.txt", "--out=notes", "--tokenizer=byte", cwd=place).stdout
    assert "glade train --data.corpus=notes" in prepared
    out = glade("train", *TINY, "--data.corpus=notes", "--data.tokenizer=byte", "--run=runs/notes", cwd=place).stdout
    assert "held-out loss" in out and "runs/notes/checkpoints/best" in out and "curves.png" in out

    assert "first" in glade("compare", "runs/first", cwd=place).stdout
    tuned = [
        "train",
        "--train.init_from=runs/first",
        "--data.corpus=notes.txt",
        "--run=runs/tuned",
        "--data.context=32",
    ]
    assert "runs/tuned" in glade(*tuned, "--train.batch_tokens=256", "--train.max_steps=2", cwd=place).stdout
    resumed = glade("train", "--run=runs/first", "--resume", "--train.max_steps=8", cwd=place)
    assert "resumed at step 6" in resumed.stderr and "8 steps" in resumed.stdout


def broken(place, name):
    """A copy of the checkpoint to damage."""
    source = (place / "runs" / "first" / "checkpoints" / "best").resolve()
    copy = place / name
    copy.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def cut_weights(place):
    path = broken(place, "cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["generate", "cut", "The"]


def missing_weights(place):
    (broken(place, "missing") / "model.safetensors").unlink()
    return ["generate", "missing", "The"]


def other_weights(place):
    path = broken(place, "other") / "model.safetensors"
    tensors = load_file(path)
    tensors["embed.weight"] = tensors["embed.weight"][:, :8].contiguous()
    save_file(tensors, path)
    return ["generate", "other", "The"]


def damaged_config(place):
    (broken(place, "config") / "config.json").write_text("{")
    return ["generate", "config", "The"]


def empty_corpus(place):
    (place / "empty.txt").write_text("")
    return ["train", *TINY, "--data.corpus=empty.txt", "--run=runs/empty"]


def bad_jsonl(place):
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    return ["prepare", "bad.jsonl", "--out=bad"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--data.corpus=nothing.txt"], 1, "nothing.txt"),
        (["train", "--model.dims=3"], 2, "model.dim"),
        (["train", "--model.dim=three"], 2, "expected int"),
        (["train", "--model.mixer=gdn3"], 2, "gdn2"),
        (["train", "--model.mixer=birnn"], 2, "reads the tokens after the one it predicts"),
        (["train", "--run=runs/first"], 1, "--resume"),
        (["train", "--run=runs/none", "--resume"], 1, "no checkpoints/last"),
        (["trian"], 2, "did you mean 'train'"),
        (["generate", "nowhere", "The"], 1, "nowhere"),
        (["generate", "runs/first", "The \u6f22"], 1, "\u6f22"),
        (["generate", "runs/first", "The", "--temperature=-1"], 2, "temperature"),
        (["compare", "notes.txt"], 1, "not a run folder"),
        (empty_corpus, 1, "empty"),
        (bad_jsonl, 1, "bad.jsonl:2: no field"),
        (cut_weights, 1, "damaged"),
        (missing_weights, 1, "not complete"),
        (other_weights, 1, "embed.weight"),
        (damaged_config, 1, "config.json"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_one_readable_message(place, arguments, status, message):
    arguments = arguments(place) if callable(arguments) else arguments
    done = glade(*arguments, cwd=place, check=False)
    assert done.returncode == status, done.stderr
    last = done.stderr.strip()
    assert message in last and "glade: " in last
    assert "Traceback" not in done.stderr and "fault of glade" not in done.stderr
    assert not (place / "runs" / "empty").exists()
