"""Small models of every kind, shared by the tests of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glade.model import MIXERS, LanguageModel, ModelConfig

VOCAB = 37

_BASE: dict[str, Any] = {"num_layers": 2, "dim": 32, "vocab_size": VOCAB, "ffn_dim": 24}
_HEADS: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "head_dim_v": 12}  # K != V, and H * K != D
_GVA: dict[str, Any] = {**_HEADS, "num_v_heads": 4}

# name -> settings; every mixer as published, and every option that changes what a mixer does
CASES: dict[str, dict[str, Any]] = {
    **{mixer: {"mixer": mixer, **_HEADS} for mixer in MIXERS if mixer not in ("rnn", "swa")},
    "rnn": {"mixer": "rnn", "rnn_dim": 20},
    "swa": {"mixer": "swa", "window": 5, **_HEADS},
    "rnn slide": {"mixer": "rnn", "rnn_activation": "slide"},
    "softmax gqa": {
        "mixer": "softmax",
        **_HEADS,
        "num_heads": 4,
        "num_kv_heads": 2,
        "qkv_bias": True,
        "out_bias": True,
    },
    "softmax qwen": {"mixer": "softmax", **_HEADS, "rope_fraction": 0.5, "qk_norm": True, "attention_gate": True},
    "softmax nope": {"mixer": "softmax", **_HEADS, "rope": False},
    "softmax learned": {"mixer": "softmax", **_HEADS, "learned_positions": 64, "norm": "layernorm"},
    "gla gva conv": {"mixer": "gla", **_GVA, "conv_size": 4, "activation": "silu", "feature_map": "relu"},
    "gla temperature": {"mixer": "gla", **_HEADS, "gate_form": "sigmoid_temperature", "gate_rank": 3},
    "linear l2": {"mixer": "linear", **_GVA, "qk_l2norm": True, "conv_size": 3, "output_norm": "layernorm"},
    "linear nope": {"mixer": "linear", **_HEADS, "rope": False},
    "retnet nope": {"mixer": "retnet", **_HEADS, "rope": False},
    "delta gva": {"mixer": "delta", **_GVA, "allow_neg_eigval": True},
    "delta no conv": {"mixer": "delta", **_HEADS, "conv_size": 0},
    "delta kaczmarz": {"mixer": "delta", **_GVA, "kaczmarz": True, "qk_l2norm": False},
    "gdn gva": {"mixer": "gdn", **_GVA, "output_gate": "sigmoid", "output_gate_rank": 4},
    "gdn kaczmarz": {"mixer": "gdn", **_HEADS, "kaczmarz": True, "kaczmarz_clip": True, "qk_l2norm": False},
    "kda gva bounded": {"mixer": "kda", **_GVA, "gate_lower_bound": -5.0},
    "gdn2 gva": {"mixer": "gdn2", **_GVA, "allow_neg_eigval": True, "output_gate": "absent", "gate_rank": 0},
    "kla gva clip": {"mixer": "kla", **_GVA, "kaczmarz_clip": True, "kaczmarz_eps_mode": "floor"},
    "hybrid": {"layers": "gdn2 swa gla softmax", "num_layers": 4, **_HEADS, "window": 5, "num_kv_heads": 1},
    "post norm": {"mixer": "gdn2", **_HEADS, "norm_placement": "post", "norm": "rmsnorm_eps_outside"},
    "gelu untied": {"mixer": "gdn2", **_HEADS, "ffn": "gelu", "tie_embeddings": False, "vocab_multiple": 16},
    "no ffn": {"mixer": "kda", **_HEADS, "ffn": "none", "ffn_dim": None},
    "moe": {"mixer": "gdn", **_HEADS, "ffn": "moe", "ffn_dim": None, "num_experts": 5, "expert_dim": 16}
    | {"experts_per_token": 2, "shared_expert_dim": 8},
}

Build = Callable[..., LanguageModel]


@pytest.fixture
def build() -> Build:
    """build(case, dtype) -> a small model in eval mode whose every parameter matters (not only as initialised)."""

    def _build(case: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
        model = LanguageModel(ModelConfig(**(_BASE | CASES[case]))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
        return model.to(dtype)

    return _build


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape)


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    """make_ids(B, T) -> random token ids of the small models' vocabulary."""
    return ids_of
