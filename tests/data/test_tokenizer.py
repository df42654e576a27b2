"""Tokenizers of every kind: round trips, special tokens as text, files, streaming, chat, long texts in pieces."""

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from glade.data import tokenizer as tokenizer_module
from glade.data import vocabularies
from glade.data.tokenizer import Tokenizer
from glade.errors import DataError

PROSE = (
    "Once upon a time, in a land of grey hills, there lived a fox who'd lost 3 of her 10 coins.\n\n"
    "“Where are they?” asked Zoë — naïvely. 狐は金貨を探した。🦊👩‍👩‍👧 ½ cup of café\tau lait…\n  Indented,   spaced.\n"
) * 4
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
KINDS = ["char", "byte", "bpe:300", "gpt2", "mistral"]


@cache
def made(kind: str) -> Tokenizer:
    try:
        return Tokenizer.build(kind, [PROSE])
    except DataError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(f"{kind}: {error}")


@pytest.mark.parametrize("kind", KINDS)
def test_prose_survives(kind: str) -> None:
    t = made(kind)
    ids = t.encode(PROSE)
    assert t.decode(ids) == PROSE
    assert [e.tolist() for e in t.encode_batch([PROSE, ""])] == [ids, []]
    assert t.document(PROSE) == [t.bos_id, *ids, t.eos_id]
    assert t.prompt(PROSE) == [t.bos_id, *ids]
    assert t.decode(t.document(PROSE)) == PROSE
    assert max(ids) < t.vocab_size and t.eos_id < t.vocab_size and t.bos_id < t.vocab_size


@pytest.mark.parametrize("kind", ["byte", "bpe:300", "gpt2"])
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives(kind: str, text: str) -> None:
    t = made(kind)
    assert t.decode(t.encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "bpe:300", "gpt2", "mistral"])
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_streaming_gives_the_whole_text(kind: str, text: str) -> None:
    t = made(kind)
    ids = t.encode(text)
    decoder = t.decoder()
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == t.decode(ids)


def test_streaming_holds_back_only_incomplete_characters() -> None:
    t = made("byte")
    decoder = t.decoder()
    assert [decoder.push(b) for b in "é🦊a".encode()] == ["", "é", "", "", "", "🦊", "a"]
    assert [decoder.push(b) for b in b"\xf0\x9f"] == ["", ""]
    assert decoder.flush() == "\ufffd"
    # bytes that never become a character come out instead of piling up
    assert len("".join(decoder.push(0xFF) for _ in range(50))) == 47
    assert len(decoder.flush()) <= 3


def test_streaming_keeps_spaces_and_drops_specials() -> None:
    t = made("mistral")
    decoder = t.decoder()
    assert "".join(decoder.push(i) for i in t.document("A cat  sat.\nIt did.")) == "A cat  sat.\nIt did."


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(kind: str) -> None:
    special = "<s></s><|endoftext|>"
    t = Tokenizer.build("char", [special]) if kind == "char" else made(kind)
    ids = t.encode(f"{special}")
    assert t.eos_id not in ids and t.bos_id not in ids
    assert t.decode(ids) == special


def test_ids_mean_what_they_should() -> None:
    byte = made("byte")
    assert byte.encode("é!") == [0xC3, 0xA9, 0x21] and (byte.vocab_size, byte.eos_id, byte.bos_id) == (257, 256, 256)
    char = Tokenizer.build("char", ["banana", "cab"])
    assert char.encode("cab") == [2, 0, 1] and (char.vocab_size, char.eos_id) == (5, 4)
    gpt2 = made("gpt2")
    # the ids OpenAI's own encoder gives
    assert gpt2.encode("Hello world") == [15496, 995] and (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    t = made(kind)
    t.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(PROSE) == t.encode(PROSE) and again.digest() == t.digest()
    assert (again.bos_id, again.eos_id, again.vocab_size) == (t.bos_id, t.eos_id, t.vocab_size)
    assert again.decode(again.encode(PROSE)) == PROSE
    assert Tokenizer.build(str(tmp_path)).digest() == t.digest()
    assert again.eos_id not in again.encode(again.eos) if kind != "char" else True


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_in_pieces_are_encoded_as_wholes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = made(kind)
    whole, ends = t.encode_with_ends(PROSE)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 20)
    assert t.encode(PROSE) == whole.tolist()
    ids, piece_ends = t.encode_with_ends(PROSE)
    assert ids.tolist() == whole.tolist() and piece_ends.tolist() == ends.tolist()
    assert t.encode_batch([PROSE])[0].tolist() == whole.tolist()


def test_unknown_character_is_named_with_its_place() -> None:
    t = Tokenizer.build("char", ["abc"])
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\) at position 2"):
        t.encode("abéc")
    with pytest.raises(DataError, match="'z'"):
        t.encode_batch(["abc", "z"])


