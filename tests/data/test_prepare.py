"""Prepared folders: the split, what is written, doing nothing twice, crashes, damage, and mixtures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glade.data import prepare as prepare_module
from glade.data.config import DataConfig, PrepareConfig, run_prepare
from glade.data.loader import Batches, heldout_batches
from glade.data.measure import count_words, per_token
from glade.data.prepare import prepare, prepare_cached
from glade.data.prepared import Prepared
from glade.data.split import divide, split_documents
from glade.data.store import TokenStore
from glade.data.synthetic import stories
from glade.data.tokenizer import Tokenizer
from glade.errors import ConfigError, DataError

PARAGRAPHS = [f"Paragraph {i} — of words,\nand a second line.\n\n" for i in range(200)]


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """One long document."""
    path = tmp_path / "novel.txt"
    path.write_text("".join(PARAGRAPHS), encoding="utf-8")
    return path


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def texts_of(prepared: Prepared, store: TokenStore) -> list[str]:
    documents = [store.document(i).tolist() for i in range(store.num_documents)]
    assert all(d[0] == prepared.tokenizer.bos_id and d[-1] == prepared.tokenizer.eos_id for d in documents)
    return [prepared.tokenizer.decode(d) for d in documents]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:400"])
def test_every_text_is_in_one_split(tmp_path: Path, tokenizer: str) -> None:
    prepared = prepare("stories:300", tmp_path / "p", tokenizer=tokenizer, heldout=0.1)
    train, heldout = texts_of(prepared, prepared.train), texts_of(prepared, prepared.heldout)
    assert sorted(train + heldout) == sorted(stories(300)) and not set(train) & set(heldout)
    assert 0.08 < sum(map(len, heldout)) / sum(map(len, train + heldout)) < 0.12
    for store, texts in ((prepared.train, train), (prepared.heldout, heldout)):
        assert store.bytes.tolist() == [len(t.encode()) for t in texts]
        assert store.words.tolist() == [len(t.split()) for t in texts]
    prepared.verify()
    other = prepare("stories:300", tmp_path / "q", tokenizer=tokenizer, heldout=0.1, seed=1)
    assert set(texts_of(other, other.heldout)) != set(heldout)


def test_one_document_is_divided_where_a_paragraph_ends(
    novel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(str(novel), tmp_path / "p")
    (head,), (tail,) = texts_of(prepared, prepared.train), texts_of(prepared, prepared.heldout)
    assert head + tail == "".join(PARAGRAPHS) and head.endswith("\n\n")
    assert 0.04 < len(tail) / len(head + tail) < 0.06
    (note,) = prepared.info["notes"]
    assert "the last 5.0% of it is held out" in note and note in capsys.readouterr().err


def test_copies_of_a_heldout_document_are_not_trained_on(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl", [*stories(50), *stories(50), *stories(50)])
    prepared = prepare(str(path), tmp_path / "p", heldout=0.1)
    train, heldout = texts_of(prepared, prepared.train), texts_of(prepared, prepared.heldout)
    assert heldout and not set(train) & set(heldout) and set(train) | set(heldout) == set(stories(50))
    assert any("left out of training" in note for note in prepared.info["notes"])
    with pytest.raises(DataError, match="none is left to train on"):
        prepare("stories:5", tmp_path / "q", heldout_corpus="stories:9")


def test_heldout_corpus_of_its_own(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "held.jsonl", ["ωmega only here.", *stories(3)])
    prepared = prepare("stories:40", tmp_path / "p", heldout_corpus=str(path))
    assert texts_of(prepared, prepared.heldout) == ["ωmega only here.", *stories(3)]
    assert texts_of(prepared, prepared.train) == list(stories(40))[3:]


def test_no_heldout(tmp_path: Path) -> None:
    prepared = prepare("stories:5", tmp_path / "p", heldout=0)
    assert (prepared.train.num_documents, prepared.heldout.num_documents) == (5, 0)
    with pytest.raises(DataError, match="heldout"):
        next(heldout_batches(prepared.heldout, 8, 16))


def test_bpe_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    prepared = prepare("stories:60", tmp_path / "p", tokenizer="bpe:500", heldout=0.3)
    train = texts_of(prepared, prepared.train)
    assert prepared.tokenizer.digest() == Tokenizer.build("bpe:500", train).digest()
    assert prepared.tokenizer.digest() != Tokenizer.build("bpe:500", stories(60)).digest()


def test_sizes_of_the_token_type(tmp_path: Path) -> None:
    assert prepare("stories:5", tmp_path / "a").info["dtype"] == "<u2"
    text = "".join(chr(c) for c in range(0x20, 0x11500) if not 0xD800 <= c < 0xE000)
    wide = prepare(str(write_documents(tmp_path / "wide.jsonl", [text, "b", "c"])), tmp_path / "b", heldout=0)
    assert wide.info["dtype"] == "<u4" and texts_of(wide, wide.train) == [text, "b", "c"]


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer.build("char", stories(100))
    prepared = prepare("stories:3", tmp_path / "p", tokenizer=tokenizer, heldout=0)
    assert prepared.tokenizer.digest() == tokenizer.digest()
    with pytest.raises(DataError, match="character"):
        prepare("stories:3", tmp_path / "q", tokenizer=Tokenizer.build("char", ["abc"]))
    assert not list(tmp_path.glob("*q*")) and not list(tmp_path.glob(".*"))


def test_a_second_time_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare("stories:30", tmp_path / "p")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "p").iterdir()}
    monkeypatch.setattr(prepare_module, "_encode", None)
    again = prepare("stories:30", tmp_path / "p")
    assert again.info == first.info and before == {f: f.stat().st_mtime_ns for f in (tmp_path / "p").iterdir()}
    # the same text from elsewhere is the same corpus
    path = write_documents(tmp_path / "copy.jsonl", list(stories(30)))
    assert prepare(str(path), tmp_path / "p").info == first.info


def test_other_inputs_need_overwrite(tmp_path: Path) -> None:
    prepare("stories:30", tmp_path / "p")
    for changed in ({"seed": 1}, {"heldout": 0.2}, {"tokenizer": "byte"}):
        with pytest.raises(DataError, match="prepared from 'stories:30'"):
            prepare("stories:30", tmp_path / "p", **changed)
    replaced = prepare("stories:31", tmp_path / "p", overwrite=True)
    assert replaced.train.num_documents + replaced.heldout.num_documents == 31
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="no prepared data"):
        prepare("stories:30", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("stories:30", tmp_path / "p")
    content = {f.name: f.read_bytes() for f in (tmp_path / "p").iterdir() if f.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_text", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        prepare("stories:31", tmp_path / "p", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    assert content == {f.name: f.read_bytes() for f in (tmp_path / "p").iterdir() if f.is_file()}


def test_the_old_folder_comes_back_if_the_new_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare("stories:30", tmp_path / "p").info
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        prepare("stories:31", tmp_path / "p", overwrite=True)
    assert Prepared.open(tmp_path / "p").info == before and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_corpus_that_changes_between_readings_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_documents(tmp_path / "a.jsonl", list(stories(5)))
    planned = prepare_module.plan

    def change(*arguments: object) -> object:
        write_documents(path, list(stories(5, seed=1)))
        return planned(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(prepare_module, "plan", change)
    with pytest.raises(DataError, match=r"a\.jsonl:1: changed"):
        prepare(str(path), tmp_path / "p")


def test_damage_is_found(tmp_path: Path) -> None:
    def broken(name: str, change: bytes | None) -> str:
        folder = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        prepare("stories:30", folder)
        if change is None:
            (folder / name).unlink()
        else:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(
                data[: len(data) - 7] if change == b"cut" else change * (len(data) // len(change))
            )
        with pytest.raises(DataError) as error:
            Prepared.open(folder).verify()
        return str(error.value)

    assert "bytes, not" in broken("train-00000.bin", b"cut")
    assert "bytes, not" in broken("heldout-00000.token_bytes", b"cut")
    assert "missing" in broken("train-00000.idx", None)
    assert "offsets" in broken("heldout-00000.idx", b"\x01\0\0\0\0\0\0\0")
    assert "not what was written" in broken("heldout-00000.bin", b"\x01\0")
    assert "not valid JSON" in broken("prepared.json", b"cut")
    assert "no such file" in broken("tokenizer/tokenizer.json", None)
    shutil.copytree(prepare("stories:30", tmp_path / "whole").folder, tmp_path / "swapped")
    Tokenizer.build("byte").save(tmp_path / "swapped" / "tokenizer")
    with pytest.raises(DataError, match="tokenizer: 257 entries, not"):
        Prepared.open(tmp_path / "swapped")
    with pytest.raises(DataError, match="glade prepare"):
        Prepared.open(tmp_path)
    (tmp_path / "prepared.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99 is not 1"):
        Prepared.open(tmp_path)


def test_mixture_stays_apart(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "b.jsonl", [f"Another text, number {i}." for i in range(100)])
    prepared = prepare(f"stories:100*0.75 + {path}*0.25", tmp_path / "p", heldout=0.1)
    (a, first), (b, second) = prepared.mixture
    assert (float(first), float(second)) == (0.75, 0.25)
    assert set(texts_of(prepared, a)) < set(stories(100))
    assert all(t.startswith("Another") for t in texts_of(prepared, b)) and b.num_documents == 90
    assert a.num_documents + b.num_documents == prepared.train.num_documents
    heldout = texts_of(prepared, prepared.heldout)
    assert sum(t.startswith("Another") for t in heldout) == 10 and len(heldout) > 15
    batches = Batches(prepared.mixture, context=32, batch_tokens=64, seed=0)
    tokens = [prepared.tokenizer.decode(batches.batch(s).ids[0].tolist()) for s in range(40)]
    assert sum("number" in t for t in tokens) == 10
    pool = prepare(f"stories:100 + {path}", tmp_path / "q")
    assert len(pool.mixture) == 1 and pool.mixture[0][0] is pool.train


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_cached("stories:20", cache=tmp_path / "c")
    assert first.folder.parent == tmp_path / "c" and first.folder.name.startswith("stories-20-")
    assert prepare_cached("stories:20", cache=tmp_path / "c").folder == first.folder
    assert prepare_cached("stories:20", tokenizer="byte", cache=tmp_path / "c").folder != first.folder
    monkeypatch.setenv("GLADE_CACHE", str(tmp_path / "env"))
    assert DataConfig(corpus="stories:20").prepare(seed=0).folder == tmp_path / "env" / first.folder.name


def test_prepared_folder_as_a_corpus(tmp_path: Path) -> None:
    prepare("stories:20", tmp_path / "p", tokenizer="byte", heldout=0.2)
    opened = prepare_cached(str(tmp_path / "p"), cache=tmp_path / "c")
    assert opened.folder == tmp_path / "p" and not (tmp_path / "c").exists()
    assert prepare_cached(str(tmp_path / "p"), tokenizer="byte", heldout=0.2).info == opened.info
    with pytest.raises(DataError, match="tokenizer='byte', not 'gpt2'"):
        prepare_cached(str(tmp_path / "p"), tokenizer="gpt2")


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_prepare(PrepareConfig(corpus="stories:40", out=str(tmp_path / "p")))
    out = capsys.readouterr().out
    assert "38 documents" in out and "vocabulary" in out and f"--data.corpus={tmp_path / 'p'}" in out
    with pytest.raises(ConfigError, match=r"heldout is 1\.0"):
        PrepareConfig(out="x", heldout=1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        DataConfig(context=0)
    with pytest.raises(ConfigError, match="heldout is -1"):
        prepare("stories:5", tmp_path / "q", heldout=-1)


def test_too_short_to_divide(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(DataError, match="too short to hold a part out"):
        prepare(str(path), tmp_path / "p")


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60), share=st.floats(0.01, 0.6), seed=st.integers(0, 5)
)
def test_split_holds_out_about_the_share(sizes: list[int], share: float, seed: int) -> None:
    array = np.array(sizes, np.int64)
    split = split_documents(array, share, seed)
    wanted = share * sum(sizes)
    if split.divided is None:
        assert abs(array[split.held].sum() - wanted) <= 0.5 * wanted and not split.held.all()
    else:
        assert not split.held.any() and 0 < split.share < 1
        assert sizes[split.divided] * split.share == pytest.approx(wanted)
    again = split_documents(array, share, seed)
    assert (again.held == split.held).all() and again.divided == split.divided


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab \n"), min_size=2), share=st.floats(0.01, 0.99))
def test_divide_loses_nothing(text: str, share: float) -> None:
    head, tail = divide(text, share)
    assert head + tail == text


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=50)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_sizes_per_token_add_up(text: str) -> None:
    ids, ends = Tokenizer.build("byte").encode_with_ends(text)
    num_bytes, num_words = per_token(text, ends)
    assert len(num_bytes) == len(num_words) == len(ids)
    assert (num_bytes.sum(), num_words.sum()) == (len(text.encode()), count_words(text))
    if text.isascii():
        assert num_bytes.tolist() == [1] * len(text)


def test_sizes_of_a_part_are_those_of_its_text(tmp_path: Path) -> None:
    text = "Caffè für fünf — und 狐 dazu.  Ende\n" * 5
    tokenizer = Tokenizer.build("bpe:270", [text])
    _, ends = tokenizer.encode_with_ends(text)
    num_bytes, num_words = per_token(text, ends)
    for part in (3, 11, 40):
        prefix = text[: ends[part - 1]]
        assert num_bytes[:part].sum() == len(prefix.encode()) and num_words[:part].sum() == len(prefix.split())


def test_heldout_counts_of_real_text(tmp_path: Path) -> None:
    prepared = prepare("stories:60", tmp_path / "p", tokenizer="bpe:600", heldout=0.3)
    batches = list(heldout_batches(prepared.heldout, 32, 128))
    assert sum(b.num_targets for b in batches) == prepared.heldout.num_pairs
    assert sum(b.num_bytes or 0 for b in batches) == prepared.heldout.num_bytes
    assert sum(b.num_words or 0 for b in batches) == prepared.heldout.num_words
    for batch in batches:
        kept = batch.targets[0][batch.targets[0] >= 0].tolist()
        assert batch.num_bytes == len(prepared.tokenizer.decode(kept).encode())
