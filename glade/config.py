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
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from glade.errors import ConfigError

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
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    Path(file).write_text(text, encoding="utf-8")


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
        nested = _section(hints[f.name])
        if nested is not None:
            yield from describe(nested, default if is_dataclass(default) else None, f"{section}{f.name}.")
        else:
            help = f.metadata.get("help", "")
            yield Key(section + f.name, section.rstrip("."), _type_name(hints[f.name]), default, help)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--a.b=c", "--flag"]` as `{"a.b": "c", "flag": true}`; `load` applies the types of the fields."""
    pairs: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not all(part.isidentifier() for part in key.split(".")):
            raise ConfigError(f"{argument!r} is not a setting; write --section.key=value")
        if key in pairs:
            raise ConfigError(f"--{key} is given twice; give it once")
        pairs[key] = _Text(text) if equals else _BARE
    return pairs


class _Text(str):
    """A value as typed on the command line, where `none` means None and a list is written a,b."""


_BARE = _Text()  # the value of a flag without `=`, told apart by identity


class _Loader(yaml.SafeLoader):
    """Yaml in which a key given twice is an error, as it is on the command line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"key {name!r} is given twice{node.start_mark}; give it once")
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not yaml: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} holds a {type(tree).__name__}; a config file is a mapping of keys to values"
        )
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


def _check_keys(
    cls: type, tree: Mapping[Any, Any], where: str, prefix: str = "", root: type | None = None
) -> None:
    root = root or cls
    hints = get_type_hints(cls)
    for name, value in tree.items():
        if name not in hints:
            raise ConfigError(f"unknown key '{prefix}{name}'{where}{_nearest(root, f'{prefix}{name}')}")
        nested = _section(hints[name])
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
            current = _convert(tree[f.name], hints[f.name], prefix + f.name, current)
        if current is MISSING:
            raise ConfigError(
                f"'{prefix}{f.name}' is needed ({f.metadata.get('help', '')}); it has no default"
            )
        values[f.name] = current
    return cls(**values)


def _convert(value: Any, kind: Any, key: str, current: Any = None) -> Any:
    """`value` as the type `kind`; `current` is what a nested section's unnamed keys keep."""
    if value is _BARE:
        if bool in (kind, *get_args(kind)):
            return True
        raise ConfigError(f"--{key} needs a value ({_type_name(kind)}); write --{key}=value, with the =")
    if get_origin(kind) in (Union, types.UnionType):
        return _convert_union(value, get_args(kind), key, current)
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return _build(kind, value, current if isinstance(current, kind) else None, f"{key}.")
        raise ConfigError(
            f"'{key}' is a section, given {value!r}; set the keys inside it, as in --{key}.key=value"
        )
    try:
        return _convert_plain(value, kind, key)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _wrong(value, kind, key) from error


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str, current: Any) -> Any:
    none = isinstance(value, _Text) and value.lower() in ("none", "null")
    if types.NoneType in kinds and (value is None or none):
        return None
    exact = [kind for kind in kinds if type(value) is kind]
    # text typed by the user is tried as everything else before it is left as text
    for kind in exact or sorted(kinds, key=lambda kind: kind is str):
        listed = get_origin(kind) in (tuple, list) and str in kinds and isinstance(value, str)
        if kind is types.NoneType or (listed and not value.startswith("[")):
            continue
        try:
            return _convert(value, kind, key, current)
        except ConfigError:
            if len([kind for kind in kinds if kind is not types.NoneType]) == 1:
                raise
    raise _wrong(value, Union[kinds], key)  # noqa: UP007 (a union made at run time)


def _convert_plain(value: Any, kind: Any, key: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        for option in inner:
            if (value == option and type(value) is type(option)) or (
                isinstance(value, _Text) and value == str(option)
            ):
                return option
    elif origin in (tuple, list):
        items = _items(value)
        if items is not None:
            repeated = origin is list or inner[1:] == (Ellipsis,)
            kinds = [inner[0]] * len(items) if repeated else inner
            if len(kinds) == len(items):
                return origin(_convert(item, kind, key) for item, kind in zip(items, kinds, strict=True))
    elif origin is dict:
        parsed = yaml.load(value, _Loader) if isinstance(value, _Text) else value
        if isinstance(parsed, Mapping):
            return {_convert(k, inner[0], key): _convert(v, inner[1], key) for k, v in parsed.items()}
    elif kind is bool:
        if isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind is int or kind is float:
        # yaml reads 1e6 as text, and people count tokens as 1e6: a whole number written so is an int
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return _whole(value) if kind is int else float(value)
    elif kind is str:
        if isinstance(value, str):
            return str(value)
    elif kind is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    else:
        raise AssertionError(f"the field '{key}' has type {kind}, which config.py does not read")
    raise _wrong(value, kind, key)


def _items(value: Any) -> list[Any] | None:
    """The items of a list given as a list, or typed as a,b or [a, b]; None for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return None
    if value.startswith("["):
        parsed = yaml.load(value, _Loader)
        return [_Text(item) if isinstance(item, str) else item for item in parsed]
    return [_Text(item.strip()) for item in value.split(",")] if value else []


def _whole(value: int | float | str) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError("not a whole number")
    return int(value)


def _wrong(value: Any, kind: Any, key: str) -> ConfigError:
    hint = "; put it in quotes" if kind is str else ""
    return ConfigError(f"'{key}' is {value!r}; expected {_type_name(kind)}{hint}")


def _default(f: Any) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _section(kind: Any) -> Any:
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


def _type_name(kind: Any) -> str:
    """How the help and the errors name a type: `int`, `text`, `a | b`, `list of int`."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " | ".join(str(option) for option in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(each) for each in inner)
    if origin in (tuple, list):
        each = dict.fromkeys(_type_name(each) for each in inner if each is not Ellipsis)
        return "list of " + ", ".join(each)
    names = {types.NoneType: "none", bool: "true | false", str: "text", Path: "path", dict: "mapping"}
    return names.get(origin) or origin.__name__
