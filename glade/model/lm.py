"""`LanguageModel`: the one model. It knows its mixers only as `glade.model.mixer.Mixer`.

    x = embed(ids) (+ positions),  x = block(x) for every block,  logits = norm(x) W_head

It knows nothing of text, losses over batches, or sampling.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glade.model.block import Block, stream_norm
from glade.model.checkpoint import Saveable, load_weights, read_checkpoint, write_checkpoint
from glade.model.config import ModelConfig
from glade.model.init import initialise
from glade.model.norm import make_norm
from glade.model.state import State
from glade.ops import linear_cross_entropy
from glade.ops.packing import check_cu_seqlens, document_borders, token_positions, tokens_seen


class LanguageModel(nn.Module):
    """A causal language model with an explicit state.

    `config` is kept resolved. The parameters are drawn from torch's global generator, in fp32, unless the model is
    built on the meta device (then call `to_empty` and `reset_parameters`, or load weights).

    Raises:
        ConfigError: the config has no vocab_size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = config.resolve()
        self.embed = nn.Embedding(config.vocab_rows, config.dim)
        self.positions = nn.Embedding(config.learned_positions, config.dim) if config.learned_positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)
        self.final_norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_rows, bias=False)
        # a backward keeps only what goes from block to block and computes each block again
        self.recompute_layers = False
        if not self.embed.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as `config.init` says."""
        initialise(self)

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        logits: Literal["all", "last", "none"] = "all",
        return_state: bool = True,
    ) -> tuple[Tensor, State]:
        """Read tokens; say what comes next.

        Args:
            ids:        [B, T] int64 or int32. T may be 0
            state:      what a former call returned, to read on from there; never written into. None is the start
            cu_seqlens: [N + 1] int, the borders of N documents packed into one row (B == 1). Nothing crosses a
                        border; `state` and the returned one have a row per document
            targets:    [B, T], the token after each; negative: none. The losses take the logits' place, and the
                        logits are never whole in memory
            logits:     "all"; "last": of the last token of each row (each document) alone; "none": [B, 0, vocab_size],
                        for a text that is only read, which then costs no head and no last feed-forward network
            return_state: False leaves out the layers' states, when nothing will be read on: packed documents under
                        full attention would pay for N times the longest one

        Returns:
            logits [B, T, vocab_size] ("last": [B, vocab_size], or [N, vocab_size]) in the dtype of the matrix
            product, or with targets the losses [B, T] in nats, fp32; and the state after the last tokens (without
            return_state one that has no layers and cannot be read on from). With a mixture of experts
            `state.load_balance` is the loss to add to the training loss.

        Raises:
            ValueError: an id outside the vocabulary, a sequence beyond the learned positions, or shapes that do not
                fit. On a GPU in training the values of ids are left to torch's own device assertion, since reading
                them back would stall the device at every step.
        """
        self._check_inputs(ids, state, cu_seqlens, targets, logits)
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(self._token_positions(ids, state, cu_seqlens))
        x = self.dropout(x)
        branch, layers, load_balances = None, [], []
        for i, block in enumerate(self.layers):
            before = None if state is None else state.layers[i]
            only_read = logits == "none" and i == len(self.layers) - 1
            call = partial(block, return_state=return_state, only_read=only_read)
            if self.recompute_layers and torch.is_grad_enabled():
                call = partial(checkpoint, call, use_reentrant=False)
            x, branch, layer, load_balance = call(x, branch, before, cu_seqlens)
            if return_state:
                layers.append(layer)
            if load_balance is not None:
                load_balances.append(load_balance)
        position = tokens_seen(ids, None if state is None else state.position, cu_seqlens)
        after = State(tuple(layers), position, self._weigh(load_balances))
        if targets is not None:
            x, _ = stream_norm(self.final_norm, x, branch)
            return linear_cross_entropy(x, self._head(), targets, bias=self._padding_bias()), after
        if logits == "none":
            x, branch = x[:, :0], None
        elif logits == "last":
            rows = (slice(None), -1) if cu_seqlens is None else (0, cu_seqlens[1:].to(torch.int64) - 1)
            x, branch = x[rows], None if branch is None else branch[rows]
        return self._logits(x, branch), after

    @torch.no_grad()
    def step_(self, ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        """Decode: one token a row, `state` updated in place. No gradients; call `eval()` first if there is dropout.

        Args:
            ids:   [B] int64
            state: this call owns it: keep `state.clone()` to come back to what it was
            slots: [B] int64, the distinct rows of `state` that ids belong to; None is all, in order

        Returns:
            logits [B, vocab_size].

        Raises:
            ValueError: an id outside the vocabulary, a row beyond the learned positions, or shapes that do not fit.
        """
        if ids.dim() != 1 or len(ids) != (len(state) if slots is None else len(slots)):
            rows = f"the state's {len(state)} rows" if slots is None else f"{len(slots)} slots"
            raise ValueError(f"ids has shape {list(ids.shape)} with {rows}; give one token a row, [B]")
        self._check_ids(ids, "ids")
        x = self.embed(ids)
        if self.positions is not None:
            positions = state.position if slots is None else state.position[slots]
            self._check_positions(positions)
            x = x + self.positions(positions)
        x = self.dropout(x)
        branch, layers = None, []
        for block, layer in zip(self.blocks(), state.layers, strict=True):
            x, branch, layer = block.step_(x, branch, layer, slots)
            layers.append(layer)
        state.layers = tuple(layers)
        if slots is None:
            state.position += 1
        else:
            state.position[slots] += 1
        return self._logits(x, branch)

    def init_state(self, batch: int) -> State:
        """The state before the first token, of `batch` rows, on the model's device."""
        layers = tuple(block.mixer.init_state(batch) for block in self.blocks())
        return State(layers, torch.zeros(batch, dtype=torch.int64, device=self.embed.weight.device))

    def blocks(self) -> Iterator[Block]:
        """`self.layers`, typed."""
        return (cast(Block, block) for block in self.layers)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without embeddings: neither tokens' nor positions' table nor an untied head."""
        tables = (self.embed, self.positions, self.lm_head)
        excluded = 0 if embeddings else sum(p.numel() for t in tables if t is not None for p in t.parameters())
        return sum(p.numel() for p in self.parameters()) - excluded

    def flops_per_token(self, T: int) -> float:
        """Forward FLOPs for one token, averaged over a sequence of T: 2 per multiply-add of the matrix products and
        of the recurrences in their token-by-token form. Only the mixers that look back (softmax, swa) depend on T.
        """
        blocks = sum(
            b.mixer.flops_per_token(T) + (0 if b.ffn is None else b.ffn.flops_per_token()) for b in self.blocks()
        )
        return blocks + 2 * self._head().numel()

    def state_bytes(self, T: int) -> int:
        """Bytes of state one sequence holds after T tokens."""
        position_bytes = 8
        return sum(block.mixer.state_bytes(T) for block in self.blocks()) + position_bytes

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LanguageModel":
        """The model of a checkpoint folder, in eval mode: on the CPU in the dtypes of the file, unless told otherwise.

        Raises:
            CheckpointError: the folder is missing, incomplete, damaged, of another kind or version.
        """
        config, tensors = read_checkpoint(folder)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, tensors, str(folder))
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Saveable | None = None,
        training_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint folder: weights, resolved config, tokenizer, metadata, model card.

        A crash at any instant leaves the folder that was there, or the new one, whole.

        Raises:
            CheckpointError: `folder` is a file or a link, or holds files that are not a checkpoint's.
        """
        write_checkpoint(self, folder, tokenizer, training_metadata)

    def _head(self) -> Tensor:
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def _logits(self, x: Tensor, branch: Tensor | None) -> Tensor:
        x, _ = stream_norm(self.final_norm, x, branch)
        return F.linear(x, self._head())[..., : self.config.vocab_size]

    def _padding_bias(self) -> Tensor | None:
        """-inf for the rows beyond vocab_size, so that they take no probability; None if there are none."""
        if self.config.vocab_rows == self.config.vocab_size:
            return None
        bias = torch.zeros(self.config.vocab_rows, device=self.embed.weight.device)
        bias[self.config.vocab_size :] = -torch.inf
        return bias

    def _token_positions(self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        """[T] or [B, T]: how many tokens of its own sequence stand before each token."""
        positions = token_positions(ids.shape[1], ids.device, None if state is None else state.position, cu_seqlens)
        if state is None and cu_seqlens is None:
            self._refuse_positions(ids.shape[1] - 1)  # known without looking at a tensor
        else:
            self._check_positions(positions)
        return positions

    def _weigh(self, load_balances: list[Tensor]) -> Tensor | None:
        if not load_balances:
            return None
        return self.config.load_balance * torch.stack(load_balances).mean()

    def _check_inputs(
        self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None, targets: Tensor | None, logits: str
    ) -> None:
        if ids.dim() != 2:
            raise ValueError(f"ids has shape {list(ids.shape)}; give [B, T]")
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits is {logits!r}; give 'all', 'last' or 'none'")
        if targets is not None and logits != "all":
            raise ValueError(f"targets ask for the loss of every token, logits={logits!r} for less; give one of them")
        self._check_ids(ids, "ids")
        if targets is not None and self.config.vocab_rows != self.config.vocab_size:
            self._check_ids(targets.clamp_min(0), "targets")
        rows = ids.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, ids.shape[0])
        if state is not None:
            self._check_state(state, rows, "sequences" if cu_seqlens is None else "documents")
        if logits == "last":
            self._check_last(ids, cu_seqlens)

    def _check_state(self, state: State, rows: int, called: str) -> None:
        if len(state) != rows or len(state.layers) != len(self.layers):
            raise ValueError(
                f"state has {len(state)} rows and {len(state.layers)} layers; this call has {rows} {called} and the "
                f"model {len(self.layers)} layers"
            )
        for i, (block, layer) in enumerate(zip(self.blocks(), state.layers, strict=True)):
            if type(layer) is not block.mixer.state_type:
                raise ValueError(
                    f"layer {i} of state is of {type(layer).__name__}, this model's of "
                    f"{block.mixer.state_type.__name__}; give a state that this model has returned"
                )

    def _check_last(self, ids: Tensor, cu_seqlens: Tensor | None) -> None:
        borders = [0, ids.shape[1]] if cu_seqlens is None else document_borders(cu_seqlens, ids.shape[1])
        empty = [i for i in range(len(borders) - 1) if borders[i] == borders[i + 1]]
        if empty:
            what = "ids has no token" if cu_seqlens is None else f"document {empty[0]} has no token"
            raise ValueError(f"{what}, so there is no last one to give logits for; give at least one")

    def _check_ids(self, ids: Tensor, name: str) -> None:
        unread = torch.compiler.is_compiling() or ids.is_meta or (ids.device.type != "cpu" and self.training)
        unread = unread or (ids.is_cuda and torch.cuda.is_current_stream_capturing())  # whoever records has looked
        if unread or ids.numel() == 0:
            return
        low, high = torch.stack(ids.aminmax()).tolist()  # one look at a device
        if low < 0 or high >= cast(int, self.config.vocab_size):
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} holds {wrong}; the vocabulary has {self.config.vocab_size} entries, 0 to "
                f"{cast(int, self.config.vocab_size) - 1}. Was it made with this model's tokenizer?"
            )

    def _check_positions(self, positions: Tensor) -> None:
        unread = torch.compiler.is_compiling() or positions.is_meta
        if not unread and positions.numel() and (positions.device.type == "cpu" or not self.training):
            self._refuse_positions(int(positions.max()))

    def _refuse_positions(self, last: int) -> None:
        if last >= self.config.learned_positions:
            raise ValueError(
                f"the sequence reaches position {last}; this model has {self.config.learned_positions} learned "
                "positions, so it reads no further. Shorten the text, or use a model with rotary or no positions"
            )
