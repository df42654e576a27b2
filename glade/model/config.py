"""`ModelConfig`: everything that decides what a language model computes, and nothing about training or data.

A per-mixer option takes one value for all layers that have it, or a mapping from mixer to value where a hybrid
needs two (`num_heads={"gdn2": 16, "swa": 18}`), or None: as published for that mixer (`glade.model.published`).
`resolve()` writes every None out, so that a checkpoint does not depend on this version's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from glade import config as settings
from glade.config import setting
from glade.errors import ConfigError
from glade.model.published import (
    OPTIONS,
    PUBLISHED,
    PUBLISHED_INIT,
    Activation,
    AttentionOptions,
    EpsMode,
    FeatureMap,
    GateForm,
    LinearOptions,
    MixerOptions,
    OutputGate,
    OutputNorm,
    RnnActivation,
    RnnOptions,
)

MIXERS: tuple[str, ...] = tuple(PUBLISHED)

# One value for every layer that has the option, a value per mixer, or None: as published.
Ints = int | dict[str, int] | None
Floats = float | dict[str, float] | None
Bools = bool | dict[str, bool] | None

_BIDIRECTIONAL = ("bidirectional", "bidirectional_rnn", "birnn", "bilstm", "brnn")
_MOE_FIELDS = ("num_experts", "experts_per_token", "expert_dim", "shared_expert_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model: embedding, `num_layers` blocks of mixer and feed-forward network, norm, head.

    Raises:
        ConfigError: a value out of range, an unknown mixer, settings at odds with each other, or an option that no
            layer of this model has.
    """

    # the stack
    mixer: str = setting("gdn2", f"the mixer of every layer: {' '.join(MIXERS)}")
    layers: str | tuple[str, ...] = setting(
        "", "mixers by layer, 'gdn2 gdn2 gdn2 swa', repeated over num_layers; empty: `mixer` everywhere"
    )
    num_layers: int = setting(4, "blocks")
    dim: int = setting(128, "width of the residual stream")

    # tokens
    vocab_size: int | None = setting(None, "token ids; none: the tokenizer's")
    vocab_multiple: int = setting(1, "the embedding has the next multiple of this many rows; the extra are never used")
    tie_embeddings: bool = setting(True, "the output head is the embedding")
    learned_positions: int = setting(0, "rows of a learned position table, which is the longest sequence; 0: no table")

    # feed-forward network
    ffn: Literal["swiglu", "gelu", "moe", "none"] = setting("swiglu", "feed-forward network of every block")
    ffn_dim: int | None = setting(None, "its hidden width; none: 8/3 dim up to a multiple of 64 (swiglu), 4 dim (gelu)")
    ffn_bias: bool | None = setting(None, "biases in it; none: yes for gelu, no for swiglu")
    num_experts: int | None = setting(None, "experts of a moe; none: 8")
    experts_per_token: int | None = setting(None, "experts each token is sent to; none: 2")
    expert_dim: int | None = setting(None, "hidden width of an expert (SwiGLU); none: as ffn_dim of swiglu, over 2")
    shared_expert_dim: int | None = setting(None, "hidden width of the expert every token uses; 0: none; none: 0")
    renormalize: bool = setting(True, "the chosen experts' probabilities are made to sum to 1")
    load_balance: float = setting(0.001, "weight of the moe load-balancing loss")

    # normalisation and dropout
    norm: Literal["rmsnorm", "rmsnorm_eps_outside", "layernorm"] = setting(
        "rmsnorm", "norm of the blocks; eps_outside divides by (rms + eps) instead of sqrt(rms^2 + eps)"
    )
    norm_eps: float = setting(1e-5, "eps of the norms")
    norm_placement: Literal["pre", "post"] = setting("pre", "pre: x + f(norm(x)); post: norm(x + f(x))")
    dropout: float = setting(0.0, "probability, on the sum of the embeddings")
    residual_dropout: float | None = setting(None, "probability, on what each block adds; none: as dropout")

    # initialisation
    init: Literal["normal", "gpt2", "fla", "gdn2"] | None = setting(
        None, "initial values; none: as published for the first layer's mixer"
    )
    init_std: float = setting(0.02, "standard deviation of the normal ones")

    # heads
    num_heads: Ints = setting(None, "query and key heads; none: 4")
    num_kv_heads: Ints = setting(None, "key and value heads of softmax and swa (GQA); none: num_heads")
    num_v_heads: Ints = setting(None, "value heads of linear mixers (GVA), a multiple of num_heads; none: num_heads")
    head_dim: Ints = setting(None, "query and key channels a head; none: dim / num_heads")
    head_dim_v: Ints = setting(None, "value channels a head; none: head_dim")
    scale: Floats = setting(None, "factor on q.k; none: head_dim ** -0.5")

    # softmax and swa
    window: Ints = setting(None, "tokens a swa token sees, itself included; none: 2048")
    rope: Bools = setting(None, "rotary positions (softmax swa linear retnet); none: yes without learned_positions")
    rope_theta: Floats = setting(None, "base of the rotary angles; none: 10000")
    rope_fraction: Floats = setting(None, "share of a head's channels that rotate; none: 1")
    qk_norm: Bools = setting(None, "RMSNorm with a weight on each head's q and k; none: no")
    qk_norm_eps: Floats = setting(None, "its eps; none: norm_eps")
    attention_gate: Bools = setting(None, "sigmoid gate on the heads' output; none: no")
    qkv_bias: Bools = setting(None, "biases of the q, k, v projections; none: no")
    out_bias: Bools = setting(None, "bias of the output projection; none: no")

    # linear mixers: what happens to q, k and v
    conv_size: Ints = setting(None, "taps of the short convolutions on q, k, v; 0: none; none: 4 for the delta family")
    activation: Activation | dict[str, Activation] | None = setting(
        None, "after the convolutions (or alone); none: silu for the delta family, else identity"
    )
    feature_map: FeatureMap | dict[str, FeatureMap] | None = setting(
        None, "on q and k after that; elu1 is elu(x) + 1; none: elu1 for linear, else identity"
    )
    qk_l2norm: Bools = setting(None, "unit q and k per head; none: yes for the delta family, no for kla and the others")

    # linear mixers: output
    output_norm: OutputNorm | dict[str, OutputNorm] | None = setting(
        None, "norm of each head's output; layernorm_plain has no weights; none: rmsnorm"
    )
    output_norm_eps: Floats = setting(None, "its eps; none: norm_eps")
    output_gate: OutputGate | dict[str, OutputGate] | None = setting(
        None, "activation of the output gate; none: silu (gla retnet gdn gdn2 kla), sigmoid (kda), else absent"
    )
    output_gate_rank: Ints = setting(None, "rank of its projection; 0: full; none: head_dim_v (kda gdn2 kla), else 0")
    output_gate_bias: Bools = setting(None, "bias of its (last) projection; none: yes for kda gdn2 kla")

    # linear mixers: decay and delta step
    gate_rank: Ints = setting(None, "rank of the decay's projection; 0: full; none: 16 for gla, else head_dim_v")
    gate_form: GateForm | dict[str, GateForm] | None = setting(
        None, "gla's decay: sigmoid(z)^(1/n), or sigmoid(z/n) with SiLU inside (compatibility); none: logsigmoid"
    )
    gate_normalizer: Floats = setting(None, "n in gate_form; none: 16")
    gate_lower_bound: Floats = setting(None, "bounds the log decay of gdn kda gdn2 kla, e.g. -5; none: unbounded")
    allow_neg_eigval: Bools = setting(None, "doubles the erase gate: eigenvalues in [-1, 1]; none: no")
    kaczmarz: Bools = setting(None, "Kaczmarz step eta / |k|^2 on the delta rule; none: yes for kla only")
    kaczmarz_eps: Floats = setting(None, "keeps |k|^2 from 0; none: 1e-6")
    kaczmarz_eps_mode: EpsMode | dict[str, EpsMode] | None = setting(None, "max(|k|^2, eps) or |k|^2 + eps; none: add")
    kaczmarz_clip: Bools = setting(None, "clips the scaled gates to [0, 1]; none: no")

    # rnn
    rnn_activation: RnnActivation | dict[str, RnnActivation] | None = setting(
        None, "tanh, or slide(a) = min(1, max(0, a)); none: tanh"
    )
    rnn_dim: Ints = setting(None, "hidden units; none: dim")

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        self._check_numbers()
        self._check_layers()
        self._check_feed_forward()
        for name in OPTIONS:
            self._check_option(name)
        for mixer in self.mixers:
            check_options(mixer, self.options(mixer))

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of every layer, in order."""
        return self._pattern() * (self.num_layers // len(self._pattern()))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The distinct mixers, in order of first use."""
        return tuple(dict.fromkeys(self._pattern()))

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: vocab_size up to a multiple of vocab_multiple."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size is not set; give the number of token ids (the tokenizer's vocab_size)")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def options(self, mixer: str) -> MixerOptions:
        """The options of one mixer of this model, every None resolved."""
        values: dict[str, Any] = {}
        for name, published in PUBLISHED[mixer].items():
            given = getattr(self, name)
            if isinstance(given, Mapping):
                given = given.get(mixer)
            if given is None:
                given = published(self, values) if callable(published) else published
            values[name] = given
        if mixer in ("softmax", "swa"):
            return AttentionOptions(**values)
        return RnnOptions(**values) if mixer == "rnn" else LinearOptions(**values)

    def resolve(self) -> "ModelConfig":
        """The same model with every "none: ..." written out; what a checkpoint stores. Idempotent."""
        changes: dict[str, Any] = {name: self._resolved_option(name) for name in OPTIONS}
        if self.ffn in ("swiglu", "gelu"):
            changes["ffn_dim"] = self.ffn_dim or self._published_ffn_dim()
            changes["ffn_bias"] = self.ffn == "gelu" if self.ffn_bias is None else self.ffn_bias
        if self.ffn == "moe":
            changes["num_experts"] = self.num_experts or 8
            changes["experts_per_token"] = self.experts_per_token or 2
            changes["expert_dim"] = self.expert_dim or self._published_ffn_dim() // 2
            changes["shared_expert_dim"] = self.shared_expert_dim or 0
        changes["residual_dropout"] = self.dropout if self.residual_dropout is None else self.residual_dropout
        changes["init"] = self.init or PUBLISHED_INIT[self.mixers[0]]
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `from_dict` gives an equal config back."""
        return settings.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Keys left out take their defaults; unknown keys are a ConfigError."""
        return settings.from_dict(cls, values)

    def _pattern(self) -> tuple[str, ...]:
        names = self.layers.replace(",", " ").split() if isinstance(self.layers, str) else self.layers
        return tuple(names) or (self.mixer,)

    def _published_ffn_dim(self) -> int:
        return 4 * self.dim if self.ffn == "gelu" else 64 * -(-8 * self.dim // (3 * 64))

    def _resolved_option(self, name: str) -> Any:
        values = {m: getattr(self.options(m), name) for m in self.mixers if name in PUBLISHED[m]}
        if len(set(values.values())) > 1:
            return {mixer: value for mixer, value in values.items() if value is not None}
        return next(iter(values.values()), None)

    def _check_numbers(self) -> None:
        positive = ("num_layers", "dim", "vocab_size", "vocab_multiple", "ffn_dim", "num_experts", "expert_dim",
                    "experts_per_token", "norm_eps", "init_std")  # fmt: skip
        for name in positive:
            _check(name, getattr(self, name), lambda value: value > 0, "must be positive")
        for name in ("learned_positions", "shared_expert_dim", "load_balance"):
            _check(name, getattr(self, name), lambda value: value >= 0, "may not be negative")
        for name in ("dropout", "residual_dropout"):
            _check(name, getattr(self, name), lambda value: 0 <= value < 1, "must be in [0, 1)")

    def _check_layers(self) -> None:
        for mixer in (self.mixer, *self._pattern()):
            if mixer.lower() in _BIDIRECTIONAL:
                raise ConfigError(
                    f"mixer {mixer!r} reads the tokens after the one it predicts, so a language model that used it "
                    "would train to a loss near 0 and could not generate (tests/ops/test_rnn.py shows the leak); use "
                    "'rnn', or glade.ops.rnn's bidirectional_rnn as an encoder"
                )
            if mixer not in MIXERS:
                near = get_close_matches(mixer, MIXERS, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ConfigError(f"unknown mixer {mixer!r}{hint} The mixers are {', '.join(MIXERS)}")
        if self.num_layers % len(self._pattern()):
            raise ConfigError(
                f"layers names {len(self._pattern())} mixers, but num_layers is {self.num_layers}; "
                "make num_layers a multiple of that, or name every layer"
            )

    def _check_feed_forward(self) -> None:
        given = {name: getattr(self, name) for name in ("ffn_dim", "ffn_bias", *_MOE_FIELDS)}
        allowed = {"moe": _MOE_FIELDS, "none": ()}.get(self.ffn, ("ffn_dim", "ffn_bias"))
        for name, value in given.items():
            if value is not None and name not in allowed:
                raise ConfigError(
                    f"{name} is {value}, but ffn is {self.ffn!r}, which has no such setting; leave it out"
                )
        chosen, experts = self.experts_per_token or 2, self.num_experts or 8
        if chosen > experts:
            raise ConfigError(f"experts_per_token is {chosen}, of {experts} experts; it may not exceed num_experts")

    def _check_option(self, name: str) -> None:
        given = getattr(self, name)
        having = [mixer for mixer in self.mixers if name in PUBLISHED[mixer]]
        strangers = [mixer for mixer in given if mixer not in having] if isinstance(given, Mapping) else []
        if given is not None and (strangers or not having):
            owners = ", ".join(mixer for mixer in MIXERS if name in PUBLISHED[mixer])
            raise ConfigError(
                f"{name} is {given}, but no layer is a mixer it applies to: this model has "
                f"{', '.join(self.mixers)}, and {name} belongs to {owners}"
            )


def check_options(mixer: str, options: MixerOptions) -> None:
    """The cross-checks of one mixer's resolved options; ConfigError where they do not fit together."""
    if isinstance(options, AttentionOptions):
        _check_attention(mixer, options)
    elif isinstance(options, LinearOptions):
        _check_linear(mixer, options)
    else:
        _check(f"{mixer}: rnn_dim", options.rnn_dim, lambda value: value > 0, "must be positive")


def _check_attention(mixer: str, options: AttentionOptions) -> None:
    _check_positive(mixer, options, "num_heads", "num_kv_heads", "head_dim", "head_dim_v", "window", "rope_theta")
    if options.num_heads % options.num_kv_heads:
        raise ConfigError(
            f"{mixer}: num_heads {options.num_heads} is not a multiple of num_kv_heads {options.num_kv_heads}; "
            "each key head serves the same number of query heads"
        )
    _check_rope(mixer, options)


def _check_rope(mixer: str, options: AttentionOptions | LinearOptions) -> None:
    rotated = options.head_dim * options.rope_fraction
    if options.rope and (not 0 < options.rope_fraction <= 1 or rotated != int(rotated) or int(rotated) % 2):
        raise ConfigError(
            f"{mixer}: rope_fraction {options.rope_fraction} of head_dim {options.head_dim} is {rotated} channels; "
            "rotary positions turn pairs, so it must be an even number of at most head_dim"
        )


def _check_linear(mixer: str, options: LinearOptions) -> None:
    _check_positive(mixer, options, "num_heads", "num_v_heads", "head_dim", "head_dim_v", "gate_normalizer",
                    "kaczmarz_eps", "output_norm_eps")  # fmt: skip
    if options.num_v_heads % options.num_heads:
        raise ConfigError(
            f"{mixer}: num_v_heads {options.num_v_heads} is not a multiple of num_heads {options.num_heads}; "
            "each key head serves the same number of value heads"
        )
    _check_rope(mixer, options)
    for name in ("output_gate_rank", "gate_rank"):
        _check(f"{mixer}: {name}", getattr(options, name), lambda value: value >= 0, "may not be negative")
    _check(f"{mixer}: conv_size", options.conv_size, lambda value: 0 <= value <= 8, "must be in 0..8")
    bound = options.gate_lower_bound
    _check(f"{mixer}: gate_lower_bound", bound, lambda value: value < 0, "is a log decay, so it must be negative")


def _check_positive(mixer: str, options: MixerOptions, *names: str) -> None:
    for name in names:
        _check(f"{mixer}: {name}", getattr(options, name), lambda value: value > 0, "must be positive")


def _check(name: str, value: Any, holds: Any, rule: str) -> None:
    if value is not None and not holds(value):
        raise ConfigError(f"{name} is {value}; it {rule}")


assert set(OPTIONS) <= {f.name for f in fields(ModelConfig)}
