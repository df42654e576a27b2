"""The GPU's decode step: its program against `step_` in fp64, and recorded steps against the same ones not recorded.

A part of it also runs on the CPU, in Triton's interpreter.
"""

import time
from dataclasses import replace

import pytest
import torch

from glade.infer import step as steps
from glade.infer.config import SamplingParams
from glade.infer.endings import Endings
from glade.infer.engine import Engine, Request
from glade.infer.sampler import draw, gumbel_noise, rules_of, settings_of
from glade.infer.slots import Slots
from glade.infer.step import decode_step
from glade.model import LanguageModel, ModelConfig
from glade.model.config import MIXERS
from glade.model.quantized import Int8Weight, quantize
from glade.ops.tolerances import TOLERANCES, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 71
gpu = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(mixer="gdn2", dtype=torch.float32, **options):
    """A model of 2 layers with nothing at its initial value, biases and norms included."""
    if mixer != "rnn":
        options = {"num_heads": 3, "head_dim": 20} | options
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(mixer=mixer, vocab_size=VOCAB, **{"dim": 50, "num_layers": 2} | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.to(DEVICE, dtype)


def in_fp64(model):
    twin = LanguageModel(model.config).eval()
    plain = {name: x.dequantized() if isinstance(x, Int8Weight) else x for name, x in model.state_dict().items()}
    twin.load_state_dict(plain)
    return twin.to(DEVICE).double()


def ids_of(batch):
    return torch.randint(VOCAB, (batch,), device=DEVICE)


def tensors(state):
    return [x for layer in state.layers for x in layer if x.numel()]


def after_a_prompt(model, batch):
    """A state of 24 tokens. The first token's o is (q . k) v, so that its norm and what follows turn on the sign of a
    product that may be next to nothing: no rounding is small there."""
    with torch.no_grad():
        return model(torch.randint(VOCAB, (batch, 24), device=DEVICE), model.init_state(batch))[1]


def enough(batch):
    """Tokens after which 24 vectors of logits have been seen, so that roundings are many draws with one row, too."""
    return max(3, -(-24 // batch))


def exactly(state):
    return state._map(lambda x: x.double() if x.is_floating_point() else x.clone())


def far(x, expected):
    """The root mean square of the difference over that of what is expected: the sum of many roundings. The largest of
    them would be one draw from their tail."""
    difference = x.double() - expected.double()
    return (difference.norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_steps_agree(model, batch=3, tokens=5):
    """The program does what fp64's `step_` does, to logits and to every tensor of the state: within the tolerance, or
    at most twice as far as the model's own `step_`. Both round what lies between two products to the dtype, the program
    at no more places, each in an order of its own: two draws of the same sum."""
    twin, step = in_fp64(model), decode_step(model)
    assert step.path == "captured", step.reason
    state = after_a_prompt(model, batch)
    eager, exact = state.clone(), exactly(state)
    tolerance = TOLERANCES[model.embed.weight.dtype].value
    said = []
    for _ in range(tokens):
        ids = ids_of(batch)
        said.append((step(ids, state), model.step_(ids, eager), twin.step_(ids, exact)))
    assert torch.equal(state.position, exact.position)
    compared = [tuple(map(torch.stack, zip(*said, strict=True)))]
    compared += zip(tensors(state), tensors(eager), tensors(exact), strict=True)
    for x, own, expected in compared:
        assert far(x, expected) < max(tolerance, 2 * far(own, expected))


@gpu
@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 8, 70])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(mixer, batch, dtype):
    assert_steps_agree(make(mixer, dtype), batch, tokens=enough(batch))


@gpu
@DTYPES
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "gla"])
def test_sizes_as_they_are_used(mixer, batch, dtype):
    """Heads of 128 channels, products that fill their blocks: what the time is measured of."""
    assert_steps_agree(make(mixer, dtype, dim=512, num_heads=4, head_dim=128), batch, tokens=enough(batch))


