"""Training: `glade.train(config)` runs a `TrainRun` and returns its results; the module is its own function.

(The package `glade.train` and the function of that name are one object, so that both spellings of the Python API work
whatever was imported first.)
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from glade.data.config import DataConfig
from glade.train.config import TrainRun, TrainSettings

if TYPE_CHECKING:
    from glade.train.run import Results

__all__ = ["DataConfig", "TrainRun", "TrainSettings"]


class _CallableModule(ModuleType):
    def __call__(self, config: TrainRun) -> "Results":
        """Train as `config` says; see `glade.train.pretrain.train`."""
        from glade.train.pretrain import train

        return train(config)


_module: Any = sys.modules[__name__]
_module.__class__ = _CallableModule
