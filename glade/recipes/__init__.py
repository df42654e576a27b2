"""Recipes: named configs. Each is a Python function that returns a full one; `RECIPES` finds it by name.

config = glade.recipes.get("gdn2_1_3b")
smaller = dataclasses.replace(glade.recipes.models.gdn2_1_3b(), num_layers=6)
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from glade.errors import ConfigError
from glade.model.config import ModelConfig
from glade.recipes.models import MODELS

__all__ = ["RECIPES", "get", "summary"]

RECIPES: dict[str, Callable[[], ModelConfig]] = dict(MODELS)


def get(name: str) -> ModelConfig:
    """The config that the recipe called `name` returns. Raises ConfigError with the nearest name if there is none."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"there is no recipe {name!r}{hint} The recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()


def summary(name: str) -> str:
    """What the recipe called `name` is, in a line."""
    recipe = RECIPES[name]
    function = recipe.func if isinstance(recipe, partial) else recipe
    return (function.__doc__ or "").strip().split("\n")[0]
