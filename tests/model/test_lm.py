"""LanguageModel: losses, logits, errors, sizes, costs, initial values."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glade.errors import ConfigError
from glade.model import LanguageModel, ModelConfig
from glade.model.ffn import MoE
from glade.model.mixers.delta import GatedDeltaNet2

Build = Callable[..., LanguageModel]
MakeIds = Callable[..., Tensor]

SMALL = ModelConfig(num_layers=2, dim=32, num_heads=2, vocab_size=37, ffn_dim=24)


def test_losses_are_the_cross_entropy_of_the_logits(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, 9)
    targets = ids.roll(-1, 1)
    targets[0, 3] = targets[1, 8] = -1
    with torch.no_grad():
        losses, _ = model(ids, targets=targets)
        logits, _ = model(ids)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-6)
    assert losses.shape == targets.shape and losses[0, 3] == 0 == losses[1, 8]


def test_last_logits_are_the_last_of_all(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, 9)
    cu_seqlens = torch.tensor([0, 4, 5, 9])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits="last")[0], model(ids)[0][:, -1], rtol=0, atol=1e-12)
        packed, _ = model(ids[:1], cu_seqlens=cu_seqlens, logits="last")
        every, _ = model(ids[:1], cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, every[0, [3, 4, 8]], rtol=0, atol=1e-12)


def test_the_state_can_be_left_out(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case), make_ids(1, 9)
    for borders in (None, torch.tensor([0, 4, 9])):
        with torch.no_grad():
            losses, state = model(ids, cu_seqlens=borders, targets=ids)
            same, none = model(ids, cu_seqlens=borders, targets=ids, return_state=False)
        assert torch.equal(same, losses) and none.layers == ()
        assert (none.load_balance is None) == (state.load_balance is None)
        with pytest.raises(ValueError, match="and 0 layers; this call has"):
            model(ids, none, cu_seqlens=borders)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gdn2", "softmax"])
def test_compiles_without_a_graph_break(mixer: str) -> None:
    model = LanguageModel(replace(SMALL, mixer=mixer))
    ids = torch.randint(0, 37, (2, 16))
    expected, _ = model(ids, targets=ids)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, state = compiled(ids, targets=ids)
    torch.testing.assert_close(losses, expected)
    assert state.position.tolist() == [16, 16]
    losses.sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    model = LanguageModel(SMALL)
    for ids, number in (([[0, 37]], "37"), ([[-1, 2]], "-1")):
        with pytest.raises(ValueError, match=f"ids holds {number}; the vocabulary has 37 entries, 0 to 36"):
            model(torch.tensor(ids))
    with pytest.raises(ValueError, match="ids holds 99"):
        model.step_(torch.tensor([99]), model.init_state(1))


def test_calls_that_do_not_fit_are_refused() -> None:
    model, ids = LanguageModel(SMALL), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ids has shape \[3\]; give \[B, T\]"):
        model(ids[0])
    with pytest.raises(ValueError, match="state has 3 rows and 2 layers; this call has 2 sequences"):
        model(ids, model.init_state(3))
    other = LanguageModel(replace(SMALL, mixer="softmax"))
    with pytest.raises(ValueError, match="layer 0 of state is of AttentionState, this model's of LinearState"):
        model(ids, other.init_state(2))
    with pytest.raises(ValueError, match="this call has 3 documents"):
        model(ids[:1], model.init_state(1), cu_seqlens=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="logits is 'first'"):
        model(ids, logits="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets ask for the loss of every token"):
        model(ids, targets=ids, logits="last")
    with pytest.raises(ValueError, match="ids has no token"):
        model(ids[:, :0], logits="last")
    with pytest.raises(ValueError, match="document 1 has no token"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 2, 2, 3]), logits="last")
    with pytest.raises(ValueError, match=r"ids has shape \[2\] with the state's 3 rows"):
        model.step_(ids[:, 0], model.init_state(3))
    with pytest.raises(ValueError, match=r"ids has shape \[2\] with 1 slots"):
        model.step_(ids[:, 0], model.init_state(3), torch.tensor([1]))
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        LanguageModel(replace(SMALL, vocab_size=None))


def test_learned_positions_end_with_a_reason() -> None:
    model = LanguageModel(replace(SMALL, mixer="softmax", learned_positions=8))
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="the sequence reaches position 8; this model has 8 learned positions"):
        model(ids)
    _, state = model(ids[:, :8])
    with pytest.raises(ValueError, match="reaches position 8"):
        model.step_(ids[:, 0], state)
    with pytest.raises(ValueError, match="reaches position 9"):
        model(ids[:, :2], state)
    # packed documents count their own tokens
    model(ids[:, :9], cu_seqlens=torch.tensor([0, 5, 9]))


def test_padded_vocabulary_rows_take_no_part() -> None:
    plain, padded = LanguageModel(SMALL), LanguageModel(replace(SMALL, vocab_multiple=64))
    weights = padded.state_dict()
    for name, x in plain.state_dict().items():
        weights[name][: len(x)] = x
    assert weights["embed.weight"].shape == (64, 32)
    padded.load_state_dict(weights)
    ids = torch.randint(0, 37, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(padded(ids)[0], plain(ids)[0])
        torch.testing.assert_close(padded(ids, targets=ids)[0], plain(ids, targets=ids)[0])
    losses, _ = padded(ids, targets=ids)
    losses.sum().backward()
    assert padded.embed.weight.grad is not None and not padded.embed.weight.grad[37:].any()
    with pytest.raises(ValueError, match="targets holds 40"):
        padded(ids, targets=torch.full_like(ids, 40))


def test_sizes() -> None:
    tied, untied = LanguageModel(SMALL), LanguageModel(replace(SMALL, tie_embeddings=False, learned_positions=5))
    table = 37 * 32
    assert tied.num_parameters() - tied.num_parameters(embeddings=False) == table
    assert untied.num_parameters() - untied.num_parameters(embeddings=False) == 2 * table + 5 * 32
    assert untied.num_parameters(embeddings=False) == tied.num_parameters(embeddings=False)


def test_flops_count_what_is_multiplied() -> None:
    """Against FLOPs counted by hand for one layer of each kind: 2 per weight, and the mixer's own part."""

    def own_part(T: int, **settings: object) -> float:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig(num_layers=1, dim=64, vocab_size=11, ffn="none", **settings))  # type: ignore[arg-type]
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "conv" not in n)
        return model.flops_per_token(T) - 2 * matrices

    K = V = 16
    assert own_part(100, mixer="linear") == 4 * 4 * K * V
    assert own_part(7, mixer="gla") == own_part(70000, mixer="gla") == 4 * 4 * K * V
    assert own_part(100, mixer="delta") == 4 * 6 * K * V + 2 * 4 * 3 * 64
    assert own_part(100, mixer="gdn2", num_v_heads=8) == 8 * 6 * K * V + 2 * 4 * (64 + 64 + 128)
    assert own_part(1, mixer="softmax") == 4 * 4 * K
    assert own_part(99, mixer="softmax", num_kv_heads=2) == 4 * 4 * K * 50  # 50 tokens seen on average
    assert own_part(10, mixer="swa", window=4) == pytest.approx(4 * 4 * K * (1 + 2 + 3 + 4 * 7) / 10)
    assert own_part(10, mixer="rnn") == 0  # its recurrence is a matrix


