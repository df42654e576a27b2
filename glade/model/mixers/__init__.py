"""The mixers by name. Each is built from the model's width and its resolved options."""

from collections.abc import Callable
from typing import Any

from glade.model.config import ModelConfig
from glade.model.mixer import Mixer
from glade.model.mixers.attention import Attention
from glade.model.mixers.decay import GLA, RetNet
from glade.model.mixers.delta import KDA, Delta, GatedDeltaNet, GatedDeltaNet2
from glade.model.mixers.linear import Linear
from glade.model.mixers.rnn import Rnn

__all__ = ["REGISTRY", "make_mixer"]

REGISTRY: dict[str, Callable[[int, Any], Mixer]] = {
    "softmax": Attention,
    "swa": Attention,  # the one with a window
    "linear": Linear,
    "retnet": RetNet,
    "gla": GLA,
    "delta": Delta,
    "gdn": GatedDeltaNet,
    "kda": KDA,
    "gdn2": GatedDeltaNet2,
    "kla": GatedDeltaNet2,  # the one whose Kaczmarz step is on
    "rnn": Rnn,
}


def make_mixer(config: ModelConfig, mixer: str) -> Mixer:
    """The mixer called `mixer`, with the options `config` gives it."""
    return REGISTRY[mixer](config.dim, config.options(mixer))
