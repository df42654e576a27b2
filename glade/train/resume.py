"""A run on disk: its folder, its checkpoints, and going on from one as if it had never stopped.

    runs/NAME/  config.yaml  metrics.jsonl  samples.txt  curves.png  results.json
                checkpoints/step-00000500/   a checkpoint folder (adapters merged), and in it trainer/: optimiser,
                                             adapters, progress, random state
                checkpoints/best, last       relative links to two of them

What a run has done is `Progress`. With the optimiser's moments and the random state it is all that training changes
beside the weights, since the order of the samples is a function of the seed and the step.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glade import config as settings
from glade.errors import CheckpointError, ConfigError
from glade.model.atomic import replace_link_atomically, write_file_atomically, write_folder_atomically
from glade.model.checkpoint import write_checkpoint_files
from glade.model.lora import has_lora, load_lora_state_dict, lora_state_dict, merged

RUNS = Path("runs")
ADAPTERS = "adapters.safetensors"


class RunConfig(Protocol):
    """What the config of every kind of run answers."""

    @property
    def run(self) -> str | None: ...

    @property
    def resume(self) -> bool: ...

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def name(self) -> str:
        """What a run folder is called where none is named, before the number."""
        ...

    def fixed(self) -> dict[str, Any]:
        """The settings by name that a resumed run must have kept."""
        ...


@dataclass
class Progress:
    """How far a run is. `best` is the rank of its best held-out evaluation so far: numbers that are better lower, the
    first that differs deciding.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: list[float] = field(default_factory=lambda: [float("inf")])
    best_step: int = 0


def open_run(config: RunConfig) -> Path:
    """The run's folder: a new one, or with `resume` the existing one. Nothing is written yet.

    Raises:
        ConfigError: the folder holds a run already and resume is off, or resume changes what the weights mean.
        CheckpointError: there is nothing to resume.
    """
    folder = next_run(config.name) if config.run is None else Path(config.run)
    has_run = (folder / "checkpoints" / "last").is_dir()
    if not config.resume:
        if has_run or (folder.is_dir() and any(folder.iterdir())):
            raise ConfigError(f"{folder} exists; continue it with --resume, name another --run, or remove it")
        return folder
    if not has_run:
        raise CheckpointError(f"{folder} has no checkpoints/last to resume from; start it without --resume")
    _check_unchanged(saved_config(type(config), folder), config, folder)
    return folder


def saved_config(kind: type[Any], folder: Path) -> Any:
    """config.yaml of a run folder.

    Raises:
        CheckpointError: it is of another kind of run, or missing.
    """
    path = folder / "config.yaml"
    try:
        return settings.load(kind, path)
    except (ConfigError, OSError) as error:
        raise CheckpointError(f"{path} is not the config of such a run ({error}); use the verb that made it") from error


def _check_unchanged(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """ConfigError if `config` changes what the saved weights or the order of the samples mean."""
    before, now = saved.fixed(), config.fixed()
    changed = [f"{key}: {before[key]} to {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(f"{folder} was trained otherwise ({', '.join(changed)}); resume keeps that, so leave it out")


def next_run(name: str) -> Path:
    """The first of runs/NAME-001, -002, ... that does not exist."""
    number = 1
    while (RUNS / f"{name}-{number:03d}").exists():
        number += 1
    return RUNS / f"{name}-{number:03d}"


def newest_run() -> Path:
    links = [path for path in RUNS.glob("*/checkpoints/last") if path.is_dir()]
    if not links:
        raise CheckpointError("there is no run to resume in runs/; name one with --run=FOLDER")
    return max(links, key=lambda path: path.lstat().st_mtime).parent.parent


class Checkpoints:
    """The checkpoints of a run: saving, which to keep, and reading one back."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def save(
        self,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        metadata: Mapping[str, Any],
        *,
        best: bool,
    ) -> Path:
        """Write checkpoints/step-N whole, point `last` (and `best`) at it, then drop what is no longer kept."""
        path = self.folder / f"step-{progress.step:08d}"

        adapters = lora_state_dict(model)

        def write(folder: Path) -> None:
            write_checkpoint_files(merged(model) if adapters else model, folder, tokenizer, metadata)
            (folder / "trainer").mkdir()
            if adapters:
                save_file(_on_cpu(adapters), folder / "trainer" / ADAPTERS)
            save_file(_optimizer_tensors(model, optimizer), folder / "trainer" / "optimizer.safetensors")
            save_file(_random_state(), folder / "trainer" / "random.safetensors")
            (folder / "trainer" / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

        write_folder_atomically(path, write)
        replace_link_atomically(self.folder / "last", path.name)
        if best:
            replace_link_atomically(self.folder / "best", path.name)
        self._drop_old()
        return path

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
        """Set the optimiser, the adapters if there are any, and the random state to those of `last`; the model's own
        weights are loaded by its own reader.

        Raises:
            CheckpointError: a trainer file is missing, damaged, or of another model.
        """
        folder = self.folder / "last" / "trainer"
        try:
            tensors = load_file(folder / "optimizer.safetensors")
            random = load_file(folder / "random.safetensors")
            adapters = load_file(folder / ADAPTERS) if has_lora(model) else {}
            progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder} cannot be resumed from: {error}") from error
        if adapters:
            load_lora_state_dict(model, adapters)
        _restore_optimizer(model, optimizer, tensors, folder)
        _restore_random_state(random)
        return progress

    def _drop_old(self) -> None:
        linked = {os.readlink(self.folder / name) for name in ("best", "last") if (self.folder / name).is_symlink()}
        steps = sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name))
        others = [path for path in steps if path.name not in linked]
        for path in others[: max(0, len(others) - self.keep)]:
            shutil.rmtree(path)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by `NAME/KEY`, with the parameter's name: no order of groups is relied on."""
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    return _on_cpu({f"{names[p]}/{key}": x for p, state in optimizer.state.items() for key, x in state.items()})


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], folder: Path
) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in parameters or (value.dim() and value.shape != parameters[parameter].shape):
            raise CheckpointError(f"{folder} holds {name} {list(value.shape)}, which this model has no place for")
        device = parameters[parameter].device
        optimizer.state[parameters[parameter]][key] = value.to(device)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_config(run: Path, config: RunConfig) -> None:
    """config.yaml: every setting of the run, replaced whole."""
    run.mkdir(parents=True, exist_ok=True)
    write_file_atomically(run / "config.yaml", settings.to_yaml(config).encode("utf-8"))
