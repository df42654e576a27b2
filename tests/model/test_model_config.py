"""ModelConfig: round trips, resolution, and every refusal with its reason."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from glade.config import load
from glade.errors import ConfigError
from glade.model import MIXERS, ModelConfig
from glade.model.published import OPTIONS, PUBLISHED, LinearOptions

HYBRID = ModelConfig(layers="gdn2 kda gla swa", num_heads={"gdn2": 4, "kda": 4, "gla": 4, "swa": 2}, window=16)


@pytest.mark.parametrize("config", [ModelConfig(), HYBRID, *(ModelConfig(mixer=m) for m in MIXERS)])
def test_json_round_trip_before_and_after_resolving(config: ModelConfig) -> None:
    for each in (config, config.resolve()):
        assert ModelConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert config.resolve().resolve() == config.resolve()
    for mixer in config.mixers:
        assert config.resolve().options(mixer) == config.options(mixer)


def test_resolving_writes_out_what_was_left_to_the_publication() -> None:
    resolved = ModelConfig(mixer="kda").resolve()
    assert (resolved.output_gate, resolved.conv_size, resolved.head_dim, resolved.init) == ("sigmoid", 4, 32, "gdn2")
    assert (resolved.ffn_dim, resolved.ffn_bias) == (384, False)
    assert resolved.window is None and resolved.rope is None  # kda has neither


def test_a_hybrid_keeps_what_each_mixer_was_published_with() -> None:
    resolved = HYBRID.resolve()
    assert resolved.output_gate == {"gdn2": "silu", "kda": "sigmoid", "gla": "silu"}
    assert resolved.conv_size == {"gdn2": 4, "kda": 4, "gla": 0}
    assert resolved.head_dim == {"gdn2": 32, "kda": 32, "gla": 32, "swa": 64}
    assert resolved.gate_rank == {"gdn2": 32, "kda": 32, "gla": 16}
    assert resolved.output_norm == "rmsnorm"  # they agree


def test_options_given_for_all_layers_and_for_one_mixer() -> None:
    config = ModelConfig(layers="gdn2 kda", output_gate={"kda": "silu"}, conv_size=2)
    gdn2, kda = config.options("gdn2"), config.options("kda")
    assert isinstance(gdn2, LinearOptions) and isinstance(kda, LinearOptions)
    assert (gdn2.output_gate, kda.output_gate) == ("silu", "silu")
    assert (gdn2.conv_size, kda.conv_size) == (2, 2)


def test_layers_is_a_pattern_or_a_list() -> None:
    assert ModelConfig(num_layers=4).layer_mixers == ("gdn2",) * 4
    assert ModelConfig(layers="gdn2 swa", num_layers=4).layer_mixers == ("gdn2", "swa", "gdn2", "swa")
    assert ModelConfig(layers=("gla", "kda"), num_layers=2).layer_mixers == ("gla", "kda")
    assert ModelConfig(layers=["gla", "kda"], num_layers=2) == ModelConfig(layers=("gla", "kda"), num_layers=2)


def test_the_command_line_sets_one_value_or_one_for_each_mixer() -> None:
    config = load(ModelConfig, overrides=["--layers=gdn2 swa", "--num_heads={gdn2: 4, swa: 2}", "--window=8"])
    assert config == ModelConfig(layers="gdn2 swa", num_heads={"gdn2": 4, "swa": 2}, window=8)
    assert load(ModelConfig, overrides=["--output_gate=absent"]).output_gate == "absent"


def test_rope_is_on_unless_positions_are_learned() -> None:
    assert ModelConfig(mixer="softmax").resolve().rope is True
    assert ModelConfig(mixer="softmax", learned_positions=8).resolve().rope is False
    assert ModelConfig(mixer="softmax", learned_positions=8, rope=True).resolve().rope is True


REFUSALS: list[tuple[dict, str]] = [
    ({"mixer": "gdm"}, "unknown mixer 'gdm'; did you mean 'gdn'? The mixers are softmax, swa"),
    ({"layers": "gdn2 sw"}, "unknown mixer 'sw'; did you mean 'swa'?"),
    ({"mixer": "bidirectional_rnn"}, "reads the tokens after the one it predicts"),
    ({"mixer": "birnn"}, "tests/ops/test_rnn.py shows the leak"),
    ({"layers": "gdn2 gla swa"}, "layers names 3 mixers, but num_layers is 4"),
    ({"layers": ("gla",) * 6}, "layers names 6 mixers, but num_layers is 4"),
    (
        {"window": 8},
        "window is 8, but no layer is a mixer it applies to: this model has gdn2, and window belongs to swa",
    ),
    ({"mixer": "rnn", "num_heads": 4}, "num_heads is 4, but no layer is a mixer it applies to"),
    ({"num_heads": {"swa": 2}}, "num_heads is {'swa': 2}, but no layer"),
    ({"mixer": "gla", "kaczmarz": True}, "kaczmarz belongs to delta, gdn, kda, gdn2, kla"),
    ({"num_heads": 3}, "dim 128 is not a multiple of num_heads 3"),
    ({"num_v_heads": 6}, "num_v_heads 6 is not a multiple of num_heads 4"),
    ({"mixer": "softmax", "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"mixer": "softmax", "rope_fraction": 0.3}, "9.6 channels"),
    ({"mixer": "softmax", "head_dim": 7}, "rope_fraction 1.0 of head_dim 7"),
    ({"mixer": "swa", "window": 0}, "swa: window is 0; it must be positive"),
    ({"gate_lower_bound": 1.0}, "gate_lower_bound is 1.0; it is a log decay"),
    ({"conv_size": 9}, "conv_size is 9; it must be in 0..8"),
    ({"ffn": "none", "ffn_dim": 4}, "ffn_dim is 4, but ffn is 'none'"),
    ({"num_experts": 4}, "num_experts is 4, but ffn is 'swiglu'"),
    ({"ffn": "moe", "num_experts": 2, "experts_per_token": 3}, "experts_per_token is 3, of 2 experts"),
    ({"dropout": 1.0}, "dropout is 1.0; it must be in [0, 1)"),
    ({"dim": 0}, "dim is 0; it must be positive"),
    ({"learned_positions": -1}, "learned_positions is -1; it may not be negative"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_a_setting_that_cannot_be_honoured_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig(**settings)


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'num_head'; did you mean 'num_heads'"):
        ModelConfig.from_dict({"num_head": 4})


def test_a_model_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        _ = ModelConfig().vocab_rows
    assert ModelConfig(vocab_size=65).vocab_rows == 65
    assert ModelConfig(vocab_size=65, vocab_multiple=64).vocab_rows == 128


def test_every_published_option_is_a_setting_with_a_meaning() -> None:
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    assert set(OPTIONS) <= fields.keys()
    assert all(f.metadata["help"] for f in fields.values())
    assert tuple(PUBLISHED) == MIXERS


def test_the_config_can_be_read_without_torch() -> None:
    code = "import sys; from glade.model import ModelConfig; ModelConfig().resolve(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
