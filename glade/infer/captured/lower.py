"""Lowering: from a `LanguageModel` to the instructions of a GPU's decode step, a few kernels a layer.

Each mixer becomes one product of all its projections with the normed input, the short convolution at its end; the
second factors of low-rank gates; the heads; and the output projection, which adds to the residual stream. Each
feed-forward network becomes two products.
"""

import math
from collections.abc import Callable, Sequence
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
from glade.infer.lowering import CannotLower
from glade.model.block import Block
from glade.model.ffn import GELU, SwiGLU
from glade.model.lm import LanguageModel
from glade.model.mixers.attention import Attention
from glade.model.mixers.rnn import Rnn
from glade.model.norm import LayerNorm, RMSNorm, RMSNormEpsOutside

# numbers; a place begins where 16 bytes may be read at once
_ALIGNED = 64


class Builder:
    """Collects one program."""

    def __init__(self, model: LanguageModel) -> None:
        self.weights = Weights(model)
        self.instructions: list[Instruction] = []
        self.convolved: dict[int, int] = {}  # layer to channels that its convolutions remember
        self._used = self.most = 0
        self.stream, self.dim = self.place(model.config.dim), model.config.dim

    def add(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def place(self, width: int) -> int:
        """Room for `width` numbers of each row, until a `release` to a `mark` before it."""
        place = self._used
        self._used += -(-width // _ALIGNED) * _ALIGNED
        self.most = max(self.most, self._used)
        return place

    def mark(self) -> int:
        return self._used

    def release(self, mark: int) -> None:
        self._used = mark

    def norm(self, module: nn.Module) -> Norm:
        """A norm of `glade.model.norm`, or none where `make_norm` made the identity."""
        if isinstance(module, nn.Identity):
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
        norm_of = NO_NORM if norm is None else self.norm(norm)
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
    for layer, block in enumerate(model.blocks()):
        mark = b.mark()
        _lower_block(b, block, layer)
        b.release(mark)
    head = b.weights.table(model.embed if model.lm_head is None else model.lm_head)
    # the rows beyond the vocabulary are never asked for
    b.add(Product(head, output=None, width=cast(int, config.vocab_size), **b.from_stream(model.final_norm)))
    b.add(Advance())
    return Program(model, b.instructions, b.most, b.weights, b.convolved)


def _lower_block(b: Builder, block: Block, layer: int) -> None:
    lower_mixer = _MIXERS.get(type(block.mixer))
    if lower_mixer is None:
        raise CannotLower(f"layer {layer} mixes by a {type(block.mixer).__name__}, which no instruction knows")
    lower_mixer(b, block.mixer, layer, block.mixer_norm if block.pre else None)
    if not block.pre:
        b.add(Normalize(b.norm(block.mixer_norm), b.stream, b.stream, b.dim))
    if block.ffn is None or block.ffn_norm is None:
        return
    lower_ffn = _FFNS.get(type(block.ffn))
    if lower_ffn is None:
        raise CannotLower(f"layer {layer} has a {type(block.ffn).__name__} network, which no instruction knows")
    lower_ffn(b, block.ffn, block.ffn_norm if block.pre else None)
    if not block.pre:
        b.add(Normalize(b.norm(block.ffn_norm), b.stream, b.stream, b.dim))


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
            q_norm=NO_NORM if mixer.q_norm is None else b.norm(mixer.q_norm),
            k_norm=NO_NORM if mixer.k_norm is None else b.norm(mixer.k_norm),
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


# by the exact class: what a subclass changes is not known here
_MIXERS: dict[type[nn.Module], Callable[[Any, Any, int, nn.Module | None], None]] = {
    Attention: _lower_attention,
    Rnn: _lower_rnn,
    **dict.fromkeys(GATES, lower_linear),
}
_FFNS: dict[type[nn.Module], Callable[[Builder, Any, nn.Module | None], None]] = {
    SwiGLU: _lower_swiglu,
    GELU: _lower_gelu,
}
