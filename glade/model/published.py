"""What each mixer is as published: the options it has, and the value each takes when a config leaves it None.

This is a table, not code that builds anything (`glade.model.mixers` does). An option that a mixer's row lacks does
not exist for it, and a config that sets one no layer has is refused. Sizes are not part of a publication: the head
dims default to dim / num_heads for every mixer, so that mixers compare at equal width (the recipes hold the
published sizes).

Sources: attention arXiv:1706.03762; linear 2006.16236; RetNet 2307.08621; GLA 2312.06635; DeltaNet 2406.06484;
GDN 2412.06464; KDA 2510.26692; GDN-2 2605.22791; KLA 2605.08587; Elman, Cognitive Science 14 (1990).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from glade.errors import ConfigError

Activation = Literal["silu", "identity"]
FeatureMap = Literal["identity", "elu1", "relu"]
GateForm = Literal["logsigmoid", "sigmoid_temperature"]
EpsMode = Literal["floor", "add"]
OutputNorm = Literal["rmsnorm", "layernorm", "layernorm_plain", "absent"]
OutputGate = Literal["silu", "sigmoid", "absent"]
RnnActivation = Literal["tanh", "slide"]


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """softmax and swa, every option resolved; the meanings are in `ModelConfig`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    scale: float | None
    rope: bool
    rope_theta: float
    rope_fraction: float
    qk_norm: bool
    qk_norm_eps: float
    attention_gate: bool
    qkv_bias: bool
    out_bias: bool
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """The linear mixers, every option resolved; the meanings are in `ModelConfig`.

    The defaults are those of options that a mixer does not have.
    """

    num_heads: int
    num_v_heads: int
    head_dim: int
    head_dim_v: int
    scale: float | None
    conv_size: int
    activation: Activation
    feature_map: FeatureMap
    qk_l2norm: bool
    output_norm: OutputNorm
    output_norm_eps: float
    output_gate: OutputGate
    output_gate_rank: int
    output_gate_bias: bool
    rope: bool = False
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    gate_rank: int = 0
    gate_form: GateForm = "logsigmoid"
    gate_normalizer: float = 1.0
    gate_lower_bound: float | None = None
    allow_neg_eigval: bool = False
    kaczmarz: bool = False
    kaczmarz_eps: float = 1e-6
    kaczmarz_eps_mode: EpsMode = "floor"
    kaczmarz_clip: bool = False


@dataclass(frozen=True, kw_only=True)
class RnnOptions:
    """rnn, every option resolved; the meanings are in `ModelConfig`."""

    rnn_activation: RnnActivation
    rnn_dim: int


MixerOptions = AttentionOptions | LinearOptions | RnnOptions


# A default that follows from the model config and the options above it in the row.
Derived = Callable[[Any, dict[str, Any]], Any]


def _head_dim(config: Any, options: dict[str, Any]) -> int:
    if config.dim % options["num_heads"]:
        raise ConfigError(
            f"dim {config.dim} is not a multiple of num_heads {options['num_heads']}; give head_dim, or change one"
        )
    return config.dim // options["num_heads"]


def _same_as(name: str) -> Derived:
    return lambda config, options: options[name]


_HEADS = {"num_heads": 4, "head_dim": _head_dim, "head_dim_v": _same_as("head_dim"), "scale": None}

_ROPE = {
    "rope": lambda config, options: config.learned_positions == 0,
    "rope_theta": 10000.0,
    "rope_fraction": 1.0,
}

_ATTENTION = (
    _HEADS
    | _ROPE
    | {
        "num_kv_heads": _same_as("num_heads"),
        "qk_norm": False,
        "qk_norm_eps": lambda config, options: config.norm_eps,
        "attention_gate": False,
        "qkv_bias": False,
        "out_bias": False,
    }
)

_LINEAR = _HEADS | {
    "num_v_heads": _same_as("num_heads"),
    "conv_size": 0,
    "activation": "identity",
    "feature_map": "identity",
    "qk_l2norm": False,
    "output_norm": "rmsnorm",
    "output_norm_eps": lambda config, options: config.norm_eps,
    "output_gate": "absent",
    "output_gate_rank": 0,
    "output_gate_bias": False,
}

_DELTA = _LINEAR | {
    "conv_size": 4,
    "activation": "silu",
    "qk_l2norm": True,
    "allow_neg_eigval": False,
    "kaczmarz": False,
    "kaczmarz_eps": 1e-6,
    "kaczmarz_eps_mode": "add",
    "kaczmarz_clip": False,
}

_LOW_RANK_GATE = {"gate_rank": _same_as("head_dim_v")}
_LOW_RANK_OUTPUT_GATE = {"output_gate_rank": _same_as("head_dim_v"), "output_gate_bias": True}
_UNBOUNDED = {"gate_lower_bound": None}

_GDN2 = _DELTA | _LOW_RANK_GATE | _UNBOUNDED | {"output_gate": "silu", **_LOW_RANK_OUTPUT_GATE}

PUBLISHED: dict[str, dict[str, Any]] = {
    "softmax": _ATTENTION,
    "swa": _ATTENTION | {"window": 2048},
    # a plain sum over the past does not know the order of what it sums, so these two are told positions
    "linear": _LINEAR | _ROPE | {"feature_map": "elu1"},
    "retnet": _LINEAR | _ROPE | {"output_gate": "silu"},
    "gla": _LINEAR | {"gate_form": "logsigmoid", "gate_rank": 16, "gate_normalizer": 16.0} | {"output_gate": "silu"},
    "delta": _DELTA,
    "gdn": _DELTA | _UNBOUNDED | {"output_gate": "silu"},
    "kda": _DELTA | _LOW_RANK_GATE | _UNBOUNDED | {"output_gate": "sigmoid", **_LOW_RANK_OUTPUT_GATE},
    "gdn2": _GDN2,
    # neither q nor k is normalised: the step itself divides by |k|^2. The clip of one published checkpoint is not the
    # default: with small heads |k|^2 is small, every gate would sit at the clip and get no gradient
    "kla": _GDN2 | {"kaczmarz": True, "qk_l2norm": False},
    "rnn": {"rnn_activation": "tanh", "rnn_dim": lambda config, options: config.dim},
}

OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(name for row in PUBLISHED.values() for name in row))
"""Every option any mixer has, in a stable order."""

# The initialisation each mixer was published with (`glade.model.init` says what the names mean).
PUBLISHED_INIT = {
    "softmax": "gpt2",
    "swa": "gpt2",
    "linear": "fla",
    "retnet": "fla",
    "gla": "fla",
    "delta": "fla",
    "gdn": "gdn2",
    "kda": "gdn2",
    "gdn2": "gdn2",
    "kla": "gdn2",
    "rnn": "gpt2",
}
