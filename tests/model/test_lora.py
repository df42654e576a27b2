"""Adapters: nothing changes before training, merged equals unmerged, and only they are trained and saved apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glade.errors import CheckpointError, ConfigError
from glade.model import LanguageModel
from glade.model.ffn import MoE
from glade.model.lora import (
    adapters_off,
    add_lora,
    has_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    merged,
)
from glade.ops.tolerances import TOLERANCES, relative_error

Build = Callable[..., LanguageModel]
MakeIds = Callable[..., Tensor]


def trained(model: LanguageModel) -> None:
    """Adapters as if they had been trained: B is no longer zero."""
    for name, x in lora_state_dict(model).items():
        if name.endswith(".B"):
            x.normal_(0, 0.2)


def test_new_adapters_change_nothing(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, 9)
    names = set(model.state_dict())
    before = model(ids)[0]
    add_lora(model, rank=3)
    # plain maps of one x may be joined into one product, which rounds otherwise
    torch.testing.assert_close(model(ids)[0], before, rtol=0, atol=1e-12)
    model.float()
    with adapters_off(model):
        off = model(ids)[0]
    assert torch.equal(model(ids)[0], off)
    assert names < set(model.state_dict())
    linear = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    stacks = [m for m in model.layers.modules() if isinstance(m, MoE)]
    assert len(lora_state_dict(model)) == 2 * (len(linear) + 3 * len(stacks))


def test_merged_equals_unmerged(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, 9)
    base = model(ids)[0]
    plain_names = list(model.state_dict())
    add_lora(model, rank=3, alpha=5)
    trained(model)
    adapted = model(ids)[0]
    assert (adapted - base).abs().max() > 1e-3
    with adapters_off(model):
        torch.testing.assert_close(model(ids)[0], base, rtol=0, atol=1e-12)
    copy = merged(model)
    torch.testing.assert_close(copy(ids)[0], adapted, rtol=0, atol=1e-10)
    assert torch.equal(model(ids)[0], adapted)
    merge_lora(model)
    assert torch.equal(model(ids)[0], copy(ids)[0])
    assert list(model.state_dict()) == plain_names == list(copy.state_dict())
    assert not has_lora(model) and all(p.requires_grad for p in model.parameters())


def test_merged_equals_unmerged_in_fp32(build: Build) -> None:
    for case in ("gdn2 gva", "moe"):
        model = build(case)
        add_lora(model, rank=3, alpha=5)
        trained(model)
        copy = dict(merged(model).named_modules())
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                x = torch.randn(50, module.in_features)
                plain = copy[name]
                assert type(plain) is nn.Linear
                assert relative_error(plain(x), module(x)) < TOLERANCES[torch.float32].value
            elif isinstance(module, MoE):
                x = torch.randn(2, 25, module.gate.shape[-1])
                assert relative_error(copy[name](x)[0], module(x)[0]) < TOLERANCES[torch.float32].value


def test_decoding_uses_the_adapters(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(2, 6)
    add_lora(model, rank=2)
    trained(model)
    whole = model(ids)[0]
    state = model.init_state(2)
    steps = torch.stack([model.step_(ids[:, t], state) for t in range(ids.shape[1])], dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["gdn2 gva", "moe"])
def test_only_adapters_learn(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case).train(), make_ids(2, 12)
    add_lora(model, rank=2)
    trained(model)
    base = {name: x.clone() for name, x in model.state_dict().items() if "adapter" not in name}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(ids[:, :-1], targets=ids[:, 1:])[0].mean()
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(bool(g.abs().max() > 0) for g in grads) > 0.9 * len(grads)
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], x) for name, x in base.items())
    assert model(ids[:, :-1], targets=ids[:, 1:])[0].mean() < loss


def test_dropout_acts_in_training_alone(build: Build, make_ids: MakeIds) -> None:
    model, ids = build("gla"), make_ids(2, 9)
    add_lora(model, rank=2, dropout=0.5)
    trained(model)
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_adapters_take_the_weights_dtype_and_move_with_them(build: Build, make_ids: MakeIds) -> None:
    model, ids = build("gdn2", torch.bfloat16), make_ids(1, 5)
    add_lora(model, rank=2)
    assert {x.dtype for x in lora_state_dict(model).values()} == {torch.bfloat16}
    assert model(ids)[0].dtype == torch.bfloat16
    model.to(torch.float64)
    trained(model)
    assert {x.dtype for x in lora_state_dict(model).values()} == {torch.float64}
    before = model(ids)[0]
    merge_lora(model)
    torch.testing.assert_close(model(ids)[0], before, atol=1e-12, rtol=1e-12)
    add_lora(model, rank=2)
    model.to("meta")
    assert {x.device.type for x in lora_state_dict(model).values()} == {"meta"}


def test_saved_merged_and_resumed(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    model, ids = build("hybrid"), make_ids(2, 9)
    model.save_pretrained(tmp_path / "base")
    add_lora(model, rank=3)
    trained(model)
    merged(model).save_pretrained(tmp_path / "merged")
    merge_of_file = LanguageModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(merge_of_file(ids)[0], merged(model)(ids)[0])
    resumed = LanguageModel.from_pretrained(tmp_path / "base")
    add_lora(resumed, rank=3)
    load_lora_state_dict(resumed, lora_state_dict(model))
    assert torch.equal(resumed(ids)[0], model(ids)[0])
    other = LanguageModel.from_pretrained(tmp_path / "base")
    add_lora(other, rank=4)
    with pytest.raises(CheckpointError, match="not those of this model"):
        load_lora_state_dict(other, lora_state_dict(model))


def test_adapters_off_ends_with_an_error(build: Build, make_ids: MakeIds) -> None:
    model, ids = build("gla"), make_ids(1, 5)
    add_lora(model, rank=2)
    trained(model)
    adapted = model(ids)[0]
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(model(ids)[0], adapted)


def test_what_is_refused(build: Build) -> None:
    model = build("gla")
    with pytest.raises(ConfigError, match="at least 1"):
        add_lora(model, rank=0)
    add_lora(model, rank=2)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model, rank=2)
