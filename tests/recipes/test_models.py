"""Every recipe builds, and has the number of parameters its publication states (on the meta device: no memory)."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import glade.recipes
from glade.errors import ConfigError
from glade.model import MIXERS, LanguageModel, ModelConfig
from glade.recipes import models


def build(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config if config.vocab_size else replace(config, vocab_size=65))


def block_parameters(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.layers.parameters())


@pytest.mark.parametrize("name", glade.recipes.RECIPES)
def test_a_recipe_is_a_config_that_builds_and_survives_json(name: str) -> None:
    config = glade.recipes.get(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    resolved = config.resolve()
    assert ModelConfig.from_dict(resolved.to_dict()) == resolved == resolved.resolve()
    assert build(config).num_parameters() > 0


EXACT_TOTALS = {
    "nyu_gla": 159_688_800,
    "gdn2_1_3b": 1_450_096_416,
    "kla_1_3b": 1_450_760_256,
    "gdn2_12h_305m": 304_809_920,
    "blueberry_rtx4090": 188_984_832,
}


@pytest.mark.parametrize(("name", "total"), EXACT_TOTALS.items())
def test_published_total(name: str, total: int) -> None:
    assert build(glade.recipes.get(name)).num_parameters() == total


EXACT_BLOCKS = {
    "gdn2_1_3b": 1_302_638_112,
    "kla_1_3b": 1_303_301_952,
    "swa_gdn2_1_3b": 1_300_314_384,
    "gdn2_12h_100m": 101_598_096,
    "nyu_gla": 6 * 17_862_672,
    "hse_gla": 12 * 2_978_304,
}


@pytest.mark.parametrize(("name", "blocks"), EXACT_BLOCKS.items())
def test_published_count_of_the_blocks(name: str, blocks: int) -> None:
    assert block_parameters(build(glade.recipes.get(name))) == blocks


# name: (without embeddings, in all), in millions to the precision published
ROUNDED = {
    "blueberry_small": (1.06, 13.6),
    "blueberry_medium": (8.43, 33.6),
    "blueberry_large": (50.5, 100.8),
    "blueberry_xlarge": (268.9, 369.6),
    "blueberry_rtx4090": (113.5, 189.0),
}


@pytest.mark.parametrize(("name", "published"), ROUNDED.items())
def test_published_count_to_its_precision(name: str, published: tuple[float, float]) -> None:
    model = build(glade.recipes.get(name))
    for count, millions in zip((block_parameters(model), model.num_parameters()), published, strict=True):
        decimals = len(str(millions).partition(".")[2])
        assert round(count / 1e6, decimals) == millions


def test_the_other_published_counts() -> None:
    assert build(models.nyu_gla(positions=256)).num_parameters() == 158_902_368
    assert round(build(models.chargpt()).num_parameters() / 1e6, 2) == 2.70
    # the published 302 M is of the pure stack; Qwen3-Next is named 80B-A3B
    assert build(models.blueberry_hybrid(())).num_parameters() // 10**6 == 302
    large = build(models.qwen3_next_80b())
    assert round(large.num_parameters() / 1e9) == 80
    assert 3e9 < large.flops_per_token(1) / 2 < 4e9


def test_hybrids_have_their_layers_where_published() -> None:
    assert models.swa_gdn2_1_3b().layer_mixers == ("gdn2", "swa") * 9
    assert [i for i, m in enumerate(models.blueberry_hybrid().layer_mixers) if m == "swa"] == [5, 11]
    assert [i for i, m in enumerate(models.qwen3_next_80b().layer_mixers) if m == "softmax"] == list(range(3, 48, 4))


def test_there_is_a_small_recipe_for_every_mixer_of_about_a_million_parameters() -> None:
    for mixer in MIXERS:
        assert 0.75e6 < build(glade.recipes.get(f"char_{mixer}")).num_parameters() < 1.1e6


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'gdn2_1b'; did you mean 'gdn2_1_3b'"):
        glade.recipes.get("gdn2_1b")


def test_recipes_do_not_import_torch() -> None:
    code = "import sys, glade.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", glade.recipes.RECIPES)
def test_every_recipe_says_what_it_is(name: str) -> None:
    assert len(glade.recipes.summary(name)) > 10
