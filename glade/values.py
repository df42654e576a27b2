"""One value of a config, from the command line's text or from yaml, as the type its field declares.

Reads bool, int, float, text, paths, Literal, unions with None and others, lists and mappings. Sections (nested
dataclasses) are the business of `glade.config`.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from glade.errors import ConfigError


class Typed(str):
    """A value as typed on the command line, where `none` means None and a list is written a,b."""


BARE = Typed()
"""The value of a flag without `=`, told apart by identity."""


class Loader(yaml.SafeLoader):
    """Yaml in which a key given twice is an error, as it is on the command line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"key {name!r} is given twice{node.start_mark}; give it once")
        return super().construct_mapping(node, deep)


def convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type `kind`.

    Raises:
        ConfigError: it is none; the message names the key, the value, and what is expected.
    """
    if value is BARE:
        if bool in (kind, *get_args(kind)):
            return True
        raise ConfigError(f"--{key} needs a value ({type_name(kind)}); write --{key}=value, with the =")
    if get_origin(kind) in (Union, types.UnionType):
        return _convert_union(value, get_args(kind), key)
    try:
        return _convert_plain(value, kind, key)
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _wrong(value, kind, key) from error


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    none = isinstance(value, Typed) and value.lower() in ("none", "null")
    if types.NoneType in kinds and (value is None or none):
        return None
    exact = [kind for kind in kinds if type(value) is kind]
    # text typed by the user is tried as everything else before it is left as text
    for kind in exact or sorted(kinds, key=lambda kind: kind is str):
        listed = get_origin(kind) in (tuple, list) and str in kinds and isinstance(value, str)
        if kind is types.NoneType or (listed and not value.startswith("[")):
            continue
        try:
            return convert(value, kind, key)
        except ConfigError:
            continue
    raise _wrong(value, Union[kinds], key)  # noqa: UP007 (a union made at run time)


def _convert_plain(value: Any, kind: Any, key: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        for option in inner:
            if (value == option and type(value) is type(option)) or (isinstance(value, Typed) and value == str(option)):
                return option
    elif origin in (tuple, list):
        items = _items(value)
        if items is not None:
            repeated = origin is list or inner[1:] == (Ellipsis,)
            kinds = [inner[0]] * len(items) if repeated else inner
            if len(kinds) == len(items):
                return origin(convert(item, kind, key) for item, kind in zip(items, kinds, strict=True))
    elif origin is dict:
        parsed = yaml.load(value, Loader) if isinstance(value, Typed) else value
        if isinstance(parsed, Mapping):
            return {convert(k, inner[0], key): convert(v, inner[1], key) for k, v in parsed.items()}
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
        parsed = yaml.load(value, Loader)
        return [Typed(item) if isinstance(item, str) else item for item in parsed]
    return [Typed(item.strip()) for item in value.split(",")] if value else []


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
    return ConfigError(f"'{key}' is {value!r}; expected {type_name(kind)}{hint}")


def type_name(kind: Any) -> str:
    """How the help and the errors name a type: `int`, `text`, `a | b`, `list of int`."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " | ".join(str(option) for option in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(each) for each in inner)
    if origin in (tuple, list):
        each = dict.fromkeys(type_name(each) for each in inner if each is not Ellipsis)
        return "list of " + ", ".join(each)
    names = {types.NoneType: "none", bool: "true | false", str: "text", Path: "path", dict: "mapping"}
    return names.get(origin) or origin.__name__
