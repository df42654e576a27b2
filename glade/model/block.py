"""One block: a mixer and a feed-forward network (or none), each with its norm, on the residual stream."""

from typing import Any

from torch import Tensor, nn

from glade.model.config import ModelConfig
from glade.model.ffn import make_ffn
from glade.model.mixer import matmul_dtype
from glade.model.mixers import make_mixer
from glade.model.norm import make_norm


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
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = True,
        only_read: bool = False,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """x [B, T, D] -> x, the mixer's state, and the load-balancing loss of a mixture of experts.

        With `only_read` the state is all that is wanted: x is returned as it came, and there is no load to balance.
        """
        y, state = self.mixer(self._before(x, self.mixer_norm), state, cu_seqlens, return_state=return_state)
        if only_read:
            return x, state, None
        x, load_balance = self._feed_forward(self._add(x, y, self.mixer_norm))
        return x, state, load_balance

    def step_(self, x: Tensor, state: Any, slots: Tensor | None) -> tuple[Tensor, Any]:
        """x [B, D] -> x and the mixer's state, updated in place where it could be."""
        y, state = self.mixer.step_(self._before(x, self.mixer_norm), state, slots)
        return self._feed_forward(self._add(x, y, self.mixer_norm))[0], state

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.ffn is None or self.ffn_norm is None:
            return x, None
        y, load_balance = self.ffn(self._before(x, self.ffn_norm))
        return self._add(x, y, self.ffn_norm), load_balance

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a mixer or a network reads, in the dtype of its matrix products."""
        return norm(x, dtype=matmul_dtype(x)) if self.pre else x

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(y)
        return x if self.pre else norm(x)
