"""Initial values, as published, chosen by `ModelConfig.init`.

    normal  every matrix and embedding N(0, init_std)
    gpt2    normal, and the matrices that write into the residual stream N(0, init_std / sqrt(2 num_layers))
    fla     normal, and the short convolutions N(0, init_std) too
    gdn2    embeddings N(0, init_std); the mixers' matrices Xavier-uniform with gain 2^-2.5; the rest
            U(+-1/sqrt(fan in)), where the feed-forward network writes into the residual stream over sqrt(2 num_layers)

In all of them biases are 0, norm weights 1, short convolutions U(+-1/sqrt(taps)) unless said otherwise, the decay
parameters and the RNN's recurrence what their mixers say. Sources: GPT-2; arXiv:2605.22791 appendix D.5.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from glade.model.ffn import MoE
from glade.model.mixers.delta import LearnedDecay
from glade.model.mixers.linear import ShortConvolution
from glade.model.mixers.rnn import Rnn
from glade.model.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from glade.model.lm import LanguageModel

MIXER_GAIN = 2**-2.5


@torch.no_grad()
def initialise(model: "LanguageModel") -> None:
    """Draw every parameter of `model` anew, from torch's global generator."""
    config = model.config
    normal = config.init != "gdn2"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0, config.init_std)
        elif isinstance(module, nn.Linear):
            _matrix(module.weight, config.init_std if normal else None)
            _fill(module.bias, 0)
        elif isinstance(module, MoE):
            for experts in (module.gate, module.up, module.down):
                _matrix(experts, config.init_std if normal else None)
        elif isinstance(module, ShortConvolution) and module.weight is not None:
            _matrix(module.weight, config.init_std if config.init == "fla" else None)
        elif isinstance(module, RMSNorm | LayerNorm):
            _fill(module.weight, 1)
            _fill(getattr(module, "bias", None), 0)
    if config.init == "gdn2":
        _xavier_mixers(model)
    if config.init in ("gpt2", "gdn2"):
        _shrink_residual_writers(model, mixers=config.init == "gpt2")
    for module in model.modules():
        if isinstance(module, LearnedDecay):
            module.reset_decay()
        elif isinstance(module, Rnn):
            module.reset_recurrence()


def _matrix(weight: Tensor, std: float | None) -> None:
    """N(0, std), or U(+-1/sqrt(fan in)) of the last axis, which is torch's default for a linear map."""
    if std is not None:
        weight.normal_(0, std)
    else:
        bound = weight.shape[-1] ** -0.5
        weight.uniform_(-bound, bound)


def _fill(parameter: Tensor | None, value: float) -> None:
    if parameter is not None:
        parameter.fill_(value)


def _xavier_mixers(model: "LanguageModel") -> None:
    for block in model.blocks():
        for module in block.mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=MIXER_GAIN)


def _shrink_residual_writers(model: "LanguageModel", mixers: bool) -> None:
    factor = 1 / math.sqrt(2 * model.config.num_layers)
    for block in model.blocks():
        if mixers:
            block.mixer.o_proj.weight.mul_(factor)
        if isinstance(block.ffn, MoE):
            block.ffn.down.mul_(factor)
            if block.ffn.shared is not None:
                block.ffn.shared.down.weight.mul_(factor)
        elif block.ffn is not None:
            block.ffn.down.weight.mul_(factor)