OPTIONS = [
    ("gdn2", {"num_v_heads": 6}),
    ("gdn2", {"head_dim": 16, "head_dim_v": 37}),
    ("gdn2", {"head_dim": 128, "head_dim_v": 300, "num_heads": 1}),
    ("gdn2", {"conv_size": 0}),
    ("gdn2", {"conv_size": 1}),
    ("gdn", {"conv_size": 3, "activation": "identity"}),
    ("gdn", {"output_norm": "layernorm"}),
    ("kda", {"output_norm": "layernorm_plain", "gate_lower_bound": -5.0}),
    ("kda", {"output_norm": "absent", "output_gate": "absent", "gate_rank": 0}),
    ("gdn2", {"output_gate": "sigmoid", "output_gate_rank": 5, "output_gate_bias": True}),
    ("gdn2", {"allow_neg_eigval": True, "gate_lower_bound": -5.0, "gate_rank": 0, "num_v_heads": 6}),
    ("gdn", {"kaczmarz": True, "kaczmarz_eps_mode": "floor", "kaczmarz_eps": 0.5}),
    ("kla", {"kaczmarz_clip": True, "allow_neg_eigval": True, "num_v_heads": 6}),
    ("delta", {"kaczmarz": True, "kaczmarz_clip": True, "allow_neg_eigval": True}),
    ("gla", {"gate_form": "sigmoid_temperature"}),
    ("gla", {"gate_rank": 0, "gate_normalizer": 3.0, "num_v_heads": 6}),
    ("linear", {"feature_map": "relu", "qk_l2norm": True, "rope_fraction": 0.5, "rope_theta": 100.0}),
    ("retnet", {"rope": False, "num_v_heads": 6, "scale": 0.3}),
    ("softmax", {"num_kv_heads": 1, "qk_norm": True, "attention_gate": True, "qkv_bias": True, "out_bias": True}),
    ("softmax", {"head_dim_v": 9, "rope": False, "scale": 0.7}),
    ("swa", {"window": 3, "rope_fraction": 0.5, "qk_norm": True}),
    ("rnn", {"rnn_activation": "slide", "rnn_dim": 33}),
    ("gdn2", {"tie_embeddings": False, "vocab_multiple": 64, "learned_positions": 40}),
    ("gdn2", {"norm": "layernorm"}),
    ("gdn2", {"norm": "rmsnorm_eps_outside", "norm_eps": 0.1, "ffn": "none"}),
    ("gdn2", {"norm_placement": "post", "ffn": "gelu", "ffn_dim": 70}),
    ("gdn2", {"layers": "gdn2 softmax", "ffn_dim": 41, "ffn_bias": True}),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize(("mixer", "options"), OPTIONS, ids=str)
def test_options(mixer, options, batch):
    assert_steps_agree(make(mixer, **options), batch, tokens=7)


@gpu
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "gla", "softmax"])
def test_weights_of_8_bits(mixer, batch):
    assert_steps_agree(quantize(make(mixer)), batch, tokens=enough(batch))
    assert_steps_agree(quantize(make(mixer, torch.bfloat16)), batch, tokens=enough(batch))


@gpu
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("mixer", ["gdn", "gdn2"])
def test_sizes_of_8_bits(mixer, batch):
    model = quantize(make(mixer, torch.bfloat16, dim=512, num_heads=4, head_dim=128))
    assert_steps_agree(model, batch, tokens=enough(batch))


def check_slots(layers):
    """Rows in any order, some of them resting."""
    options = {"window": 3} if "swa" in layers else {}
    model = make(layers=layers, **options)
    twin, step = in_fp64(model), decode_step(model)
    state, expected = model.init_state(5), twin.init_state(5)
    for slots in ([4, 0], [2], [0, 1, 2, 3, 4], [3, 1, 4]) * 2:
        ids, slots = ids_of(len(slots)), torch.tensor(slots, device=DEVICE)
        assert relative_error(step(ids, state, slots), twin.step_(ids, expected, slots)) < 1e-5
    assert torch.equal(state.position, expected.position)
    for x, y in zip(tensors(state), tensors(expected), strict=True):
        assert relative_error(x, y) < 1e-5


@gpu
@pytest.mark.parametrize("layers", ["gdn2 swa", "linear softmax"])
def test_slots(layers):
    check_slots(layers)


MIXED = [
    SamplingParams(temperature=0, max_new_tokens=12),
    SamplingParams(temperature=1.0, seed=3, max_new_tokens=9, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_new_tokens=14),
    SamplingParams(temperature=0.8, top_k=5, min_p=0.05, repetition_penalty=1.3, seed=5, max_new_tokens=7),
    SamplingParams(temperature=1.2, min_p=0.1, seed=6, max_new_tokens=70),
]


class NotRecorded:
    """`Graphs` that calls every function itself."""

    def clear(self):
        pass

    def run(self, kind, tensors, function):
        return function(tensors)


