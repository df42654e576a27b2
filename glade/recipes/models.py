"""Model recipes: the published models of the field and small ones for a CPU, as `ModelConfig`s.

A recipe says what the weights mean, not how they were trained. Where a published system's code departs from its own
description, the docstring says which of the two the recipe is. Counts in docstrings are asserted in tests.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from glade.model.config import MIXERS, ModelConfig

GPT2_VOCAB = 50257
LLAMA_VOCAB = 32000
SMOLLM_VOCAB = 49152


# Small models for a CPU


def char(mixer: str) -> ModelConfig:
    """About a million parameters with the given mixer, for characters on a laptop; vocab_size is the tokenizer's."""
    config = ModelConfig(mixer=mixer, num_layers=4, dim=128)
    return replace(config, window=64) if mixer == "swa" else config


# GLA with DPO on TinyStories (NYU)


def nyu_gla(positions: int = 1024) -> ModelConfig:
    """159,688,800 parameters with 1024 learned positions, 158,902,368 with 256.

    The published code's own functions, for its checkpoints: the temperature inside the decay's sigmoid, SiLU between
    its factors, LayerNorm without weights on the heads, no scale on q, eps outside the root of the block norms. To
    train a new model take `gate_form=None`: the paper's gate.
    """
    return ModelConfig(
        mixer="gla",
        num_layers=6,
        dim=1024,
        num_heads=8,
        vocab_size=GPT2_VOCAB,
        learned_positions=positions,
        ffn_dim=4096,
        norm="rmsnorm_eps_outside",
        norm_eps=1e-6,
        dropout=0.1,
        residual_dropout=0.0,
        init="normal",
        scale=1.0,
        gate_form="sigmoid_temperature",
        output_norm="layernorm_plain",
        output_norm_eps=1e-5,
        output_gate_bias=True,
    )


# GLA grafted onto GPT-2 (HSE)


def hse_gla() -> ModelConfig:
    """GPT-2's embeddings and norms around single-head GLA layers, 2,978,304 parameters a layer with its norms.

    What the published code describes, causal and with residuals, which it lacks; its second norm of each layer is
    the head's output norm, and its "MLP" the output gate, so that there is no feed-forward network.
    """
    return ModelConfig(
        mixer="gla",
        num_layers=12,
        dim=768,
        num_heads=1,
        vocab_size=GPT2_VOCAB,
        learned_positions=1024,
        ffn="none",
        norm="layernorm",
        init="gpt2",
        output_norm="layernorm",
        output_gate_bias=True,
    )


# Gated DeltaNet-2 (NVIDIA) and its Kaczmarz variant


def gdn2_1_3b() -> ModelConfig:
    """Gated DeltaNet-2 1.3B: 1,302,638,112 in the blocks, 1,450,096,416 with embedding, head and last norm."""
    return ModelConfig(
        mixer="gdn2",
        num_layers=18,
        dim=2304,
        num_heads=16,
        head_dim=128,
        vocab_size=LLAMA_VOCAB,
        vocab_multiple=64,
        tie_embeddings=False,
        ffn_dim=6208,
        init="gdn2",
    )


def kla_1_3b() -> ModelConfig:
    """The Kaczmarz step on Gated DeltaNet-2 1.3B: 1,450,760,256 parameters.

    eps is a floor and the scaled gates are clipped, as the published code has it (its description says neither).
    """
    return replace(gdn2_1_3b(), mixer="kla", kaczmarz_eps=1e-6, kaczmarz_eps_mode="floor", kaczmarz_clip=True)


def swa_gdn2_1_3b() -> ModelConfig:
    """Gated DeltaNet-2 and sliding-window attention by turns: 1,300,314,384 in the blocks."""
    return replace(
        gdn2_1_3b(),
        layers="gdn2 swa",
        num_heads={"gdn2": 16, "swa": 18},
        window=2048,
        ffn_dim=6784,
    )


def gdn2_12h_100m() -> ModelConfig:
    """12 layers of 768, 12 heads of 64: 101,598,096 in the blocks."""
    return replace(gdn2_1_3b(), num_layers=12, dim=768, num_heads=12, head_dim=64, ffn_dim=2048)


def gdn2_12h_305m() -> ModelConfig:
    """12 layers of 1024, 16 heads of 64: 304,809,920 in all."""
    return replace(gdn2_1_3b(), num_layers=12, dim=1024, num_heads=16, head_dim=64, ffn_dim=4352)


# Blueberry


def blueberry(dim: int, num_layers: int, num_heads: int) -> ModelConfig:
    """DeltaNet, the model the published runs trained, whatever their page calls it: no decay, no output gate."""
    return ModelConfig(
        mixer="delta",
        num_layers=num_layers,
        dim=dim,
        num_heads=num_heads,
        vocab_size=SMOLLM_VOCAB,
        tie_embeddings=False,
        ffn_dim=4 * dim,
        norm_eps=1e-6,
        init="fla",
    )


def blueberry_qwen3_next(dim: int = 768, num_layers: int = 12) -> ModelConfig:
    """What the page of the same system describes: Gated DeltaNet as in Qwen3-Next, 4 heads of 64 for k and v."""
    return replace(blueberry(dim, num_layers, num_heads=4), mixer="gdn", head_dim=64, output_gate="silu", init="normal")


