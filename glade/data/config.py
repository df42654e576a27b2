"""The settings of data: the `data` section of a training run, and those of `glade prepare`, which that verb runs."""

from dataclasses import dataclass

from glade.config import REQUIRED, setting
from glade.data.prepare import prepare, prepare_cached
from glade.data.prepared import Prepared
from glade.errors import ConfigError

_CORPUS = (
    "builtin, shakespeare, bible, stories[:NUM], a file, folder or glob (.txt .jsonl .parquet .raw .tokens; "
    ".xz .gz .zst), hf:OWNER/NAME[/CONFIG][:SPLIT], or several: 'a*0.7 + b*0.3'"
)
_TOKENIZER = "char, byte, gpt2, mistral, bpe:NUM, a path (tokenizer.json, SentencePiece .model, folder), or a hub name"
_SEPARATOR = "what separates the documents of a .txt: none for <|endoftext|>, blank (lines), line, or any text"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on and is evaluated on."""

    corpus: str = setting("builtin", _CORPUS + "; or a folder that `glade prepare` made")
    tokenizer: str = setting("char", _TOKENIZER)
    context: int = setting(256, "tokens in a training window")
    text_field: str = setting("text", "field of a JSON line, or column of a table, that holds the text")
    separator: str | None = setting(None, _SEPARATOR)
    heldout: float = setting(0.05, "share of the corpus to hold out, by bytes")
    heldout_corpus: str | None = setting(None, "a corpus of its own to hold out, in place of a share")
    cache: str | None = setting(None, "folder of prepared corpora; none for $GLADE_CACHE, else ~/.cache/glade")

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"data.context is {self.context}; a window has at least 1 token")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"data.heldout is {self.heldout}; it is a share of the corpus, 0 <= heldout < 1")

    def prepare(self, seed: int, *, progress: bool = True) -> Prepared:
        """The corpus as token stores, prepared into the cache or found there: see `glade.data.prepare`."""
        return prepare_cached(
            self.corpus,
            tokenizer=self.tokenizer,
            text_field=self.text_field,
            separator=self.separator,
            heldout=self.heldout,
            heldout_corpus=self.heldout_corpus,
            seed=seed,
            cache=self.cache,
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """`glade prepare`: a corpus once, into a folder to train from."""

    corpus: str = setting("builtin", _CORPUS)
    out: str = setting(REQUIRED, "the folder to write")
    tokenizer: str = setting("char", _TOKENIZER)
    text_field: str = setting("text", "field of a JSON line, or column of a table, that holds the text")
    separator: str | None = setting(None, _SEPARATOR)
    heldout: float = setting(0.05, "share of the corpus to hold out, by bytes")
    heldout_corpus: str | None = setting(None, "a corpus of its own to hold out, in place of a share")
    seed: int = setting(0, "chooses the held-out documents")
    overwrite: bool = setting(False, "replace a folder that was prepared from something else")

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}; it is a share of the corpus, 0 <= heldout < 1")


def run_prepare(config: PrepareConfig) -> Prepared:
    """The verb `glade prepare`: makes the folder, or finds it made, and prints what is in it.

    Raises:
        DataError: the corpus or tokenizer cannot be used, or the folder holds something else.
    """
    prepared = prepare(
        config.corpus,
        config.out,
        tokenizer=config.tokenizer,
        text_field=config.text_field,
        separator=config.separator,
        heldout=config.heldout,
        heldout_corpus=config.heldout_corpus,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    print(summary(prepared))
    return prepared


def summary(prepared: Prepared) -> str:
    """What a prepared folder holds, a line a split, then where it is and how to train from it."""
    lines = []
    for name, store in (("train", prepared.train), ("held-out", prepared.heldout)):
        lines.append(
            f"{name:9}{store.num_documents:>10,} documents {store.num_tokens:>14,} tokens "
            f"{store.num_words:>14,} words {store.num_bytes:>15,} bytes"
        )
    lines += [f"vocabulary {prepared.tokenizer.vocab_size:,} ({prepared.info['settings']['tokenizer']})"]
    lines += [f"note: {note}" for note in prepared.info["notes"]]
    lines += [f"credit: {credit}" for credit in prepared.info["credits"]]
    lines += [f"in {prepared.folder}; train from it with: glade train --data.corpus={prepared.folder}"]
    return "\n".join(lines)
