"""Reading prompts: pieces of several prompts in one packed call, each going on from its own state, until all are read.

The last token of a prompt is left unread: the decode loop reads it, as it reads every token drawn.
"""

from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from glade.infer.pieces import Pieces
from glade.infer.prefix_cache import PrefixCache
from glade.model.lm import LanguageModel
from glade.model.state import State

Owner = TypeVar("Owner")


class Read(NamedTuple, Generic[Owner]):
    """A prompt that is done with: read, or with an `error`."""

    owner: Owner
    state: State | None
    cached_tokens: int  # of its ids, those that did not have to be read for it
    error: Exception | None = None


class _Prompt(Generic[Owner]):
    """Ids to read, for everyone who asked for these very ids."""

    def __init__(self, ids: tuple[int, ...], state: State | None, owner: Owner) -> None:
        self.ids, self.given, self.state = ids, state, state
        self.owners = [owner]
        self.looked_up = False
        self.read = self.cached = 0
        self.branch = 0  # where a cached prompt went on differently: worth a snapshot


class PromptReader(Generic[Owner]):
    """A line of prompts; every `step` reads at most `chunk_tokens` tokens of those in front.

    Whoever is not done after a step goes to the end of the line, so a short prompt waits for no long one. Prompts that
    are equal are read once. A prompt begins at the longest prefix that `cache` holds, and leaves snapshots there: at
    multiples of `chunk_tokens`, where it goes on differently from a cached one, and at its end.

    Args:
        alone: one prompt a step, in pieces that end at multiples of `chunk_tokens` and nowhere else, and snapshots
            there alone: the bits of a state are then a function of the ids
    """

    def __init__(
        self, model: LanguageModel, cache: PrefixCache, growing: Sequence[bool], chunk_tokens: int, alone: bool
    ) -> None:
        self.cache, self._pieces = cache, Pieces(model, growing)
        self.chunk_tokens, self.alone = chunk_tokens, alone
        self._line: deque[_Prompt[Owner]] = deque()

    def __len__(self) -> int:
        return sum(len(prompt.owners) for prompt in tuple(self._line))

    def owners(self) -> list[Owner]:
        return [owner for prompt in self._line for owner in prompt.owners]

    def add(self, ids: tuple[int, ...], state: State | None, owner: Owner) -> None:
        """Read `ids` after `state` (None: from the start) for `owner`."""
        for prompt in self._line:
            if prompt.given is state and prompt.ids == ids:
                prompt.owners.append(owner)
                return
        self._line.append(_Prompt(ids, state, owner))

    def drop(self, owner: Owner) -> None:
        """`owner` no longer wants its prompt."""
        for prompt in tuple(self._line):
            if owner in prompt.owners:
                prompt.owners.remove(owner)
                if not prompt.owners:
                    self._line.remove(prompt)

    def step(self) -> list[Read[Owner]]:
        """Read a chunk; what is done with it. A prompt that makes the model raise is done, too, with an error."""
        chosen: list[tuple[_Prompt[Owner], int]] = []
        done: list[Read[Owner]] = []
        left = self.chunk_tokens
        while self._line and left and not (self.alone and chosen):
            prompt = self._line.popleft()
            if not prompt.looked_up:
                self._look_up(prompt)
            count = min(left, self._border(prompt) - prompt.read)
            if count:
                chosen.append((prompt, count))
                left -= count
            else:
                done += _done(prompt)
        for prompt, error in self._read(chosen):
            if error is not None or prompt.read == len(prompt.ids):
                done += _done(prompt, error)
            else:
                self._line.append(prompt)
        return done

    def _look_up(self, prompt: _Prompt[Owner]) -> None:
        prompt.looked_up = True
        if prompt.given is None and prompt.ids:  # what a given state has read is not known here
            found = self.cache.find(prompt.ids)
            prompt.state, prompt.read, prompt.cached = found.state, found.length, found.length
            prompt.branch = 0 if self.alone else found.shared

    def _border(self, prompt: _Prompt[Owner]) -> int:
        """How far the next piece may go."""
        chunk = (prompt.read // self.chunk_tokens + 1) * self.chunk_tokens
        branch = prompt.branch if prompt.branch > prompt.read else chunk
        return min(chunk, branch, len(prompt.ids))

    def _read(self, chosen: list[tuple[_Prompt[Owner], int]]) -> list[tuple[_Prompt[Owner], Exception | None]]:
        """Read so many tokens of each prompt: together, or if that fails one by one, to find out whose fault it is."""
        if not chosen:
            return []
        pieces = [prompt.ids[prompt.read : prompt.read + count] for prompt, count in chosen]
        try:
            states = self._pieces.read(pieces, [prompt.state for prompt, _ in chosen])
        except Exception as error:
            if len(chosen) > 1:
                return [each for one in chosen for each in self._read([one])]
            return [(chosen[0][0], error)]
        for (prompt, count), state in zip(chosen, states, strict=True):
            prompt.read += count
            prompt.state = state
            self._keep(prompt, state)
        return [(prompt, None) for prompt, _ in chosen]

    def _keep(self, prompt: _Prompt[Owner], state: State) -> None:
        """A snapshot, where others may want to go on from."""
        at_chunk = prompt.read % self.chunk_tokens == 0
        elsewhere = prompt.read in (prompt.branch, len(prompt.ids)) and not self.alone
        if prompt.given is None and (at_chunk or elsewhere):
            self.cache.add(prompt.ids[: prompt.read], state)


def _done(prompt: _Prompt[Owner], error: Exception | None = None) -> list[Read[Owner]]:
    first, *others = prompt.owners
    state = None if error else prompt.state
    return [
        Read(first, state, prompt.cached, error),
        *(Read(owner, state, len(prompt.ids), error) for owner in others),
    ]