def answers(model, recorded, *, deterministic=False, requests=MIXED, prompts=3, max_batch=4):
    """What an engine says when more requests come than it has slots."""
    engine = Engine(model, max_batch=max_batch, prefill_tokens=8, deterministic=deterministic)
    if not recorded:
        engine._slots._graphs = NotRecorded()
    said = {}
    for i, params in enumerate(requests):
        said[i] = []
        engine.submit(Request(prompt=tuple(range(1, prompts + i + 1)), params=params), said[i].append)
    while engine.step():
        pass
    records = len(engine._slots._graphs) if recorded else 0
    engine.close()
    return {i: [(d.token_id, d.logprob, d.top, d.finished) for d in deltas] for i, deltas in said.items()}, records


def check_recorded(layers, dtype):
    model = make(dtype=dtype, layers=layers, **({"window": 6} if "swa" in layers else {}))
    recorded, records = answers(model, True)
    assert records > 0
    assert recorded == answers(model, False)[0]
    assert all(said[-1][3] == "length" for said in recorded.values())


@gpu
@DTYPES
@pytest.mark.parametrize("layers", ["gdn2", "gdn swa", "linear softmax", "gla"])
def test_a_recorded_step_draws_what_the_step_draws(layers, dtype):
    """To the bit, also where the keys and values outgrow their room (64 tokens) and sequences come and go."""
    check_recorded(layers, dtype)


def check_draws(batch, vocab, restricted=False):
    """The kernels draw what the sampler draws of the same logits."""
    from glade.infer.captured.draw import draw_, suits

    generator = torch.Generator().manual_seed(batch)
    logits = (4 * torch.randn(batch, vocab + 3, generator=generator)).to(DEVICE)[:, :vocab]
    seeds = torch.randint(2**62, (batch,), generator=generator).to(DEVICE)
    slots = torch.randperm(2 * batch, generator=generator)[:batch].to(DEVICE)
    positions = torch.randint(2**40, (2 * batch,), generator=generator).to(DEVICE)
    settings = [(0.0, 0.0), (1.0, 0.0), (0.7, 0.1), (1.5, 0.02)]
    params = [SamplingParams(temperature=t, min_p=p) for t, p in (settings * batch)[:batch]]
    if restricted:
        limits = [(0, 0.9), (5, 1.0), (0, 0.3), (3, 0.8), (0, 1.0), (1, 0.5), (10**6, 0.999), (40, 0.95)]
        params = [replace(p, top_k=limits[i % 8][0], top_p=limits[i % 8][1]) for i, p in enumerate(params)]
    rules, unread = (
        rules_of([settings_of(p, vocab) for p in params], logits.device),
        torch.full((2 * batch,), -1, device=DEVICE),
    )
    assert suits(rules, 0)
    report = draw_(logits, rules, seeds, slots, positions, unread)
    ids = draw(logits, rules, None, lambda ids: gumbel_noise(seeds, positions[slots], vocab, ids))
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert torch.equal(report[:, 0], ids) and torch.equal(unread[slots], ids)
    assert (unread == -1).sum() == batch
    drawn = report[:, 1].to(torch.int32).view(torch.float32)
    torch.testing.assert_close(drawn, logprobs, rtol=1e-5, atol=1e-5)
    check_endings(logits, rules, seeds, slots, positions, ids)
    logits[0, 1] = float("nan")
    bits = draw_(logits, rules, seeds, slots, positions, unread)[0]
    assert 0 <= bits[0] < vocab and bits[1].to(torch.int32).view(torch.float32).isnan()


def check_equal_tokens():
    """As many of equal tokens as top-k and top-p ask for, those with the lowest ids: the sampler leaves open which."""
    from glade.infer.captured.draw import draw_

    rows = 32
    logits = torch.tensor([0.0, 3, 3, -1, 3, 3, -torch.inf], device=DEVICE).repeat(rows, 1)
    seeds, slots = torch.arange(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
    positions, unread = torch.zeros_like(slots), torch.zeros_like(slots)
    # the four are 0.983 of all
    cases = [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 4}),
        ({"top_p": 0.49}, {1, 2}),
        ({"top_p": 0.5}, {1, 2, 4}),
        ({"top_p": 1e-40}, {1}),
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_k": 6, "top_p": 0.9}, {1, 2, 4, 5}),
        ({"top_k": 7, "top_p": 0.9}, {1, 2, 4, 5}),
    ]
    for options, kept in cases:
        params = SamplingParams(temperature=1.0, **options)
        rules = rules_of([settings_of(params, 7)] * rows, logits.device)
        assert set(draw_(logits, rules, seeds, slots, positions, unread)[:, 0].tolist()) == kept, options


