"""Lowering: from a `LanguageModel` to the instructions of a GPU's decode step, a few kernels a layer.

Each mixer becomes one product of all its projections with the normed input, the short convolution at its end; the
second factors of low-rank gates; the heads; and the output projection, which adds to the residual stream. Each
feed-forward network becomes two products.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from glade.infer.captured.instructions import (
    NO_NORM,
    Advance,
    AttentionHeads,
    Convolution,
    Embed,
    Instruction,
    Norm,
    Normalize,
    OwnStep,
    Product,
)
from glade.infer.captured.kernels import heads, product
from glade.infer.captured.linear import GATES, lower_linear
from glade.infer.captured.program import Program
from glade.infer.captured.weights import Matrix, Weights
from glade.infer.lowering import CannotLower, Mixers, Networks, ProgramBuilder
from glade.model.ffn import GELU, SwiGLU
from glade.model.lm import LanguageModel
from glade.model.mixers.attention import Attention
from glade.model.mixers.rnn import Rnn
from glade.model.norm import LayerNorm, RMSNorm, RMSNormEpsOutside

# numbers; a place begins where 16 bytes may be read at once
_ALIGNED = 64


class Builder(ProgramBuilder):
    """Collects a program of a GPU's kernels."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model, _ALIGNED)
        self.weights = Weights(model)
        self.instructions: list[Instruction] = []
        self.convolved: dict[int, int] = {}  # layer to channels that its convolutions remember

    def add(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def normalize(self, norm: nn.Module) -> None:
        self.add(Normalize(self.norm(norm), self.stream, self.stream, self.dim))

    def norm(self, module: nn.Module | None) -> Norm:
        """A norm of `glade.model.norm`, or none where there is none or `make_norm` made the identity."""
        if module is None or isinstance(module, nn.Identity):
            return NO_NORM
        kinds: dict[type[nn.Module], int] = {
            RMSNorm: heads.RMS.value,
            RMSNormEpsOutside: heads.RMS_EPS_OUTSIDE.value,
            LayerNorm: heads.LAYER.value,
        }
        if type(module) not in kinds:
            raise CannotLower(f"a {type(module).__name__} stands where a norm was expected")
        bias = self.weights.vector(module, "bias") if isinstance(module, LayerNorm) else None
        return Norm(kinds[type(module)], self.weights.vector(module, "weight"), bias, cast(Any, module).eps)

    def from_stream(self, norm: nn.Module | None) -> dict[str, Any]:
        """What a product of the normed stream reads: `source`, `before` and `norm` of `Product`."""
        norm_of = self.norm(norm)
        fused = {
            0: product.AS_IT_IS,
            heads.RMS.value: product.RMS,
            heads.RMS_EPS_OUTSIDE.value: product.RMS_EPS_OUTSIDE,
        }
        if norm_of.kind in fused:
            return {"source": self.stream, "before": fused[norm_of.kind].value, "norm": norm_of}
        place = self.place(self.dim)
        self.add(Normalize(norm_of, self.stream, place, self.dim))
        return {"source": place}

    def project(
        self, maps: Sequence[nn.Linear], norm: nn.Module | None, convolution: Convolution | None = None
    ) -> list[int]:
        """The answers of maps of the normed stream, from one product; the place of each."""
        source = self.from_stream(norm)
        matrix = self.weights.together(maps)
        place = self.place(matrix.rows)
        self.add(Product(matrix, output=place, width=matrix.rows, convolution=convolution, **source))
        ends = torch.tensor([0, *(m.out_features for m in maps)]).cumsum(0).tolist()
        return [place + end for end in ends[:-1]]

    def add_to_stream(self, module: nn.Linear, source: int) -> None:
        matrix = self.weights.together([module])
        self.add(Product(matrix, source, self.stream, matrix.rows, target=product.ADD.value))


def lower(model: LanguageModel) -> Program:
    """The decode program of `model`, whose maps of one input then lie together in memory.

    Raises:
        CannotLower: the model has a part or a dtype that no instruction knows; the message says which.
    """
    b, config = Builder(model), model.config
    positions = None if model.positions is None else b.weights.vector(model.positions, "weight")
    b.add(Embed(b.weights.table(model.embed), positions, b.stream))
    b.lower_blocks(model, _MIXERS, _NETWORKS)
    head = b.weights.table(model.embed if model.lm_head is None else model.lm_head)
    # the rows beyond the vocabulary are never asked for
    b.add(Product(head, output=None, width=cast(int, config.vocab_size), **b.from_stream(model.final_norm)))
    b.add(Advance())
    return Program(model, b.instructions, b.most, b.weights, b.convolved)


def _lower_attention(b: Builder, mixer: Attention, layer: int, norm: nn.Module | None) -> None:
    o = mixer.options
    gate = [] if mixer.output_gate_proj is None else [mixer.output_gate_proj]
    q, k, v, *gates = b.project([mixer.q_proj, mixer.k_proj, mixer.v_proj, *gate], norm)
    y = b.place(o.num_heads * o.head_dim_v)
    b.add(
        AttentionHeads(
            layer=layer,
            shape=(o.num_heads, o.num_kv_heads, o.head_dim, o.head_dim_v),
            q=q,
            k=k,
            v=v,
            gate=gates[0] if gates else None,
            output=y,
            scale=o.head_dim**-0.5 if o.scale is None else o.scale,
            q_norm=b.norm(mixer.q_norm),
            k_norm=b.norm(mixer.k_norm),
            turned=round(o.head_dim * o.rope_fraction) if o.rope else 0,
            log_theta=math.log(o.rope_theta),
        )
    )
    b.add_to_stream(mixer.o_proj, y)


def _lower_rnn(b: Builder, mixer: Rnn, layer: int, norm: nn.Module | None) -> None:
    source = b.stream
    if norm is not None:
        source = b.place(b.dim)
        b.add(Normalize(b.norm(norm), b.stream, source, b.dim))
    for name, module in (("w_hh", mixer), ("weight", mixer.x_proj), ("weight", mixer.o_proj)):
        b.weights.vector(module, name)
    b.add(OwnStep(mixer, layer, source, b.stream, b.dim))


def _lower_swiglu(b: Builder, ffn: SwiGLU, norm: nn.Module | None) -> None:
    source = b.from_stream(norm)
    both, hidden = b.weights.together([ffn.gate, ffn.up]), b.place(ffn.gate.out_features)
    width = ffn.gate.out_features
    b.add(Product(both, output=hidden, width=width, activation=product.SWIGLU.value, **source))
    b.add_to_stream(ffn.down, hidden)


def _lower_gelu(b: Builder, ffn: GELU, norm: nn.Module | None) -> None:
    source = b.from_stream(norm)
    up: Matrix = b.weights.together([ffn.up])
    hidden = b.place(up.rows)
    b.add(Product(up, output=hidden, width=up.rows, activation=product.GELU.value, **source))
    b.add_to_stream(ffn.down, hidden)


_MIXERS: Mixers = {
    Attention: _lower_attention,
    Rnn: _lower_rnn,
    **dict.fromkeys(GATES, lower_linear),
}
_NETWORKS: Networks = {
    SwiGLU: _lower_swiglu,
    GELU: _lower_gelu,
}
