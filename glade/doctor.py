"""`glade doctor`: what runs on this machine, what `auto` picks, how far each backend is from the reference, and what
decodes."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from glade import __version__
from glade.config import setting
from glade.errors import BackendError
from glade.infer.step import decode_step
from glade.interop.load import find_device, find_dtype
from glade.model import LanguageModel, ModelConfig
from glade.model.quantized import quantize
from glade.ops import parity
from glade.ops.tolerances import TOLERANCES

_OPTIONAL = ("datasets", "pyarrow", "fastapi", "gradio", "lm-eval", "transformers", "wandb", "tensorboard", "triton")
_BACKENDS = ("cpu", "triton")
# of a model's weights
_WEIGHTS = ("float32", "bfloat16", "float16", "float64", "int8")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What `glade doctor` can be told."""

    device: str = setting("auto", "where to try the backends: cpu, cuda; auto: an accelerator if there is one")
    dtype: str = setting("float32", "of the tensors: float32, bfloat16, float16, float64")
    json: bool = setting(False, "print JSON instead of tables")


def run(config: DoctorConfig) -> None:
    """The verb `glade doctor`.

    Raises:
        BackendError: some backend is beyond its tolerance (after everything was printed).
    """
    device, dtype = find_device(config.device), find_dtype(config.dtype) or torch.float32
    rows = list(parity.measure(device, dtype))
    missing = parity.unavailable(device, dtype, _BACKENDS)
    decode = {name: decode_path(device, name) for name in _WEIGHTS}
    if config.json:
        parity_rows = [row._asdict() for row in rows]
        found = {"machine": machine(), "parity": parity_rows, "unavailable": missing, "decode": decode}
        print(json.dumps(found, indent=2))
    else:
        _print(machine(), rows, missing, device, dtype)
        _print_decode(decode, device)
    wrong = [f"{row.op} on {row.backend}" for row in rows if not row.within]
    if wrong:
        raise BackendError(f"beyond the tolerance of {dtype}: {', '.join(wrong)}; do not trust results from it")


def decode_path(device: torch.device, weights: str) -> str:
    """What runs the next token of a small model with such weights (a dtype, or `int8`), and why, if that is torch."""
    model = LanguageModel(ModelConfig(mixer="gdn2", num_layers=1, dim=64, num_heads=2, vocab_size=64)).eval()
    model = quantize(model) if weights == "int8" else model.to(getattr(torch, weights))
    try:
        step = decode_step(model.to(device))
    except BackendError as refusal:
        return f"refused: {refusal}"
    return f"{step.path}: {step.reason}" if step.reason else step.path


def machine() -> dict[str, Any]:
    """Versions and hardware, as a mapping of text."""
    found = {
        "glade": __version__,
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "torch": torch.__version__,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB" if _memory_bytes() else "unknown",
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found[f"cuda:{i}"] = f"{name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    installed = {name: v for name in _OPTIONAL if (v := _version(name)) is not None}
    found["optional packages"] = ", ".join(f"{name} {v}" for name, v in installed.items()) or "none"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _print_decode(decode: dict[str, str], device: torch.device) -> None:
    print(f"\nwhat runs the decode step on {device}, by the dtype of the weights (a mixture of experts: always torch):")
    for weights, path in decode.items():
        print(f" {weights:9} {path}")


def _print(
    about: dict[str, Any], rows: list[parity.Parity], missing: dict[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    console = Console(width=110 if not sys.stdout.isatty() else None, highlight=False, emoji=False, markup=False)
    for name, value in about.items():
        console.print(f"{name:18} {value}", markup=False)
    limit = TOLERANCES[dtype]
    table = Table(box=None, header_style="bold", title_justify="left")
    for name in ("op", "backend", "auto", "error", "gradient error", ""):
        table.add_column(name, justify="right" if "error" in name else "left")
    for row in rows:
        verdict = "ok" if row.within else "WRONG"
        picked = "<-" if row.automatic else ""
        table.add_row(row.op, row.backend, picked, f"{row.value_error:.1e}", f"{row.gradient_error:.1e}", verdict)
    console.print(
        f"\nbackends on {device} with {str(dtype).removeprefix('torch.')} tensors, relative error against the fp64 "
        f"reference (allowed: {limit.value:.0e}, gradients {limit.gradient:.0e}):"
    )
    console.print(table)
    for reason in missing.values():
        console.print(reason, markup=False)