def check_endings(logits, rules, seeds, slots, positions, ids):
    """Slots step aside as `Endings` says: those whose length is reached, and those that drew a stop id."""
    from glade.infer.captured.draw import draw_

    for most_stops in (1, 4):
        ours, theirs = Endings(len(positions), logits.device), Endings(len(positions), logits.device)
        for row, slot in enumerate(slots.tolist()):
            last, stop = int(positions[slot]) + 1 - row % 3, int(ids[row]) if row % 2 else logits.shape[1]
            for endings in (ours, theirs):
                endings.begin(slot, last, [stop, -2, -3][: most_stops - 1] or [stop])
        unread = torch.full_like(positions, -1)
        draw_(logits, rules, seeds, slots, positions, unread, ours)
        theirs.step_aside_(slots, ids, positions[slots])
        assert torch.equal(ours.table, theirs.table) and ours.most_stops == most_stops


@gpu
@pytest.mark.parametrize("vocab", [7, 71, 32_000, 151_936])
def test_draws(vocab):
    for batch in (1, 3, 64):
        check_draws(batch, vocab)
        check_draws(batch, vocab, restricted=True)


@gpu
def test_draws_among_equal_tokens():
    check_equal_tokens()


def check_ended_states(layers, dtype=torch.float32, **options):
    """What answers leave that end by themselves, beside others that go on, is what the text without its last token is.

    A token too many would be far from it, and its position another one."""
    window = {"window": 6} if "swa" in layers else {}
    model = make(dtype=dtype, layers=layers, **window, **options)
    engine = Engine(model, max_batch=3, prefill_tokens=8)
    said = []
    for i in range(7):
        said.append([])
        stop_ids = frozenset(range(VOCAB // 2)) if i % 2 else frozenset()
        params = SamplingParams(temperature=1.0, seed=i, max_new_tokens=3 + i)
        request = Request(prompt=(i, 1), params=params, stop_ids=stop_ids, keep_state=True)
        engine.submit(request, said[-1].append)
    while engine.step():
        pass
    engine.close()
    assert {deltas[-1].finished for deltas in said} == {"length", "eos"}
    twin = in_fp64(model)
    for i, deltas in enumerate(said):
        ids = [i, 1, *(delta.token_id for delta in deltas)][:-1]
        state, expected = deltas[-1].state, twin(torch.tensor([ids], device=DEVICE))[1]
        assert torch.equal(state.position, expected.position)
        for x, y in zip(tensors(state), tensors(expected), strict=True):
            both = tuple(slice(min(sizes)) for sizes in zip(x.shape, y.shape, strict=True))
            assert far(x[both], y[both]) < 20 * TOLERANCES[dtype].value


@gpu
@pytest.mark.parametrize("layers", ["gdn2", "gdn swa", "linear softmax", "rnn gla"])
def test_an_ended_answer_s_state_is_not_a_token_too_far(layers):
    check_ended_states(layers)


@gpu
def test_a_graph_is_replayed_in_the_engines_own_thread():
    model = make("gdn2", torch.bfloat16)
    # whoever sits beside whom is then up to the thread
    expected, _ = answers(model, False, deterministic=True)
    said = {i: [] for i in range(len(MIXED))}
    with Engine(model, max_batch=4, prefill_tokens=8, deterministic=True) as engine:
        for i, params in enumerate(MIXED):
            engine.submit(Request(prompt=tuple(range(1, 4 + i)), params=params), said[i].append)
        while any(not deltas or deltas[-1].finished is None for deltas in said.values()):
            time.sleep(0.01)
    assert {i: [d.token_id for d in said[i]] for i in said} == {i: [x[0] for x in expected[i]] for i in expected}


@gpu
@DTYPES
def test_deterministic_answers_do_not_depend_on_the_neighbours(dtype):
    """Greedy alone, and beside those whose rules ask for other kernels: to the bit of the log-probabilities."""
    model = make(dtype=dtype)
    alone, _ = answers(model, True, deterministic=True, requests=MIXED[:1])
    together, _ = answers(model, True, deterministic=True)
    assert alone[0] == together[0]


@gpu
def test_follows_the_weights():
    model = make()
    step = decode_step(model)

    def agrees():
        ids = ids_of(2)
        expected = in_fp64(model).step_(ids, in_fp64(model).init_state(2))
        return relative_error(step(ids, model.init_state(2)), expected) < 1e-5

    assert agrees()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)  # in place: the parameters are still what the kernels read
    assert agrees()
    for p in model.parameters():
        p.data = p.data * 0.9  # elsewhere
    assert agrees()
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)
    assert agrees()
    assert step.path == "captured"


