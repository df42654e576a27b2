"""The native decode step against the model's own `step_` in fp64, over every mixer and option; states, slots, bits."""

import pytest
import torch

from glade.errors import BackendError
from glade.infer.step import decode_step
from glade.model import LanguageModel, ModelConfig
from glade.model.config import MIXERS
from glade.model.quantized import Int8Weight, quantize
from glade.ops import native
from glade.ops.tolerances import TOLERANCES, relative_error

VOCAB = 71
LINEAR = ("linear", "retnet", "gla", "delta", "gdn", "kda", "gdn2", "kla")
DELTA = ("delta", "gdn", "kda", "gdn2", "kla")


def make(mixer="gdn2", dtype=torch.float32, **options):
    """A model of 2 layers with nothing at its initial value, biases and norms included."""
    if mixer != "rnn":
        options = {"num_heads": 3, "head_dim": 20} | options
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer=mixer, vocab_size=VOCAB, num_layers=2, **{"dim": 50} | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def in_fp64(model):
    twin = LanguageModel(model.config).eval()
    plain = {name: x.dequantized() if isinstance(x, Int8Weight) else x for name, x in model.state_dict().items()}
    twin.load_state_dict(plain)
    return twin.double()


def tensors(state):
    return [x for layer in state.layers for x in layer if x.numel()]


