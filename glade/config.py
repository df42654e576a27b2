"""Settings: frozen dataclasses whose fields know their meaning, filled from yaml and `--a.b=c` arguments.

Every config of glade is a `@dataclass(frozen=True, kw_only=True)` whose fields are made with `setting`. A config
checks itself in `__post_init__`; this file knows no key of any of them, and does not print (`glade.cli` does).

    config = load(TrainConfig, "run.yaml", ["--train.lr=3e-4", "--model.dim=256", "--train.compile"])

Later wins: the defaults, then `base` (a recipe), then the file, then the overrides.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from glade.errors import ConfigError
from glade.values import BARE, Loader, Typed, convert, type_name

C = TypeVar("C")

REQUIRED: Any = MISSING
"""As the default of a `setting`: the key must be given."""


def setting(default: Any = MISSING, help: str = "", *, default_factory: Any = MISSING) -> Any:
    """A config field: its default (`REQUIRED` for none), and its meaning with the unit.

    A nested config or a mutable default takes `default_factory`, as in `dataclasses.field`.
    """
    return field(default=default, default_factory=default_factory, metadata={"help": help})


def load(
    cls: type[C],
    file: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    base: C | None = None,
) -> C:
    """A `cls` from `base` (else the defaults), a yaml `file`, and `overrides`, the later winning.

    Args:
        overrides: arguments as typed, `["--a.b=c", "--flag"]`, or a mapping `{"a.b": value}`
    Raises:
        ConfigError: an unknown key, a wrong type, a key given twice, a required key left out, a bad file.
    """
    tree = {} if file is None else _read(Path(file))
    _check_keys(cls, tree, "" if file is None else f" in {file}")
    pairs = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    typed = _nest(pairs)
    _check_keys(cls, typed, "")
    return _build(cls, _merge(tree, typed), base)


def save(config: Any, file: str | Path) -> None:
    """Write `config` as yaml that `load` reads back to an equal config."""
    Path(file).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """`config` as the text that `load` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with the dotted keys of `changes` set, every check of the config run again."""
    return load(type(config), overrides=changes, base=config)


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain dicts, lists and scalars, fit for yaml and JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of `to_dict`; keys left out take their defaults, unknown ones are errors."""
    _check_keys(cls, values, "")
    return _build(cls, values, None)


class Key(NamedTuple):
    """One line of `describe`: `name` is dotted, `section` the part before the last dot."""

    name: str
    section: str
    type: str
    default: Any  # REQUIRED where there is none
    help: str


def describe(cls: type, base: Any = None, section: str = "") -> Iterator[Key]:
    """Every key of `cls` in order of declaration, with the default that `base` (else the class) gives it."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        default = _default(f) if base is None else getattr(base, f.name)
        nested = section_class(hints[f.name])
        if nested is not None:
            yield from describe(nested, default if is_dataclass(default) else None, f"{section}{f.name}.")
        else:
            help = f.metadata.get("help", "")
            yield Key(section + f.name, section.rstrip("."), type_name(hints[f.name]), default, help)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--a.b=c", "--flag"]` as `{"a.b": "c", "flag": true}`; `load` applies the types of the fields."""
    pairs: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not all(part.isidentifier() for part in key.split(".")):
            raise ConfigError(f"{argument!r} is not a setting; write --section.key=value")
        if key in pairs:
            raise ConfigError(f"--{key} is given twice; give it once")
        pairs[key] = Typed(text) if equals else BARE
    return pairs


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not yaml: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds a {type(tree).__name__}; a config file is a mapping of keys to values")
    return tree


def _nest(pairs: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key!r} and its section {section!r} are both given; give one of them")
        if name in node:
            raise ConfigError(f"{key!r} and keys inside it are both given; give one of them")
        node[name] = dict(value) if isinstance(value, Mapping) else value
    return tree


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _check_keys(cls: type, tree: Mapping[Any, Any], where: str, prefix: str = "", root: type | None = None) -> None:
    root = root or cls
    hints = get_type_hints(cls)
    for name, value in tree.items():
        if name not in hints:
            unknown = f"{prefix}{name}"
            while isinstance(value, Mapping) and value:
                name, value = next(iter(value.items()))
                unknown += f".{name}"
            raise ConfigError(f"unknown key '{unknown}'{where}{_nearest(root, unknown)}")
        nested = section_class(hints[name])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(nested, value, where, f"{prefix}{name}.", root)


def _nearest(cls: type, name: str) -> str:
    keys = {key.name: key for key in describe(cls)}
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    near = same_leaf[:3] or get_close_matches(name, keys, n=2, cutoff=0.6)
    if not near:
        return f"; the keys are {', '.join(keys)}" if len(keys) <= 12 else "; --help lists every key"
    return "; did you mean " + ", or ".join(f"'{key}' ({keys[key].help})" for key in near) + "?"


def _build(cls: type[C], tree: Mapping[str, Any], base: C | None, prefix: str = "") -> C:
    hints = get_type_hints(cls)
    values = {}
    for f in fields(cls):  # type: ignore[arg-type]
        current = _default(f) if base is None else getattr(base, f.name)
        if f.name in tree:
            current = _value(tree[f.name], hints[f.name], prefix + f.name, current)
        if current is MISSING:
            raise ConfigError(f"'{prefix}{f.name}' is needed ({f.metadata.get('help', '')}); it has no default")
        values[f.name] = current
    return cls(**values)


def _value(value: Any, kind: Any, key: str, current: Any) -> Any:
    """The value of a field; the keys that a section's mapping leaves out stay as they are in `current`."""
    section = section_class(kind)
    if section is None:
        return convert(value, kind, key)
    if isinstance(value, section):
        return value
    if isinstance(value, Mapping):
        return _build(section, value, current if isinstance(current, section) else None, f"{key}.")
    if kind is not section and (value is None or (isinstance(value, Typed) and value.lower() in ("none", "null"))):
        return None
    raise ConfigError(f"'{key}' is a section, given {value!r}; set the keys inside it, as in --{key}.key=value")


def _default(f: Any) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def section_class(kind: Any) -> Any:
    """The dataclass of a field that is a section, be it an optional one; None for a plain field."""
    for inner in (kind, *(get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ())):
        if is_dataclass(inner):
            return inner
    return None


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
