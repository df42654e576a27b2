"""The program's grammar, help, and what each kind of failure becomes; what the verbs do is tested beside them."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from glade import cli
from glade.cli import VERBS, Verb, main, read_config
from glade.config import REQUIRED, describe, setting
from glade.errors import CheckpointError, ConfigError
from glade.explain import explain


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = setting(8, "width, channels")


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str = setting(REQUIRED, "which model")
    paths: tuple[str, ...] = setting((), "more of them")
    fast: bool = setting(False, "skip the slow part")
    model: Model = setting(default_factory=Model)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    model: Model = setting(default_factory=Model)
    seed: int = setting(0, "seed")


ran: list[Config] = []


def act(config: Config) -> None:
    ran.append(config)


TRY = Verb(run=f"{__name__}:act", config=f"{__name__}:Config", help="try things", positional=("checkpoint", "paths"))


@pytest.fixture
def run_try(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `glade try ...` with a function that records its config, or raises what it is told to."""
    ran.clear()
    monkeypatch.setitem(VERBS, "try", TRY)
    return lambda *words: main(["try", *words])


def glade(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "glade", *words], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_arguments_without_dashes_set_the_keys_the_verb_names(run_try: Callable[..., int]) -> None:
    assert run_try("ckpt", "a", "b", "--fast", "--model.dim=16") == 0
    assert ran == [Config(checkpoint="ckpt", paths=("a", "b"), fast=True, model=Model(dim=16))]


