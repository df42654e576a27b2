"""The tokenizer of a model: text to ids and back, the one BOS/EOS policy, and the two files it travels in.

Building a vocabulary (characters, bytes, BPE, SentencePiece) is the business of `glade.data.vocabularies`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from glade.data.chat import render
from glade.data.decoding import StreamDecoder
from glade.data.files import read_json, write_text
from glade.errors import DataError

# names that published tokenizers give their end of document and their beginning, where no config says which
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")

# A text longer than this many characters is encoded piece by piece: one encoding holds some hundred bytes a token.
_PIECE_CHARS = 1 << 20
_PIECE_BORDER = re.compile(r"[A-Za-z0-9](?=\s)")


class Tokenizer:
    """One `tokenizers.Tokenizer` together with what glade must know about it: its BOS, its EOS, its chat template.

    Text is text: a special token spelled out in it ("<|endoftext|>") is encoded as its characters, never as the
    special id. A document is [BOS] + ids + [EOS]; a tokenizer without a BOS uses its EOS as BOS, as GPT-2 does.

    Args:
        model: what does the work; its truncation and padding are switched off.
        eos: the token that ends a document.
        bos: the token that begins one; None is `eos`.
        chat_template: Jinja source that turns messages into a prompt, or None.
    Raises:
        DataError: `eos` or `bos` is not in the vocabulary.
    """

    def __init__(
        self, model: tokenizers.Tokenizer, *, eos: str, bos: str | None = None, chat_template: str | None = None
    ) -> None:
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        self.model = model
        self.eos, self.bos = eos, bos or eos
        self.eos_id, self.bos_id = self._special_id(self.eos), self._special_id(self.bos)
        self.chat_template = chat_template
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())

    def _special_id(self, token: str) -> int:
        index = self.model.token_to_id(token)
        if index is None:
            raise DataError(f"special token {token!r} is not in the vocabulary; name one that is, or add it first")
        return index

    @staticmethod
    def build(spec: str, texts: Iterable[str] | None = None) -> "Tokenizer":
        """The tokenizer a spec names: see `glade.data.vocabularies.build`."""
        # vocabularies returns Tokenizers, so it is imported when asked for and not above
        from glade.data.vocabularies import build

        return build(spec, texts)

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special token added.

        Raises:
            DataError: a character outside a vocabulary that has no way to spell it, or a lone surrogate.
        """
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text as an int32 array, short texts on all cores."""
        if any(len(text) > _PIECE_CHARS for text in texts):
            return [self._encode(text) for text in texts]
        for text in texts:
            self._check(text)
        return _fast(self.model, texts)

    def _encode(self, text: str) -> np.ndarray:
        return np.concatenate([_fast(part, [piece])[0] for part, piece in self._pieces(text)])

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text (int32), and for each the character of the text after its last one (int64)."""
        ids, ends = [], []
        start = 0
        for part, piece in self._pieces(text):
            encoding = part.encode(piece, add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.int32))
            ends.append(start + np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 1])
            start += len(piece)
        return np.concatenate(ids), np.concatenate(ends)

    def document(self, text: str) -> list[int]:
        """[BOS] + ids + [EOS]: what training and evaluation see of one document."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def prompt(self, text: str) -> list[int]:
        """[BOS] + ids: the beginning of a document, for a model to continue."""
        return [self.bos_id, *self.encode(text)]

    def continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on where another ended: `encode` without SentencePiece's leading space.

        Tokenised apart from what it continues, so that no token spans the border between the two.
        """
        self._check(text)
        return _fast(self._middle, [text])[0].tolist()

    def _pieces(self, text: str) -> Iterator[tuple[tokenizers.Tokenizer, str]]:
        """The text in pieces of bounded length, each with what encodes it so that the ids join to those of the whole.

        A piece ends between a letter or digit and white space, a place that no vocabulary in use joins over.
        """
        self._check(text)
        start, part = 0, self.model
        while len(text) - start > _PIECE_CHARS:
            border = _PIECE_BORDER.search(text, start + _PIECE_CHARS - 1)
            if border is None:
                break
            yield part, text[start : border.end()]
            start, part = border.end(), self._middle
        yield part, text[start:]

    @cached_property
    def _middle(self) -> tokenizers.Tokenizer:
        """The same tokenizer for text that does not begin its document: SentencePiece's leading space left out."""
        spec = json.loads(self.model.to_str())
        normalizers = [s for s in _steps(spec["normalizer"], "normalizers") if s["type"] != "Prepend"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
        middle = tokenizers.Tokenizer.from_str(json.dumps(spec))
        middle.encode_special_tokens = True
        return middle

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The only characters that can be encoded, where the model silently drops others; None: it drops none."""
        spec = json.loads(self.model.to_str())
        model = spec["model"]
        drops = model["type"] == "BPE" and model.get("unk_token") is None and not model.get("byte_fallback")
        if not drops or spec.get("pre_tokenizer") is not None or spec.get("normalizer") is not None:
            return None
        return frozenset(token for token in model["vocab"] if len(token) == 1)

    def _check(self, text: str) -> None:
        unknown = set(text) - self._alphabet if self._alphabet is not None else None
        if unknown:
            at = next(i for i, c in enumerate(text) if c in unknown)
            raise DataError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the tokenizer's "
                f"{len(self._alphabet or ())} characters; remove it, or use a tokenizer that spells any text ('byte')"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds a lone surrogate at position {error.start}, which no encoding can write; remove it"
            ) from error

    # --- ids to text ---

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special tokens are not text and leave none; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is not in the vocabulary; ids run from 0 to {self.vocab_size - 1}")
        return self.model.decode(ids, skip_special_tokens=True)

    def decoder(self) -> StreamDecoder:
        """For ids that come one at a time: `push(id)` gives the new text, `flush()` what was held back."""
        return StreamDecoder(self.decode)

    # --- chat ---

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages as the one text that the chat template makes of them.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with the words that open the assistant's answer.
        Raises:
            DataError: no template, or one that refuses these messages.
        """
        if self.chat_template is None:
            raise DataError("this tokenizer has no chat template; give a plain prompt, or set tokenizer.chat_template")
        return render(self.chat_template, messages, add_generation_prompt, bos_token=self.bos, eos_token=self.eos)

    def chat_ids(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of `chat(...)`, where the special tokens that the template writes become special ids.

        Raises:
            DataError: as `chat`; or a message spells out a special token, which would pass for the template's own.
        """
        for number, message in enumerate(messages):
            token = self.special_in(str(message.get("content", "")))
            if token is not None:
                raise DataError(f"message {number} spells out the special token {token!r}; remove it")
        return self.template_ids(self.chat(messages, add_generation_prompt), first=True)

    def template_ids(self, text: str, *, first: bool) -> list[int]:
        """The ids of a chat template's text, in which special tokens spelled out become special ids.

        Args:
            first: the text begins the conversation; otherwise it continues one, as `continuation`.
        Raises:
            DataError: a character that the vocabulary cannot spell.
        """
        plain = text
        for token in self._special_tokens:
            plain = plain.replace(token, "")
        self._check(plain)
        model = self._with_specials if first else self._middle_with_specials
        return model.encode(text, add_special_tokens=False).ids

    def special_in(self, text: str) -> str | None:
        """A special token that the text spells out, if it does: a chat template would take it for its own."""
        return next((token for token in self._special_tokens if token in text), None)

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.model.to_str())

    @cached_property
    def _middle_with_specials(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._middle.to_str())

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.model.get_added_tokens_decoder().values() if t.special)

    # --- files ---

    def digest(self) -> str:
        """The sha256 of everything that decides what the ids mean."""
        return hashlib.sha256(json.dumps([self.model.to_str(), self.eos, self.bos]).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        write_text(folder / "tokenizer.json", self.model.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote, or any Hugging Face folder (or file) with a `tokenizer.json`.

        Raises:
            DataError: no such file, a damaged one, or one whose end-of-document token cannot be told.
        """
        path = Path(folder)
        path = path if path.suffix == ".json" else path / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such file; a tokenizer is a folder with a tokenizer.json, or that file")
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
            raise DataError(f"{path}: not a readable tokenizer.json ({error}); get the file again") from error
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.is_file() else {}
        eos = _token_name(config, "eos_token", model, _EOS_NAMES)
        if eos is None:
            raise DataError(
                f"{path}: which token ends a document is not said; put 'eos_token' into {config_path.name} beside it"
            )
        bos = _token_name(config, "bos_token", model, _BOS_NAMES)
        return cls(model, eos=eos, bos=bos, chat_template=_chat_template(config, path.with_name("chat_template.jinja")))


def _fast(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, in parallel and without the offsets that take most of the time."""
    return [np.array(e.ids, np.int32) for e in model.encode_batch_fast(list(texts), add_special_tokens=False)]


def _steps(component: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer as tokenizer.json has it: none, one, or a sequence."""
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


def _token_name(config: dict, key: str, model: tokenizers.Tokenizer, known: Sequence[str]) -> str | None:
    """A special token as a Hugging Face config names it: a string, an object with "content", or not at all."""
    if key in config:
        value = config[key]
        return value["content"] if isinstance(value, dict) else value
    return next((name for name in known if model.token_to_id(name) is not None), None)


def _chat_template(config: dict, file: Path) -> str | None:
    """The template in the config (a string, or a list of named ones with a "default"), or in its own file."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None and file.is_file():
        return file.read_text(encoding="utf-8")
    return template
