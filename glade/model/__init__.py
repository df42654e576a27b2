"""The model: config, mixers, the language model, its state, and the checkpoint folder.

Imports nothing of data or training; `LanguageModel` knows its mixers only by the protocol of `glade.model.mixer`.
Names resolve on first use, so that `glade.model.config` (and with it every recipe and the help of every command) can
be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "MIXERS": "config",
    "Block": "block",
    "LanguageModel": "lm",
    "ModelConfig": "config",
    "State": "state",
}

if TYPE_CHECKING:
    from glade.model.block import Block
    from glade.model.config import MIXERS, ModelConfig
    from glade.model.lm import LanguageModel
    from glade.model.state import State

__all__ = ["MIXERS", "Block", "LanguageModel", "ModelConfig", "State"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'glade.model' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"glade.model.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
