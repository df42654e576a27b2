"""SentencePiece models of BPE type, rewritten as a `tokenizers` BPE with the same ids.

The .model file is a protocol buffer; the few fields that matter are read here directly, so that neither protobuf nor
SentencePiece's own code decides what a checkpoint's tokenizer.json holds. Unigram models are refused, as is every
setting that the rewritten tokenizer could not reproduce.

Field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from glade.errors import DataError

_SPACE = "\u2581"
# ModelProto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
# SentencePiece
_TEXT, _SCORE, _TYPE = 1, 2, 3
# TrainerSpec
_MODEL_TYPE, _SUFFIX_SPACE, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID = 3, 24, 35, 40, 41, 42
# NormalizerSpec
_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 1, 2, 3, 4, 5
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


class Piece(NamedTuple):
    """One entry of the vocabulary; a higher `score` is merged earlier."""

    text: str
    score: float
    type: int


def convert(path: Path) -> tuple[tokenizers.Tokenizer, str, str]:
    """The tokenizer, the BOS token and the EOS token of a SentencePiece .model file.

    Raises:
        DataError: no such file, not a SentencePiece model, or one with settings that could not be reproduced.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        pieces, trainer, normalizer = _parse(data)
    except (IndexError, struct.error, ValueError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error
    _refuse_others(path, pieces, trainer, normalizer)

    names = [piece.text for piece in pieces]
    unk, bos, eos = trainer.get(_UNK_ID, 0), trainer.get(_BOS_ID, 1), trainer.get(_EOS_ID, 2)
    if not (0 <= bos < len(names) and 0 <= eos < len(names)):
        raise DataError(f"{path}: has no BOS or no EOS (ids {bos} and {eos} of {len(names)}); glade needs both")
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(pieces),
            unk_token=names[unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Prepend(_SPACE)] if normalizer.get(_DUMMY_PREFIX, 1) else []
    model.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaces else []
    model.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [p.text for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return model, names[bos], names[eos]


def _refuse_others(path: Path, pieces: list[Piece], trainer: dict, normalizer: dict) -> None:
    kinds = {piece.type for piece in pieces}
    refusals = {
        f"is of model type {trainer.get(_MODEL_TYPE, 1)}, not BPE (2)": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "has no byte fallback, so some text could not be written": not trainer.get(_BYTE_FALLBACK, 0),
        "writes spaces as suffixes": bool(trainer.get(_SUFFIX_SPACE, 0)),
        f"normalises text ({normalizer.get(_NAME, b'').decode()!r})": bool(normalizer.get(_CHARSMAP, b"")),
        "removes extra spaces": bool(normalizer.get(_EXTRA_SPACES, 1)),
        "does not escape spaces": not normalizer.get(_ESCAPE, 1),
        "holds user-defined or unused pieces": not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
    }
    reasons = [reason for reason, holds in refusals.items() if holds]
    if reasons:
        raise DataError(
            f"{path}: a SentencePiece model that {', '.join(reasons)} cannot be converted with its ids kept; "
            f"use a tokenizer.json of the same vocabulary"
        )


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The merges in the order in which SentencePiece makes them: by the score of what they make, then by id.

    A piece may be made of two pieces in several ways. SentencePiece takes whichever stands leftmost in the text,
    which a list of merges cannot say; they are listed with the longer left part first, since of two overlapping
    pairs that make the same piece that order prefers the one further left.
    """
    normal = {piece.text for piece in pieces if piece.type == _NORMAL}
    ranked = sorted((p for p in pieces if p.type == _NORMAL), key=lambda p: -p.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in ranked
        for cut in range(len(piece.text) - 1, 0, -1)
        if piece.text[:cut] in normal and piece.text[cut:] in normal
    ]


# --- the protocol buffer ---


def _parse(data: bytes) -> tuple[list[Piece], dict, dict]:
    pieces: list[Piece] = []
    trainer: dict = {}
    normalizer: dict = {}
    for field, value in _fields(data):
        if field == _PIECES:
            entry = dict(_fields(value))
            pieces.append(Piece(entry[_TEXT].decode(), entry.get(_SCORE, 0.0), entry.get(_TYPE, _NORMAL)))
        elif field == _TRAINER:
            trainer = dict(_fields(value))
        elif field == _NORMALIZER:
            normalizer = dict(_fields(value))
    if not pieces or not trainer:
        raise ValueError("no pieces or no trainer settings in it")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of each field of one protocol buffer message: numbers, 32-bit floats and bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        elif wire == 1:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > len(data):
            raise ValueError("it ends in the middle of a field")
        yield field, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
