"""What `load` finds behind a path or a name, and what it says when there is nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import glade
from glade.data.tokenizer import Tokenizer
from glade.errors import CheckpointError, ConfigError, DataError
from glade.interop import load as interop
from glade.interop.load import find_checkpoint, find_device, find_dtype, load
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel

TOKENIZER = Tokenizer.build("char", ["to be or not to be"])


def save(folder: Path, seed: int = 0, tokenizer: Tokenizer | None = TOKENIZER, vocab_size: int | None = None) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=vocab_size or TOKENIZER.vocab_size, num_layers=1, dim=16, num_heads=2)
    LanguageModel(config).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, name in ((100, "best"), (200, "last")):
        save(checkpoints / f"step-{step}", seed=step)
        (checkpoints / name).symlink_to(f"step-{step}")
    return tmp_path / "run"


def test_a_folder_and_the_file_in_it_give_the_model_and_its_tokenizer(checkpoint: Path) -> None:
    for src in (checkpoint, str(checkpoint), checkpoint / "model.safetensors"):
        model: Any = load(src)
        assert not model.training
        assert model.tokenizer.encode("to be") == TOKENIZER.encode("to be")
        logits, _ = model(torch.tensor([TOKENIZER.prompt("to")]))
        torch.manual_seed(0)
        same, _ = LanguageModel(model.config)(torch.tensor([TOKENIZER.prompt("to")]))
        assert logits.equal(same)


def test_the_package_offers_load_and_generate(checkpoint: Path) -> None:
    model = glade.load(checkpoint)
    assert isinstance(glade.generate(model, "to be", max_new_tokens=5, seed=0), str)


def test_a_run_folder_gives_best_then_last_or_the_one_named(run_folder: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    assert find_checkpoint(run_folder) == checkpoints / "step-100"
    assert find_checkpoint(run_folder, "last") == checkpoints / "step-200"
    assert find_checkpoint(run_folder, "step-200") == checkpoints / "step-200"
    assert find_checkpoint(checkpoints / "best").name in ("best", "step-100")
    (checkpoints / "best").unlink()
    assert find_checkpoint(run_folder) == checkpoints / "step-200"
    with pytest.raises(CheckpointError, match=r"has no step-300; it has last, step-100, step-200"):
        load(run_folder, "step-300")


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no best or last; it has none yet"):
        load(tmp_path)


def test_device_and_dtype_are_honoured(checkpoint: Path) -> None:
    assert load(checkpoint, dtype="bfloat16").embed.weight.dtype == torch.bfloat16
    assert load(checkpoint, dtype=torch.float64, device="cpu").embed.weight.dtype == torch.float64
    assert load(checkpoint, device="auto").embed.weight.device.type == find_device("auto").type


@pytest.mark.parametrize("device", ["graphics", "cuda:99", 7])
def test_a_device_that_cannot_be_used_is_named(checkpoint: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load(checkpoint, device=device)


@pytest.mark.parametrize("dtype", ["int8", "half-float", "load"])
def test_a_dtype_that_is_none_is_named(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype '{dtype}' is no floating dtype"):
        find_dtype(dtype)


def test_what_is_no_model_is_described(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"it holds nothing; understood are a glade checkpoint"):
        load(tmp_path / "empty")
    (tmp_path / "pth").mkdir()
    (tmp_path / "pth" / "model.pth").touch()
    with pytest.raises(CheckpointError, match=r"it holds model\.pth; understood are"):
        load(tmp_path / "pth")
    with pytest.raises(CheckpointError, match=r"model\.pth is a file that load does not read"):
        load(tmp_path / "pth" / "model.pth")
    config = checkpoint / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type 'llama', which load does not read"):
        load(checkpoint)
    for damaged in ('{"model_type": "gla', "[]", "\x00"):
        config.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            load(checkpoint)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load(save(tmp_path / "a", tokenizer=None))
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model only 3"):
        load(save(tmp_path / "b", vocab_size=3))


def test_arguments_that_fit_no_such_source_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="revision 'main' is for a hub name"):
        load(checkpoint, revision="main")
    with pytest.raises(ConfigError, match="checkpoint 'last' chooses one of a run folder"):
        load(checkpoint, "last")


def test_a_name_that_is_not_on_this_disk_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("pth" in pattern or "bin" in pattern for pattern in allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model: Any = load("someone/small-gdn2", revision="v1")
    assert asked == [("someone/small-gdn2", "v1")]
    assert model.tokenizer.vocab_size == TOKENIZER.vocab_size


def test_no_network_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as error:
        load("someone/small-gdn2")
    assert str(error.value) == (
        "someone/small-gdn2 does not exist on this disk, and the Hugging Face hub did not give it: "
        "Name or service not known"
    )


@pytest.mark.parametrize("src", ["./nowhere", "runs/demo/checkpoints/best", "/no/such/folder"])
def test_a_path_that_is_no_hub_name_is_just_missing(src: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist on this disk; understood are"):
        load(src)
    assert interop._UNDERSTOOD.startswith("understood are")
