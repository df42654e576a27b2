"""Settings: what a typed value becomes, what wins, what is refused and how, and that files read back equal."""

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glade.config import REQUIRED, describe, from_dict, load, parse_overrides, replace, save, setting, to_dict
from glade.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = setting(64, "width, channels")
    num_heads: int = setting(4, "heads")
    layers: tuple[str, ...] = setting((), "one name a layer")
    window: int | None = setting(None, "tokens a query sees")
    act: Literal["silu", "gelu"] = setting("silu", "activation")
    rope: bool | None = setting(None, "rotary positions; none is as published")

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class Train:
    lr: float = setting(3e-4, "peak learning rate")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW")
    max_tokens: int = setting(1_000_000, "tokens")
    compile: bool = setting(False, "compile the model")
    weights: dict[str, float] = setting(default_factory=dict, help="weight of each source")


@dataclass(frozen=True, kw_only=True)
class Run:
    run: str = setting("runs/x", "folder")
    note: str | None = setting(None, "free text")
    folder: Path = setting(Path("a"), "a path")
    either: int | str = setting(1, "a number or a name")
    model: Model = setting(default_factory=Model)
    train: Train = setting(default_factory=Train)
    draft: Model | None = setting(None, "an optional section")


@dataclass(frozen=True, kw_only=True)
class Needs:
    checkpoint: str = setting(REQUIRED, "which model")
    top: int = setting(3, "how many")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--model.dim=128", "model.dim", 128),
        ("--train.max_tokens=1e6", "train.max_tokens", 1_000_000),
        ("--train.max_tokens=2_500_000", "train.max_tokens", 2_500_000),
        ("--train.max_tokens=9007199254740993", "train.max_tokens", 2**53 + 1),
        ("--train.lr=1e-3", "train.lr", 1e-3),
        ("--train.lr=1", "train.lr", 1.0),
        ("--train.compile", "train.compile", True),
        ("--train.compile=true", "train.compile", True),
        ("--train.compile=false", "train.compile", False),
        ("--model.rope", "model.rope", True),
        ("--model.rope=none", "model.rope", None),
        ("--model.rope=false", "model.rope", False),
        ("--model.window=32", "model.window", 32),
        ("--model.window=none", "model.window", None),
        ("--model.act=gelu", "model.act", "gelu"),
        ("--model.layers=gdn2,swa", "model.layers", ("gdn2", "swa")),
        ("--model.layers=[gdn2, swa]", "model.layers", ("gdn2", "swa")),
        ('--model.layers=["a\\nb"]', "model.layers", ("a\nb",)),
        ("--model.layers=", "model.layers", ()),
        ("--train.betas=0.8,0.9", "train.betas", (0.8, 0.9)),
        ("--train.weights={a: 1, b: 0.5}", "train.weights", {"a": 1.0, "b": 0.5}),
        ("--run=none", "run", "none"),
        ("--run=1e6", "run", "1e6"),
        ("--run=", "run", ""),
        ("--run=a=b", "run", "a=b"),
        ("--note=none", "note", None),
        ("--note=true", "note", "true"),
        ("--folder=x/y", "folder", Path("x/y")),
        ("--either=7", "either", 7),
        ("--either=seven", "either", "seven"),
        ("--draft.dim=8", "draft.dim", 8),
    ],
)
def test_values_follow_the_type_of_their_field(argument: str, key: str, value: object) -> None:
    config: object = load(Run, overrides=[argument])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.dimm=3"], ["unknown key 'model.dimm'", "'model.dim'", "width, channels"]),
        (["--lr=3"], ["unknown key 'lr'", "'train.lr'", "peak learning rate"]),
        (["--model=3"], ["section"]),
        (["--model.dim"], ["--model.dim needs a value", "--model.dim=value"]),
        (["--model.dim=1.5"], ["model.dim", "1.5", "int"]),
        (["--model.dim=true"], ["model.dim", "true", "int"]),
        (["--train.lr=fast"], ["train.lr", "fast", "float"]),
        (["--train.max_tokens=inf"], ["train.max_tokens", "inf"]),
        (["--train.compile=yes"], ["train.compile", "true | false"]),
        (["--model.act=relu"], ["model.act", "relu", "silu | gelu"]),
        (["--train.betas=0.9"], ["train.betas", "list of float"]),
        (["--model.layers=[a"], ["model.layers", "list of text"]),
        (["--model.dim=8", "--model.dim=16"], ["--model.dim is given twice"]),
        (["--model={dim: 8}", "--model.dim=16"], ["both given"]),
        (["model.dim=8"], ["write --section.key=value"]),
        (["--model.dim=66"], ["dim 66", "num_heads 4"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key_and_the_remedy(arguments: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(Run, overrides=arguments)
    for words in said:
        assert words in str(error.value)


def test_later_wins_default_recipe_file_override(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  dim: 32\n  window: 8\ntrain: {lr: 1e-2, max_tokens: 1e5}\n")
    recipe = Run(model=Model(dim=16, num_heads=2, window=4), note="recipe")
    config = load(Run, file, ["--model.dim=48"], base=recipe)
    assert (config.model.dim, config.model.window, config.model.num_heads) == (48, 8, 2)
    assert (config.note, config.train.lr, config.train.max_tokens, config.run) == ("recipe", 1e-2, 100_000, "runs/x")


def test_checks_of_a_config_see_only_the_final_values(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {num_heads: 5}")  # at odds with the default dim, mended by the override
    assert load(Run, file, ["--model.dim=25"]).model.dim == 25


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {dimm: 3}", ["unknown key 'model.dimm'", "run.yaml"]),
        ("model: {dim: 3\n", ["run.yaml", "not yaml"]),
        ("- a\n- b\n", ["run.yaml", "mapping"]),
        ("note: a\nnote: b\n", ["given twice", "note"]),
        ("run: 5\n", ["run", "quotes"]),
        ("model: tiny\n", ["section"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(Run, file)
    for words in said:
        assert words in str(error.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load(Run, tmp_path / "run.yaml") == Run()


def test_a_required_key_is_asked_for_with_its_meaning() -> None:
    with pytest.raises(ConfigError, match=r"'checkpoint' is needed \(which model\)"):
        load(Needs, overrides=["--top=1"])
    assert load(Needs, overrides=["--checkpoint=x"]) == Needs(checkpoint="x")


@given(
    run=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    note=st.none() | st.sampled_from(["none", "null", "true", "1e6", "", "a: b", "- x", "~"]),
    lr=st.floats(allow_nan=False),
    layers=st.lists(st.sampled_from(["a", "none", "1", "x,y"])).map(tuple),
    either=st.integers() | st.sampled_from(["5", "five"]),
    draft=st.none() | st.builds(Model, window=st.none() | st.integers()),
)
def test_what_is_saved_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, **values: object) -> None:
    lr = values.pop("lr")
    layers = values.pop("layers")
    config = Run(model=Model(layers=layers), train=Train(lr=lr, weights={"b": 1.0}), **values)  # type: ignore[arg-type]
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    save(config, file)
    assert load(Run, file) == config
    assert from_dict(Run, to_dict(config)) == config


def test_replace_makes_another_config_and_checks_it() -> None:
    config = Run()
    changed = replace(config, {"model.dim": 128, "note": "none", "train": Train(lr=1.0)})
    assert (changed.model.dim, changed.note, changed.train.lr) == (128, "none", 1.0)
    assert config == Run()
    with pytest.raises(ConfigError, match="num_heads"):
        replace(config, {"model.dim": 129})
    with pytest.raises(FrozenInstanceError):
        config.run = "x"  # type: ignore[misc]


def test_describe_lists_every_key_with_section_type_default_and_meaning() -> None:
    keys = {key.name: key for key in describe(Run, Run(model=Model(dim=32)))}
    assert keys["model.dim"] == ("model.dim", "model", "int", 32, "width, channels")
    assert keys["draft.window"].type == "int | none"
    assert keys["draft.dim"].default == 64
    assert keys["train.betas"].type == "list of float"
    assert {key.name: key.default for key in describe(Needs)} == {"checkpoint": REQUIRED, "top": 3}


def test_a_field_made_without_setting_still_works() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain:
        size: int = field(default=1)

    assert load(Plain, overrides=["--size=2"]).size == 2


def test_parse_overrides_leaves_types_to_the_fields() -> None:
    assert parse_overrides(["--a.b=1", "--c=x=y"]) == {"a.b": "1", "c": "x=y"}