def assert_steps_agree(model, batch=3, tokens=7):
    """The step does what fp64's `step_` does, to logits and to every tensor of the state: within the tolerance, or at
    most twice as far as the model's own `step_`, where two layers of that dtype's roundings are beyond it."""
    twin, step = in_fp64(model), decode_step(model)
    assert step.path == "native", step.reason
    state, eager, exact = model.init_state(batch), model.init_state(batch), twin.init_state(batch)
    tolerance = TOLERANCES[model.embed.weight.dtype].value

    def assert_near(x, own, expected):
        assert relative_error(x, expected) < max(tolerance, 2 * relative_error(own, expected))

    for _ in range(tokens):
        ids = torch.randint(VOCAB, (batch,))
        assert_near(step(ids, state), model.step_(ids, eager), twin.step_(ids, exact))
    assert torch.equal(state.position, exact.position)
    for x, own, expected in zip(tensors(state), tensors(eager), tensors(exact), strict=True):
        assert_near(x, own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(mixer, dtype):
    assert_steps_agree(make(mixer, dtype))


@pytest.mark.parametrize("options", [
    {"num_v_heads": 6},
    {"head_dim": 16, "head_dim_v": 37},
    {"conv_size": 0},
    {"conv_size": 1},
    {"conv_size": 3, "activation": "identity"},
    {"feature_map": "relu", "qk_l2norm": True},
    {"feature_map": "elu1"},
    {"qk_l2norm": True},
    {"output_norm": "layernorm"},
    {"output_norm": "layernorm_plain"},
    {"output_norm": "absent", "output_gate": "absent"},
    {"output_gate": "sigmoid", "output_gate_rank": 5, "output_gate_bias": True},
    {"output_gate": "silu", "output_gate_rank": 0, "output_gate_bias": False},
    {"scale": 0.3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mixer", LINEAR)
def test_options_of_linear_mixers(mixer, options):
    assert_steps_agree(make(mixer, **options))


@pytest.mark.parametrize("options", [
    {"allow_neg_eigval": True},
    {"kaczmarz": True, "kaczmarz_eps_mode": "floor", "kaczmarz_eps": 0.5},
    {"kaczmarz": True, "kaczmarz_clip": True, "allow_neg_eigval": True, "num_v_heads": 6},
    {"kaczmarz": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mixer", DELTA)
def test_options_of_the_delta_family(mixer, options):
    assert_steps_agree(make(mixer, **options))


@pytest.mark.parametrize(("mixer", "options"), [
    ("gla", {"gate_form": "sigmoid_temperature"}),
    ("gla", {"gate_form": "sigmoid_temperature", "gate_rank": 0}),
    ("gla", {"gate_rank": 0, "gate_normalizer": 3.0, "num_v_heads": 6}),
    ("gdn", {"gate_lower_bound": -5.0}),
    ("kda", {"gate_lower_bound": -5.0, "gate_rank": 0}),
    ("gdn2", {"gate_lower_bound": -5.0, "gate_rank": 0, "num_v_heads": 6}),
    ("linear", {"rope": False}),
    ("linear", {"rope_fraction": 0.5, "rope_theta": 100.0}),
    ("retnet", {"rope_fraction": 0.5, "num_v_heads": 6}),
    ("softmax", {"num_kv_heads": 1}),
    ("softmax", {"qk_norm": True, "attention_gate": True, "qkv_bias": True, "out_bias": True}),
    ("softmax", {"head_dim_v": 9, "rope": False, "scale": 0.7}),
    ("swa", {"window": 1}),
    ("swa", {"window": 4, "rope_fraction": 0.5, "qk_norm": True}),
    ("rnn", {"rnn_activation": "slide", "rnn_dim": 33}),
], ids=str)  # fmt: skip
def test_options_of_one_mixer(mixer, options):
    assert_steps_agree(make(mixer, **options), tokens=9)


@pytest.mark.parametrize("options", [
    {"tie_embeddings": False},
    {"vocab_multiple": 64},
    {"learned_positions": 9},
    {"norm": "layernorm"},
    {"norm": "rmsnorm_eps_outside", "norm_eps": 0.1},
    {"norm_placement": "post"},
    {"norm_placement": "post", "norm": "layernorm", "ffn": "gelu"},
    {"ffn": "gelu", "ffn_dim": 70},
    {"ffn": "swiglu", "ffn_dim": 41, "ffn_bias": True},
    {"ffn": "none"},
    {"layers": "gdn2 softmax"},
    {"layers": "rnn swa", "window": 3},
], ids=str)  # fmt: skip
def test_options_of_the_stack(options):
    if "rnn" in options.get("layers", ""):
        options = options | {"num_heads": {"swa": 3}, "head_dim": {"swa": 20}}
    assert_steps_agree(make(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 17])
def test_a_rows_result_is_the_same_bits_in_any_batch_with_any_threads(batch, dtype):
    model = make("gdn2", dtype, layers="gdn2 softmax", dim=96)
    step, ids = decode_step(model), torch.randint(VOCAB, (4, batch))
    together = model.init_state(batch)
    # several rows with bf16 weights are rounded to it where the processor has products of pairs: compared with two
    least = 2 if dtype == torch.bfloat16 and batch > 1 else 1
    alone = [model.init_state(least) for _ in range(batch)]
    for t in range(len(ids)):
        logits = step(ids[t], together)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            apart = torch.cat([step(ids[t, i].expand(least), alone[i])[:1] for i in range(batch)])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(logits, apart)
    for i in range(batch):
        assert all(torch.equal(x[i], y[0]) for x, y in zip(tensors(together), tensors(alone[i]), strict=True))


@pytest.mark.parametrize("layers", ["gdn2 swa", "linear softmax", "rnn retnet"])
def test_slots(layers):
    heads = {m: 3 for m in layers.split() if m != "rnn"}
    options = {"window": 3} if "swa" in layers else {}
    model = make(layers=layers, num_heads=heads, head_dim=dict.fromkeys(heads, 16), **options)
    twin, step = in_fp64(model), decode_step(model)
    state, expected = model.init_state(5), twin.init_state(5)
    for slots in ([4, 0], [2], [0, 1, 2, 3, 4], [3, 1, 4]) * 2:
        ids, slots = torch.randint(VOCAB, (len(slots),)), torch.tensor(slots)
        assert relative_error(step(ids, state, slots), twin.step_(ids, expected, slots)) < 1e-5
    assert torch.equal(state.position, expected.position)
    for x, y in zip(tensors(state), tensors(expected), strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("layers", ["gdn2", "linear softmax", "swa rnn"])
def test_continues_a_prompt_and_is_continued_by_one(layers):
    heads = {m: 3 for m in layers.split() if m != "rnn"}
    options = {"window": 5} if "swa" in layers else {}
    model = make(layers=layers, num_heads=heads, head_dim=dict.fromkeys(heads, 16), **options)
    ids = torch.randint(VOCAB, (2, 200))
    with torch.no_grad():
        expected, _ = model(ids)
        _, state = model(ids[:, :20])
        step = decode_step(model)
        stepped = torch.stack([step(ids[:, t], state) for t in range(20, 180)], 1)
        rest, _ = model(ids[:, 180:], state)
    assert relative_error(stepped, expected[:, 20:180]) < 1e-4
    assert relative_error(rest, expected[:, 180:]) < 1e-4


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_of_8_bits(mixer, batch):
    assert_steps_agree(quantize(make(mixer)), batch=batch, tokens=3)


def test_weights_of_8_bits_are_never_widened_in_silence(monkeypatch):
    model = quantize(make("gdn2"))
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "ABSENCE", "was not built")
    with pytest.raises(BackendError, match=r"int8 weights decode .* was not built"):
        decode_step(model)
    assert decode_step(make("gdn2")).path == "torch"


def test_follows_the_weights():
    model = make("gdn2")
    step = decode_step(model)

    def agrees(dtype=torch.float32):
        ids = torch.tensor([1, 2])
        expected = in_fp64(model).step_(ids, in_fp64(model).init_state(2))
        return relative_error(step(ids, model.init_state(2)), expected) < TOLERANCES[dtype].value

    assert agrees()
    with torch.no_grad():
        model.embed.weight.mul_(1.5)  # in place
    assert agrees()
    for p in model.parameters():
        p.data = p.data * 0.9  # elsewhere
    assert agrees()
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)
    assert agrees()
    model.layers[0] = make("gdn2").layers[1]
    assert agrees()
    model.to(torch.bfloat16)
    assert agrees(torch.bfloat16)
    assert step.path == "native"


def test_held_weights_are_read_where_they_were():
    model, ids = make("gdn2"), torch.tensor([1, 2])
    step = decode_step(model)

    def logits():
        return step(ids, model.init_state(2))

    with step.held():
        before = logits()
        with torch.no_grad():
            model.embed.weight.mul_(2)
        in_place = logits()
        for p in model.parameters():
            p.data = torch.zeros_like(p)
        assert torch.equal(logits(), in_place)
    assert not torch.equal(in_place, before)
    assert not logits().any()


def test_what_cannot_be_lowered_says_why_and_still_decodes():
    cases = {
        "MoE": make(ffn="moe", num_experts=4),
        "float64": make(dtype=torch.float64),
        "dropout": make(dropout=0.1).train(),
    }
    for reason, model in cases.items():
        step = decode_step(model)
        assert step.path == "torch" and reason in step.reason
        state, expected = model.init_state(2), model.init_state(2)
        torch.manual_seed(1)
        logits = step(torch.tensor([1, 2]), state)
        torch.manual_seed(1)
        assert torch.equal(logits, model.step_(torch.tensor([1, 2]), expected))
    model = cases["dropout"].eval()
    assert step.path == "native"


def test_refusals_leave_the_state_as_it_is():
    model = make(learned_positions=2)
    step, state = decode_step(model), model.init_state(2)
    before = state.clone()
    cases = [
        ("71 entries", torch.tensor([3, 71]), None),
        ("71 entries", torch.tensor([-1, 3]), None),
        ("distinct rows", torch.tensor([1, 2]), torch.tensor([0, 2])),
        ("distinct rows", torch.tensor([1, 2]), torch.tensor([1, 1])),
        ("one token a row", torch.tensor([1]), None),
    ]
    for message, ids, slots in cases:
        with pytest.raises(ValueError, match=message):
            step(ids, state, slots)
    assert all(torch.equal(x, y) for x, y in zip(tensors(state), tensors(before), strict=True))
    for _ in range(2):
        step(torch.tensor([1, 2]), state)
    with pytest.raises(ValueError, match="2 learned positions"):
        step(torch.tensor([1, 2]), state)
    with pytest.raises(ValueError, match="another model"):
        step(torch.tensor([1]), make("softmax", learned_positions=2).init_state(1))
    assert step(torch.empty(0, dtype=torch.int64), model.init_state(0)).shape == (0, VOCAB)
