"""glade: gated linear attention and delta engine. `import glade` loads nothing heavy; names resolve on first use.

model = glade.load("runs/demo/checkpoints/best")
print(glade.generate(model, "ROMEO:", max_new_tokens=200))
glade.train(config)                  # a `glade.train.Config`, see glade.recipes for ready ones
o, state = glade.ops.linear_attention(q, k, v, g=g, erase=b, write=w)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> (module, attribute); no attribute means the module itself
_EXPORTS = {
    "LanguageModel": ("glade.model.lm", "LanguageModel"),
    "ModelConfig": ("glade.model.config", "ModelConfig"),
    "generate": ("glade.infer.generate", "generate"),
    "load": ("glade.interop.load", "load"),
    "ops": ("glade.ops", None),
    "recipes": ("glade.recipes", None),
    "train": ("glade.train", None),
}

if TYPE_CHECKING:
    from glade import ops, recipes, train
    from glade.infer.generate import generate
    from glade.interop.load import load
    from glade.model.config import ModelConfig
    from glade.model.lm import LanguageModel

__all__ = ["LanguageModel", "ModelConfig", "__version__", "generate", "load", "ops", "recipes", "train"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'glade' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, attribute = _EXPORTS[name]
    value = import_module(module)
    return value if attribute is None else getattr(value, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
