"""The sequence operations, each one call with several interchangeable backends.

Letters, everywhere in glade: `B` batch, `T` tokens, `H` query/key heads, `HV` value heads, `K` key dim, `V` value
dim, `D` model dim, `C` chunk, `N` packed documents. Layout is always [B, T, heads, dim]. Everything after the first
tensors is keyword-only; every op that carries a state takes it as an argument and returns the new one.

These are leaves: they know shapes and equations, not layers, tokenizers or training. What they are applied to, in which
order, is the mixers' business (`glade.model.mixers`).
"""

from glade.ops.attention import AttentionState, attention
from glade.ops.cross_entropy import linear_cross_entropy
from glade.ops.linear_attention import linear_attention, linear_attention_step_
from glade.ops.log_decay import log_decay
from glade.ops.rms_norm import add_rms_norm, rms_norm
from glade.ops.rnn import rnn
from glade.ops.rope import rope
from glade.ops.short_conv import short_conv
from glade.ops.sigmoid import sigmoid
from glade.ops.swiglu import swiglu

__all__ = [
    "AttentionState",
    "add_rms_norm",
    "attention",
    "linear_attention",
    "linear_attention_step_",
    "linear_cross_entropy",
    "log_decay",
    "rms_norm",
    "rnn",
    "rope",
    "short_conv",
    "sigmoid",
    "swiglu",
]