@gpu
def test_a_model_read_by_two_steps_is_laid_out_once():
    model = make()
    first, second = decode_step(model), decode_step(model)
    ids = ids_of(2)
    assert first.captured is not None and first.captured.is_current()
    assert torch.equal(first(ids, model.init_state(2)), second(ids, model.init_state(2)))
    assert first.captured.is_current()


@gpu
def test_what_cannot_be_lowered_says_why_and_still_decodes():
    cases = {
        "MoE": make(ffn="moe", num_experts=4),
        "float64": make(dtype=torch.float64),
        "dropout": make(dropout=0.1).train(),
    }
    for reason, model in cases.items():
        step = decode_step(model)
        assert step.path == "torch" and reason in step.reason
        assert step(ids_of(2), model.init_state(2)).isfinite().all()


@gpu
def test_refusals_leave_the_state_as_it_is():
    model = make(learned_positions=2)
    step, state = decode_step(model), model.init_state(2)
    for message, ids, slots in [
        ("71 entries", [3, 71], None),
        ("distinct rows", [1, 2], [0, 2]),
        ("distinct rows", [1, 2], [1, 1]),
        ("one token a row", [1], None),
    ]:
        with pytest.raises(ValueError, match=message):
            step(torch.tensor(ids, device=DEVICE), state, None if slots is None else torch.tensor(slots).to(DEVICE))
    for _ in range(2):
        step(ids_of(2), state)
    with pytest.raises(ValueError, match="2 learned positions"):
        step(ids_of(2), state)


@gpu
def test_memory_does_not_grow_with_the_answers():
    model = make(dtype=torch.bfloat16)
    slots = Slots(model, 8)
    for slot in range(8):
        slots.fill(slot, None, 1, SamplingParams(temperature=1.0), seed=slot)
    for _ in range(5):
        slots.step()
    before = torch.cuda.memory_allocated()
    for _ in range(300):
        slots.step()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
def test_the_program_in_the_interpreter(interpret):
    interpret(in_the_interpreter)


def in_the_interpreter():
    """In fp32, since the interpreter multiplies bf16 as bits; steps are not recorded but called with what a record
    would hold."""
    from glade.infer.captured.lower import lower

    steps._lower = lower
    small = {"dim": 24, "num_heads": 2, "head_dim": 8, "num_layers": 1}
    assert_steps_agree(make(**small), 1, tokens=3)
    assert_steps_agree(make("gdn", **small), 5, tokens=2)
    # rows enough for torch's product
    assert_steps_agree(make("gdn", norm="layernorm", ffn="gelu", ffn_bias=True, **small), 17, tokens=2)
    assert_steps_agree(make("kda", norm="rmsnorm_eps_outside", **small), 16, tokens=1)
    # heads that multiply by the second factors of their gates themselves, and too many for that
    for batch in (2, 34):
        assert_steps_agree(make("gdn2", dim=32, num_heads=4, head_dim=16, num_layers=1), batch, tokens=1)
    assert_steps_agree(quantize(make("gla", **small)), 2, tokens=2)
    assert_steps_agree(make("swa", qk_norm=True, attention_gate=True, window=2, **small), 2)
    from glade.infer.captured import draw as drawing

    for restricted in (False, True):
        check_draws(5, 71, restricted)
        check_draws(8, 300, restricted)
        check_draws(2, 7, restricted)
    check_equal_tokens()
    drawing._WIDE = 64  # a row of a larger vocabulary is looked at part by part
    check_draws(8, 300, restricted=True)
    check_ended_states("gdn softmax", **(small | {"num_layers": 2}))
    model = make(**small)
    few = [replace(params, max_new_tokens=4) for params in MIXED[:4]]
    recorded, records = answers(model, True, requests=few, max_batch=2)
    assert records > 0 and recorded == answers(model, False, requests=few, max_batch=2)[0]
