"""The checkpoint folder: the same bits back, every damage named, and whole at every instant of a save."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from glade.errors import CheckpointError
from glade.model import LanguageModel, ModelConfig, atomic
from glade.model.atomic import replace_link_atomically, whole_folder, write_file_atomically, write_folder_atomically
from glade.model.checkpoint import read_metadata

Build = Callable[..., LanguageModel]
MakeIds = Callable[..., Tensor]


class FakeTokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_come_back(
    case: str, dtype: torch.dtype, build: Build, make_ids: MakeIds, tmp_path: Path
) -> None:
    model, ids = build(case, dtype), make_ids(2, 9)
    model.save_pretrained(tmp_path / "c")
    back = LanguageModel.from_pretrained(tmp_path / "c")
    assert back.config == model.config and not back.training
    for (name, x), (other, y) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert name == other and x.dtype == y.dtype and y.requires_grad and torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], back(ids)[0])


def test_the_folder_holds_what_the_contract_says(build: Build, tmp_path: Path) -> None:
    model, folder = build("gdn2"), tmp_path / "c"
    model.save_pretrained(folder, FakeTokenizer(), {"credit": "The Bard | CC BY", "steps": 7})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c"]
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_metadata.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["format_version"]) == ("glade", 1)
    assert config["output_gate"] == "silu" and config["conv_size"] == 4  # resolved
    assert read_metadata(folder) == {"credit": "The Bard | CC BY", "steps": 7}
    with safe_open(folder / "model.safetensors", framework="pt") as weights:  # type: ignore[no-untyped-call]
        assert "embed.weight" in weights.keys() and "lm_head.weight" not in weights.keys()  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert f"| without embeddings | {model.num_parameters(embeddings=False):,} |" in card
    assert "The Bard | CC BY" in card and "| steps | 7 |" in card and "glade.load" in card


def test_device_and_dtype_on_loading(build: Build, tmp_path: Path) -> None:
    build("gdn2").save_pretrained(tmp_path / "c")
    model = LanguageModel.from_pretrained(tmp_path / "c", device="cpu", dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert dtypes["weight"] == torch.bfloat16 and dtypes["A_log"] == torch.float32 == dtypes["dt_bias"]


def test_saving_again_replaces_and_leaves_nothing_behind(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    build("gdn2").save_pretrained(folder, FakeTokenizer())
    build("rnn").save_pretrained(folder)
    assert LanguageModel.from_pretrained(folder).config.mixer == "rnn"
    assert not (folder / "tokenizer.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_saving_never_removes_what_is_not_a_checkpoints(build: Build, tmp_path: Path) -> None:
    model = build("gdn2")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt, and saving a checkpoint replaces the whole folder"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, and a folder is to be written"):
        model.save_pretrained(tmp_path / "notes.txt")
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def damaged(change: Callable[[Path], object], folder: Path) -> str:
    """The message that loading `folder` gives after `change(folder)`."""
    LanguageModel(ModelConfig(num_layers=1, dim=16, vocab_size=7)).save_pretrained(folder)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        LanguageModel.from_pretrained(folder)
    return str(caught.value)


def edit_config(**values: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, length)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "config.json; the checkpoint is not complete"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors; the checkpoint is not complete"),
    (cut("config.json", 40), "is not JSON"),
    (cut("model.safetensors", 0), "model.safetensors is damaged"),
    (cut("model.safetensors", 7), "model.safetensors is damaged"),
    (cut("model.safetensors", 5000), "model.safetensors is damaged"),
    (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    (edit_config(model_type="gla"), "says model_type 'gla', not 'glade'"),
    (edit_config(format_version=2), "has format version 2; this version of glade reads 1"),
    (edit_config(colour="red"), "unknown key 'colour'"),
    (edit_config(num_layers=2), "missing layers.1.ffn.down.weight"),
    (edit_config(vocab_size=8), "embed.weight in .* has shape .7, 16.; its config describes .8, 16."),
    (edit_config(tie_embeddings=False), "missing lm_head.weight; not expected nothing"),
    (edit_config(mixer="gla"), "is not a model config of this version"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_every_damage_is_named(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    assert re.search(message, damaged(change, tmp_path / "c"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")


class Crash(BaseException):
    """The power goes off."""


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call into the system that a write makes is counted, and the given one never returns."""
    calls = 0

    def counted(module: object, name: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    for name in ("fsync", "rename", "replace"):
        counted(os, name)
    counted(atomic.shutil, "rmtree")
    counted(atomic, "_exchange")


def fill(content: str) -> Callable[[Path], None]:
    def writer(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(content)

    return writer


def read_folder(folder: Path) -> set[str]:
    folder = whole_folder(folder)
    return {(folder / name).read_text() for name in ("a", "b")}


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_crash_at_any_call_leaves_the_old_folder_or_the_new(
    can_swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    for call in range(1, 100):
        write_folder_atomically(folder, fill("old"))
        with monkeypatch.context() as patch:
            if not can_swap:
                patch.setattr(atomic, "_exchange", lambda a, b: False)
            crash_at(call, patch)
            try:
                write_folder_atomically(folder, fill("new"))
            except Crash:
                assert read_folder(folder) in ({"old"}, {"new"})
                continue
        assert read_folder(folder) == {"new"}
        break
    else:
        raise AssertionError("never finished")
    assert call > 6
    # whatever the crashes left, the next write clears
    write_folder_atomically(folder, fill("last"))
    assert read_folder(folder) == {"last"} and [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_writer_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    write_folder_atomically(tmp_path / "c", fill("old"))
    with pytest.raises(OSError, match="No space"):
        write_folder_atomically(tmp_path / "c", fails)
    assert read_folder(tmp_path / "c") == {"old"}


def test_files_and_links_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file_atomically(tmp_path / "f", b"old")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    replace_link_atomically(tmp_path / "best", "one")
    with monkeypatch.context() as patch:
        crash_at(1, patch)
        with pytest.raises(Crash):
            write_file_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    with monkeypatch.context() as patch:
        crash_at(1, patch)
        with pytest.raises(Crash):
            replace_link_atomically(tmp_path / "best", "two")
    assert os.readlink(tmp_path / "best") == "one"
    write_file_atomically(tmp_path / "f", b"new")
    replace_link_atomically(tmp_path / "best", "two")
    assert (tmp_path / "f").read_bytes() == b"new" and os.readlink(tmp_path / "best") == "two"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best", "f", "one", "two"]


# A child saves one checkpoint after another and is killed at a random moment, many times over; after each kill the
# folder must load, with weights, config and metadata of one and the same save.
KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
from glade.model import LanguageModel, ModelConfig
from glade.model.checkpoint import read_metadata

torch.set_num_threads(1)
folder, random = sys.argv[1], random.Random(0)
kinds = (("gdn2", 1), ("gla", 2))
models = [LanguageModel(ModelConfig(mixer=mixer, num_layers=n, dim=32, vocab_size=9)) for mixer, n in kinds]

def save(number):
    model = models[number % 2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    model.save_pretrained(folder, training_metadata={"number": number})

save(0)
start = time.perf_counter()
save(0)
duration = time.perf_counter() - start
kills = seen = 0
while kills < 12 or seen < 4:
    child = os.fork()
    if child == 0:
        number = seen
        while True:
            number += 1
            save(number)
    time.sleep(random.uniform(0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    model, number = LanguageModel.from_pretrained(folder), read_metadata(folder)["number"]
    assert number >= seen, "went back in time"
    assert model.config.mixer == ("gdn2", "gla")[number % 2], "config of another save"
    assert all((p == number).all() for p in model.parameters()), "weights of another save"
    seen = number
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kill_minus_nine_during_save_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "c")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
