"""Rules about the source itself: who imports whom, what `import glade` loads, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glade

ROOT = Path(glade.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A part imports from the parts listed with it, and from itself. `values` is the half of `config` that reads one value.
_LEAVES = {"errors", "config", "values"}
_BELOW_INTEROP = _LEAVES | {"ops", "model", "data"}
MAY_IMPORT = {
    "errors": set(),
    "values": {"errors"},
    "config": {"errors", "values"},
    "explain": {"errors"},
    "ops": {"errors"},
    "model": _LEAVES | {"ops"},
    "data": set(_LEAVES),
    "interop": set(_BELOW_INTEROP),
    "infer": _BELOW_INTEROP | {"interop"},
    "evals": _BELOW_INTEROP | {"interop", "infer"},
    "train": _BELOW_INTEROP | {"interop", "infer", "evals"},
    "recipes": _BELOW_INTEROP | {"train"},
    "serve": _BELOW_INTEROP | {"interop", "infer", "evals", "train"},
    "doctor": _BELOW_INTEROP | {"interop", "infer"},
    "bench": _LEAVES | {"ops"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# the package's front door names everything, lazily
FRONT = {"__init__", "__main__"}

LONGEST_FILE_LINES = 600


def _part(module: str) -> str | None:
    """`glade.ops.packing` -> `ops`; None for modules of others and for `glade` itself."""
    names = module.split(".")
    return names[1] if names[0] == "glade" and len(names) > 1 else None


def imported(file: Path) -> set[str]:
    """The parts of glade that a file imports, wherever in it, type-checking blocks included."""
    package = ["glade", *file.relative_to(ROOT).parent.parts]
    parts: set[str | None] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            parts |= {_part(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from glade import ops` names the part after the import
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "glade" else [module]
            parts |= {_part(name) for name in names}
    return {part for part in parts if part is not None and not part.startswith("__")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_left(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in FRONT:
        return
    assert part in MAY_IMPORT, f"{part} is a new part of glade: give it a place in MAY_IMPORT"
    wrong = imported(file) - MAY_IMPORT[part] - {part}
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


def test_the_order_has_no_circle() -> None:
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        ready = {part for part, below in MAY_IMPORT.items() if part not in placed and below <= placed}
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - placed)}"
        placed |= ready


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "ops" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "import torch, glade.model.lm\nfrom glade import data, __version__\nfrom glade.train.loop import a\n"
        "from ..infer import b\nfrom . import c\ndef f():\n    from glade.serve import d\n"
    )
    assert imported(file) == {"model", "data", "train", "infer", "ops", "serve"}


def test_import_glade_loads_nothing_heavy() -> None:
    code = "import glade, sys; print(sorted({'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE_LINES