def test_state_bytes_grow_with_softmax_alone() -> None:
    for mixer in ("gdn2", "rnn", "linear"):
        model = LanguageModel(replace(ModelConfig(mixer=mixer, num_layers=2), vocab_size=11))
        assert model.state_bytes(10) == model.state_bytes(100_000)
    softmax = LanguageModel(ModelConfig(mixer="softmax", num_layers=2, num_kv_heads=2, vocab_size=11))
    assert softmax.state_bytes(1000) - softmax.state_bytes(0) == 1000 * 2 * 2 * 64 * 4


def test_the_same_seed_draws_the_same_model() -> None:
    torch.manual_seed(3)
    first = LanguageModel(SMALL)
    torch.manual_seed(3)
    second = LanguageModel(SMALL)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def test_a_model_built_without_memory_can_be_drawn_later(case: str, build: Build, make_ids: MakeIds) -> None:
    config = build(case).config
    with torch.device("meta"):
        model = LanguageModel(config)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert model.eval()(make_ids(1, 5))[0].isfinite().all()


def standard_deviations(init: str, **settings: object) -> dict[str, float]:
    config = ModelConfig(dim=256, num_layers=8, vocab_size=500, tie_embeddings=False, init=init, **settings)  # type: ignore[arg-type]
    model = LanguageModel(config)
    return {n.removeprefix("layers.0."): p.std().item() for n, p in model.named_parameters() if "layers.1." not in n}