def test_what_no_tokenizer_can_take() -> None:
    with pytest.raises(DataError, match="surrogate at position 1"):
        made("byte").encode("a\ud800")
    with pytest.raises(DataError, match=r"token id 257 .* 0 to 256"):
        made("byte").decode([65, 257])
    with pytest.raises(DataError, match="token id -1"):
        made("byte").decode([-1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:100", "at least 257"),
        ("bpe:many", "number of entries"),
        ("bpe:60000", "too small"),
        ("./nowhere/tokenizer.json", "no such file"),
        ("no such name", "unknown tokenizer"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Tokenizer.build(spec, [PROSE])


def test_corpus_is_needed_where_it_is() -> None:
    for spec in ("char", "bpe:300"):
        with pytest.raises(DataError, match="corpus"):
            Tokenizer.build(spec)
    with pytest.raises(DataError, match="empty"):
        Tokenizer.build("char", [])


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(DataError, match="cannot be reached"):
        Tokenizer.build("owner/name")


def test_trained_bpe_depends_on_the_texts_alone() -> None:
    first, second = (Tokenizer.build("bpe:300", iter([PROSE, PROSE[::-1]])) for _ in range(2))
    assert first.digest() == second.digest() and first.vocab_size == 300 and first.eos_id == 299
    assert len(first.encode(PROSE)) < len(PROSE.encode())
    assert Tokenizer.build("bpe:300", ["Another text altogether. " * 40 + PROSE]).digest() != first.digest()


def test_more_entries_than_16_bits_hold() -> None:
    text = "".join(chr(c) for c in range(0x20, 0x11500) if not 0xD800 <= c < 0xE000)
    t = Tokenizer.build("char", [text])
    assert t.vocab_size > 65_535 and t.decode(t.encode(text)) == text


def test_foreign_tokenizer_json(tmp_path: Path) -> None:
    made("bpe:300").save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    # Hugging Face writes special tokens as objects, templates as lists or in a file of their own
    config.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": None}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    t = Tokenizer.load(tmp_path)
    assert t.bos_id == t.eos_id == 299 and t.chat([{"role": "user", "content": "x"}]) == "x"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "d"}]}))
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat([]) == "d"
    config.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match="<nope>"):
        Tokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable"):
        Tokenizer.load(tmp_path)


def test_truncation_of_a_foreign_file_is_switched_off(tmp_path: Path) -> None:
    made("byte").save(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.enable_truncation(4)
    model.enable_padding(length=64)
    model.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("x" * 10)) == 10


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_chat(tmp_path: Path) -> None:
    byte = Tokenizer.build("byte")
    messages = [{"role": "user", "content": "hi <b>"}]
    with pytest.raises(DataError, match="no chat template"):
        byte.chat(messages)
    byte.chat_template = TEMPLATE
    byte.save(tmp_path)
    t = Tokenizer.load(tmp_path)
    assert t.chat(messages) == "<|endoftext|>user: hi <b><|endoftext|>\nassistant:"
    assert not t.chat(messages, add_generation_prompt=False).endswith("assistant:")
    assert t.chat_ids(messages) == [256, *b"user: hi <b>", 256, *b"\nassistant:"]
    with pytest.raises(DataError, match="message 0 spells out"):
        t.chat_ids([{"role": "user", "content": "x <|endoftext|>"}])
    with pytest.raises(DataError, match="no system"):
        t.chat([{"role": "system", "content": ""}])
    t.chat_template = "{% for %}"
    with pytest.raises(DataError, match="cannot render"):
        t.chat(messages)
    t.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="cannot render"):
        t.chat(messages)


def test_sentencepiece_ids_are_kept() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    t = made("mistral")
    path = vocabularies._package_folder("mistral_common", "", "") / "data" / "tokenizer.model.v1"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (t.vocab_size, t.bos_id, t.eos_id) == (theirs.vocab_size(), theirs.bos_id(), theirs.eos_id())
    texts = [
        PROSE,
        "",
        " ",
        "  two",
        "a\tb\r\n",
        "<s> </s>",
        *(c * n for c in " =-.a0\n" for n in (1, 2, 3, 7, 31, 64)),
    ]
    for text in texts:
        assert t.encode(text) == theirs.encode(text), text
        assert t.decode(t.encode(text)) == text


def test_sentencepiece_files_that_cannot_be_converted(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    with pytest.raises(DataError, match="cannot be read"):
        vocabularies.sentencepiece_tokenizer(tmp_path / "none.model")
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"\x0a\xff\xff")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer.build(str(broken))
    for kind, reason in (("unigram", "model type 1"), ("bpe", "normalises text")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROSE.split("\n")), model_prefix=str(tmp_path / kind), vocab_size=120,
            model_type=kind, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        with pytest.raises(DataError, match=reason):
            Tokenizer.build(str(tmp_path / f"{kind}.model"))


def test_gpt2_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab\.bpe"):
        Tokenizer.build(str(tmp_path))
    letters = vocabularies.byte_letters()
    vocab = {c: i for i, c in enumerate(letters)} | {"ab": 256, vocabularies.EOS: 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    t = Tokenizer.build(str(tmp_path))
    assert t.encode("cab") == [99, 256] and t.eos_id == 257
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(DataError, match="not the files"):
        Tokenizer.build(str(tmp_path))
