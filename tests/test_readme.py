"""README and docs say only what is there: files, commands, keys."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from glade.cli import VERBS, read_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.split("\n"):
                if line.startswith("glade "):
                    yield line


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_is_understood(line):
    _, verb, *words = shlex.split(line, comments=True)
    # what these two start from must exist, and is looked up
    words = [word for word in words if word != "--resume" and not word.startswith("--train.init_from")]
    read_config(VERBS[verb], words)


def test_every_verb_is_shown():
    shown = {shlex.split(line, comments=True)[1] for line in commands()}
    assert shown == set(VERBS)


def test_the_tree_names_every_file():
    tree = re.search(r"^## The tree\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert tree is not None
    named = set(re.findall(r"[\w/]+\.py", tree[1]))
    files = {path.name for path in (ROOT / "glade").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert files == {Path(name).name for name in named} - {"__init__.py"}


def test_python_in_the_pages_parses_and_imports_what_exists():
    import glade

    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "glade":
                    assert hasattr(glade, node.attr), f"{page.name}: glade.{node.attr}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