def blueberry_hybrid(attention_layers: tuple[int, ...] = (5, 11)) -> ModelConfig:
    """Gated DeltaNet with windowed attention at the given layers (counted from 0), the best of 13 ratios published.

    12 heads of 256 on a width of 768, as it ran: keys and values are four times as wide as the model.
    """
    layers = tuple("swa" if i in attention_layers else "gdn" for i in range(12))
    config = replace(blueberry(768, 12, 12), mixer="gdn", layers=layers)
    if not attention_layers:
        return replace(config, head_dim=256)
    return replace(config, head_dim={"gdn": 256, "swa": 64}, window=2048)


# Qwen3-Next


def qwen3_next_80b() -> ModelConfig:
    """Three Gated DeltaNet layers to one of gated full attention, 512 experts of which a token uses 10 and a shared."""
    return ModelConfig(
        layers="gdn gdn gdn softmax",
        num_layers=48,
        dim=2048,
        vocab_size=151936,
        tie_embeddings=False,
        ffn="moe",
        num_experts=512,
        experts_per_token=10,
        expert_dim=512,
        shared_expert_dim=512,
        norm_eps=1e-6,
        init="normal",
        num_heads=16,
        num_v_heads=32,
        num_kv_heads=2,
        head_dim={"gdn": 128, "softmax": 256},
        rope_theta=1e7,
        rope_fraction=0.25,
        qk_norm=True,
        attention_gate=True,
    )


# A character GPT (CMU course work on minGPT)


def chargpt(block_size: int = 16) -> ModelConfig:
    """minGPT on 65 characters with biases everywhere, about 2.70 M parameters.

    Dropout is on the embeddings and on what the blocks add; the published one on attention probabilities is left out.
    """
    return ModelConfig(
        mixer="softmax",
        num_layers=6,
        dim=192,
        num_heads=6,
        vocab_size=65,
        tie_embeddings=False,
        learned_positions=block_size,
        ffn="gelu",
        norm="layernorm",
        dropout=0.1,
        init="gpt2",
        qkv_bias=True,
        out_bias=True,
    )


def chargpt_rope() -> ModelConfig:
    """`chargpt` with rotary positions in place of the table."""
    return replace(chargpt(), learned_positions=0, rope=True)


def chargpt_gqa(num_kv_heads: int = 2) -> ModelConfig:
    """`chargpt` with fewer heads of keys and values."""
    return replace(chargpt(), num_kv_heads=num_kv_heads)


def chargpt_rope_gqa() -> ModelConfig:
    """`chargpt` with both."""
    return replace(chargpt_rope(), num_kv_heads=2)


# The flash-linear-attention family's sizes


def gla_340m() -> ModelConfig:
    """GLA, 24 layers of 1024: keys half as wide as values, feed-forward 8/3 up to a multiple of 256; tied."""
    return ModelConfig(
        mixer="gla",
        num_layers=24,
        dim=1024,
        num_heads=4,
        head_dim=128,
        head_dim_v=256,
        vocab_size=LLAMA_VOCAB,
        ffn_dim=2816,
        norm_eps=1e-6,
        init="fla",
    )


def gla_1_3b() -> ModelConfig:
    """GLA, 24 layers of 2048, its own head."""
    return replace(gla_340m(), dim=2048, head_dim=256, head_dim_v=512, ffn_dim=5632, tie_embeddings=False)


def gdn_1_3b() -> ModelConfig:
    """Gated DeltaNet, 21 layers of 2048, 6 heads of 256 for keys and 512 for values."""
    return replace(gla_1_3b(), mixer="gdn", num_layers=21, num_heads=6, head_dim=256, head_dim_v=512)


def kda_1_3b() -> ModelConfig:
    """KDA, 24 layers of 2048, 16 heads of 128."""
    return replace(gla_1_3b(), mixer="kda", num_heads=16, head_dim=128, head_dim_v=128)


MODELS: dict[str, Callable[[], ModelConfig]] = {
    **{f"char_{mixer}": partial(char, mixer) for mixer in MIXERS},
    "nyu_gla": nyu_gla,
    "hse_gla": hse_gla,
    "gdn2_1_3b": gdn2_1_3b,
    "kla_1_3b": kla_1_3b,
    "swa_gdn2_1_3b": swa_gdn2_1_3b,
    "gdn2_12h_100m": gdn2_12h_100m,
    "gdn2_12h_305m": gdn2_12h_305m,
    "blueberry_small": partial(blueberry, 128, 4, 4),
    "blueberry_medium": partial(blueberry, 256, 8, 8),
    "blueberry_large": partial(blueberry, 512, 12, 16),
    "blueberry_xlarge": partial(blueberry, 1024, 16, 16),
    "blueberry_rtx4090": partial(blueberry, 768, 12, 12),
    "blueberry_qwen3_next": blueberry_qwen3_next,
    "blueberry_hybrid": blueberry_hybrid,
    "qwen3_next_80b": qwen3_next_80b,
    "chargpt": chargpt,
    "chargpt_rope": chargpt_rope,
    "chargpt_gqa": chargpt_gqa,
    "chargpt_rope_gqa": chargpt_rope_gqa,
    "gla_340m": gla_340m,
    "gla_1_3b": gla_1_3b,
    "gdn_1_3b": gdn_1_3b,
    "kda_1_3b": kda_1_3b,
}