def test_a_yaml_argument_is_the_config_file(run_try: Callable[..., int], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("checkpoint: x\nmodel: {dim: 4}\n")
    assert run_try(str(file), "--fast") == 0
    assert ran == [Config(checkpoint="x", fast=True, model=Model(dim=4))]


def test_a_recipe_gives_the_section_it_is_of(monkeypatch: pytest.MonkeyPatch, run_try: Callable[..., int]) -> None:
    recipes = type(sys)("glade.recipes")
    recipes.get = {"wide": Model(dim=99), "whole": RecipeConfig(seed=5), "odd": 3}.get  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "glade.recipes", recipes)
    verb = Verb(run=TRY.run, config=f"{__name__}:RecipeConfig", help="", recipe=True)
    assert read_config(verb, ["wide", "--seed=2"]) == RecipeConfig(model=Model(dim=99), seed=2)
    assert read_config(verb, ["whole"]) == RecipeConfig(seed=5)
    with pytest.raises(ConfigError, match="'odd' is a int"):
        read_config(verb, ["odd"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ckpt", "--modl.dim=1"], ["unknown key 'modl.dim'", "'model.dim'", "glade try --help"]),
        ([], ["'checkpoint' is needed", "which model"]),
        (["ckpt", "--checkpoint=x"], ["checkpoint is given twice"]),
        (["ckpt", "--model.dim", "8"], ["--model.dim needs a value", "--model.dim=value"]),
        (["a.yaml", "b.yml"], ["2 config files"]),
        (["ckpt", "-x"], ["'-x' is not a setting", "--section.key=value"]),
    ],
)
def test_usage_errors_say_what_to_write_and_exit_2(
    run_try: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    assert run_try(*words) == 2
    shown = capsys.readouterr()
    assert ran == [] and shown.out == "" and shown.err.startswith("glade: ")
    for phrase in said:
        assert phrase in shown.err


def test_a_value_after_a_space_is_pointed_out() -> None:
    verb = Verb(run=TRY.run, config="glade.infer.config:ChatConfig", help="", positional=("checkpoint",))
    with pytest.raises(ConfigError, match="--top_k=5, with the ="):
        read_config(verb, ["ckpt", "--top_k", "5"])


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert "did you mean 'generate'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert name in shown and verb.help in shown


@pytest.mark.parametrize("words", [["help", "try"], ["try", "--help"], ["try", "x", "-h"]])
def test_the_help_of_a_verb_teaches_every_key(
    run_try: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "usage: glade try CHECKPOINT [PATHS]" in shown
    for key in describe(Config):
        assert f"--{key.name}=" in shown and key.help in shown
    assert ran == []


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_a_function_of_its_config(name: str) -> None:
    verb = VERBS[name]
    function, config = cli._resolve(verb.run), cli._resolve(verb.config)
    hints = get_type_hints(function)
    hints.pop("return")
    assert list(hints.values()) == [config]
    named = {name.partition(".")[0] for name in (*verb.positional, *([verb.output] if verb.output else []))}
    assert named <= {f.name for f in fields(config)}
    for key in describe(config):
        assert key.help, f"{name}: --{key.name} says nothing about itself"


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["help"], {"torch", "numpy", "rich"}),
        (["generate", "--help"], {"torch", "numpy", "rich"}),
        (["score", "x", "--txt=y"], {"torch", "numpy", "rich"}),
        (["train", "--help"], {"torch"}),
        (["prepare", "--nonsense=1"], {"torch"}),
    ],
)
def test_help_and_mistakes_answer_at_once(words: list[str], heavy: set[str]) -> None:
    code = (
        f"import sys; from glade.cli import main; main({words!r}); print({heavy!r} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_the_program_is_a_module_and_has_a_version() -> None:
    done = glade("--version")
    assert (done.returncode, done.stdout.startswith("glade ")) == (0, True)
    assert glade("nonsense").returncode == 2


OUT_OF_MEMORY_ON_CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("config.json is damaged; copy it again"), ["config.json is damaged; copy it again"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), ["no file a.txt"]),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), ["Permission denied: a.txt"]),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/no/such/x"), ["disk full", "/tmp/no/such/x", "MB"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["disk full: a file could not be written"]),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), ["disk full"]),
        (MemoryError(), ["train.accumulate", "model.dim", "data.context", "docs/troubleshooting.md"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["train.batch_tokens", "2 GiB"]),
        (RuntimeError(OUT_OF_MEMORY_ON_CPU), ["train.batch_tokens", "DefaultCPUAllocator"]),
        (ValueError("v has 6 heads, not a multiple of q's 4"), ["v has 6 heads, not a multiple of q's 4"]),
        (KeyboardInterrupt(), ["interrupted"]),
        (TypeError("unsupported operand"), ["TypeError: unsupported operand", "--debug"]),
    ],
)
def test_failures_become_one_readable_message(
    run_try: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    said: list[str],
) -> None:
    def fail(config: Config) -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "act", fail)
    assert run_try("ckpt") == (130 if isinstance(error, KeyboardInterrupt) else 1)
    shown = capsys.readouterr().err
    assert shown == f"glade: {explain(error)}\n"
    assert "Traceback" not in shown
    for phrase in said:
        assert phrase in shown
    with pytest.raises(type(error)):
        run_try("ckpt", "--debug")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from glade.cli import main; import glade.cli; raise SystemExit(main(['help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_is_named_by_where_the_verb_writes(
    run_try: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(config: Config) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write does, which knows no name

    monkeypatch.setattr(sys.modules[__name__], "act", fail)
    monkeypatch.setitem(VERBS, "try", replace(TRY, output="checkpoint"))
    assert run_try(str(tmp_path / "not" / "made")) == 1
    shown = capsys.readouterr().err
    assert f"disk full: {tmp_path / 'not' / 'made'} could not be written" in shown
    assert re.search(r"\d MB are free there", shown)


def test_a_missing_optional_package_names_the_extra_that_brings_it() -> None:
    said = explain(ModuleNotFoundError("No module named 'uvicorn.config'", name="uvicorn.config"))
    assert "pip install 'glade[serve]'" in said and "fault of glade" not in said
    assert "fault of glade" in explain(ModuleNotFoundError("No module named 'gladness'", name="gladness"))


def test_the_keys_that_the_out_of_memory_message_names_exist() -> None:
    keys = {key.name for key in describe(cli._resolve(VERBS["train"].config))}
    named = set(re.findall(r"\b(?:train|data|model)\.\w+", explain(MemoryError())))
    assert len(named) >= 4 and named <= keys