def test_initial_values_are_as_published() -> None:

    def near(value: float) -> object:
        return pytest.approx(value, rel=0.05)

    normal = standard_deviations("normal")
    assert [normal[f"mixer.{name}_proj.weight"] for name in "qo"] == [near(0.02)] * 2
    assert normal["mixer.q_conv.weight"] == near(0.5 / 3**0.5)
    gpt2 = standard_deviations("gpt2")
    assert [gpt2["mixer.q_proj.weight"], gpt2["embed.weight"]] == [near(0.02)] * 2
    assert [gpt2["mixer.o_proj.weight"], gpt2["ffn.down.weight"]] == [near(0.02 / 4)] * 2
    assert standard_deviations("fla")["mixer.q_conv.weight"] == near(0.02)
    gdn2 = standard_deviations("gdn2")
    xavier = 2**-2.5 * (2 / (256 + 256)) ** 0.5
    assert [gdn2[f"mixer.{name}_proj.weight"] for name in "qo"] == [near(xavier)] * 2
    assert [gdn2["ffn.gate.weight"], gdn2["lm_head.weight"]] == [near(256**-0.5 / 3**0.5)] * 2
    width = 704  # 8/3 of 256 up to a multiple of 64
    assert gdn2["ffn.down.weight"] == near(width**-0.5 / 3**0.5 / 4)


def test_decays_start_in_their_published_range() -> None:
    mixer = next(LanguageModel(ModelConfig(dim=512, num_heads=16, vocab_size=9)).blocks()).mixer
    assert isinstance(mixer, GatedDeltaNet2)
    assert mixer.A_log.min() >= 0 and mixer.A_log.max() <= math.log(16)
    dt = F.softplus(mixer.dt_bias.detach())
    assert dt.min() >= 0.001 * 0.999 and dt.max() <= 0.1 * 1.001
    assert dt.log().std().item() == pytest.approx(math.log(100) / 12**0.5, rel=0.15)  # log-uniform


def test_dropout_acts_in_training_alone() -> None:
    model, ids = LanguageModel(replace(SMALL, dropout=0.5)), torch.zeros(1, 6, dtype=torch.int64)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


class TestMoE:
    def test_is_the_sum_over_the_chosen_experts(self) -> None:
        moe = MoE(dim=6, hidden=5, num_experts=4, experts_per_token=2, shared_hidden=3, renormalize=True).double()
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(2, 7, 6, dtype=torch.float64)
        y, _ = moe(x)
        assert moe.shared is not None and moe.shared_gate is not None
        for b in range(2):
            for t in range(7):
                token = x[b, t]
                p = (moe.router.weight @ token).softmax(-1)
                top, chosen = p.topk(2)
                expected = torch.sigmoid(moe.shared_gate(token)) * moe.shared(token)[0]
                for weight, e in zip(top / top.sum(), chosen.tolist(), strict=True):
                    hidden = F.silu(moe.gate[e] @ token) * (moe.up[e] @ token)
                    expected = expected + weight * (moe.down[e] @ hidden)
                torch.testing.assert_close(y[b, t], expected, rtol=1e-12, atol=1e-12)

    def test_load_balance_is_one_when_balanced_and_num_experts_when_collapsed(self) -> None:
        moe = MoE(dim=4, hidden=3, num_experts=4, experts_per_token=1, shared_hidden=0, renormalize=False)
        torch.nn.init.zeros_(moe.gate), torch.nn.init.zeros_(moe.up), torch.nn.init.zeros_(moe.down)
        torch.nn.init.eye_(moe.router.weight)
        balanced = 50 * torch.eye(4)
        assert moe(balanced[None])[1].item() == pytest.approx(1)
        assert moe(balanced[:1].expand(1, 4, 4))[1].item() == pytest.approx(4)

    def test_the_loss_is_reported_apart_weighted_and_not_carried(self, build: Build, make_ids: MakeIds) -> None:
        model, ids = build("moe"), make_ids(2, 9)
        _, state = model(ids)
        assert state.load_balance is not None and 0 < state.load_balance < 5 * model.config.load_balance
        assert state.clone().load_balance is None
        assert build("gdn2")(ids)[1].load_balance is None
