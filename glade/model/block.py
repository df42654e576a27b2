"""One block: a mixer and a feed-forward network (or none), each with its norm, on the residual stream."""

from typing import Any

from torch import Tensor, nn

from glade.model.config import ModelConfig
from glade.model.ffn import make_ffn
from glade.model.mixer import matmul_dtype
from glade.model.mixers import make_mixer
from glade.model.norm import make_norm, norm_of_sum


class Block(nn.Module):
    """pre-norm:  x = x + mixer(norm(x)),  x = x + ffn(norm(x))
    post-norm: x = norm(x + mixer(x)),  x = norm(x + ffn(x))
    """

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.pre = config.norm_placement == "pre"
        self.mixer_norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.mixer = make_mixer(config, mixer)
        self.ffn = make_ffn(config)
        self.ffn_norm = None if self.ffn is None else make_norm(config.norm, config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout or 0.0)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
        only_read: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any, Tensor | None]:
        """The residual stream x [B, T, D], or x + branch where there is one -> the same two after the block, the
        mixer's state, and the load-balancing loss of a mixture of experts.

        What is still to be added to the stream is handed on, since the next norm reads it and can add it on the way.
        With `only_read` the state is all that is wanted: there is no load to balance, and the stream means nothing.
        """
        h, x = self._before(x, branch, self.mixer_norm)
        y, state = self.mixer(h, state, cu_seqlens, return_state=return_state)
        if only_read:
            return x, None, state, None
        x, branch = self._after(x, y, self.mixer_norm)
        if self.ffn is None or self.ffn_norm is None:
            return x, branch, state, None
        h, x = self._before(x, branch, self.ffn_norm)
        y, load_balance = self.ffn(h)
        return *self._after(x, y, self.ffn_norm), state, load_balance

    def step_(self, x: Tensor, branch: Tensor | None, state: Any, slots: Tensor | None) -> tuple[Tensor, Any, Any]:
        """`forward` for one token a row, x [B, D]: stream, branch, and the state, updated in place where it can be."""
        h, x = self._before(x, branch, self.mixer_norm)
        y, state = self.mixer.step_(h, state, slots)
        x, branch = self._after(x, y, self.mixer_norm)
        if self.ffn is not None and self.ffn_norm is not None:
            h, x = self._before(x, branch, self.ffn_norm)
            x, branch = self._after(x, self.ffn(h)[0], self.ffn_norm)
        return x, branch, state

    def _before(self, x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """What a mixer or a network reads, in the dtype of its matrix products, and the stream with all added."""
        if not self.pre:
            assert branch is None, "a post-norm has added it"
            return x, x
        return stream_norm(norm, x, branch)

    def _after(self, x: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
        y = self.dropout(y)
        return (x, y) if self.pre else (norm_of_sum(norm, x, y, x.dtype)[0], None)


def stream_norm(norm: nn.Module, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(x + branch) in the dtype of matrix products, and x + branch; x alone where there is no branch."""
    if branch is None:
        return norm(x, dtype=matmul_dtype(x)), x
    return norm_of_sum(norm, x, branch, matmul_dtype(x))
