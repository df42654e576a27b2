"""Pieces of prompts filled up to one of few sizes leave the states that each leaves alone; recorded on a GPU, too."""

import pytest
import torch

from glade.infer.captured.graphs import Graphs
from glade.infer.pieces import MOST_DOCUMENTS, Pieces
from glade.infer.rows import growing_layers
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel

gpu = pytest.mark.gpu
VOCAB = 61


def model_of(mixer, dim=32, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    options = {"mixer": mixer} if " " not in mixer else {"layers": mixer, "window": 6}
    options |= {} if mixer == "rnn" else {"num_heads": 2}
    model = LanguageModel(ModelConfig(num_layers=2, dim=dim, vocab_size=VOCAB, **options))
    return model.to(device, dtype).eval()


def piece(n, seed):
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, ids, state):
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.embed.weight.device), state, logits="none")[1]


def assert_like(found, right, **tolerance):
    assert found.position.equal(right.position)
    for layer, other in zip(found.layers, right.layers, strict=True):
        for name, x in layer._asdict().items():
            torch.testing.assert_close(x, getattr(other, name), **tolerance)


def reader_of(model):
    """One that fills up as on a GPU; on the CPU its recordings are calls."""
    reader = Pieces(model, growing_layers(model))
    reader._graphs = reader._graphs or Graphs(model.embed.weight.device)
    return reader


@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "gla", "gdn swa"])
def test_states_are_those_of_each_piece_alone(mixer):
    model = model_of(mixer)
    reader = reader_of(model)
    before = alone(model, piece(9, 0), None)
    kept = before.clone()
    for turn in range(3):
        pieces = [piece(5, turn + 1), piece(40, turn + 2), piece(1, turn + 3)][: 1 + turn]
        given = [before, None, before][: 1 + turn]
        for found, ids, state in zip(reader.read(pieces, given), pieces, given, strict=True):
            assert_like(found, alone(model, ids, state), rtol=1e-4, atol=1e-5)
    assert_like(before, kept, rtol=0, atol=0)


def test_what_was_answered_stays_as_it_is():
    model = model_of("gdn")
    reader = reader_of(model)
    found = [reader.read([piece(7, seed)], [None])[0] for seed in range(4)]
    for seed, state in enumerate(found):
        assert_like(state, alone(model, piece(7, seed), None), rtol=1e-4, atol=1e-5)
    assert len(reader._graphs) == 1


def test_an_unknown_id_is_told_before_a_device_sees_it():
    with pytest.raises(ValueError, match="ids holds 61; the vocabulary has 61 entries"):
        reader_of(model_of("gdn")).read([[1, VOCAB]], [None])


@pytest.mark.parametrize("mixer", ["softmax", "rnn"])
def test_what_grows_or_is_stepped_is_read_as_it_is(mixer):
    model = model_of(mixer)
    reader = Pieces(model, growing_layers(model))
    assert reader._graphs is None
    (found,) = reader.read([piece(7, 1)], [None])
    assert_like(found, alone(model, piece(7, 1), None), rtol=1e-5, atol=1e-6)


@gpu
@pytest.mark.parametrize("mixer", ["gdn", "gdn2", "gla", "gdn swa"])
def test_recorded_on_a_gpu(mixer):
    model = model_of(mixer, dim=256, device="cuda", dtype=torch.bfloat16)
    reader = Pieces(model, growing_layers(model))
    first = [reader.read([piece(300, turn), piece(70, turn + 9)], [None, None]) for turn in range(3)]
    again = [reader.read([piece(300, turn), piece(70, turn + 9)], [None, None]) for turn in range(3)]
    assert len(reader._graphs) == 1
    for turn in range(3):
        for found, replayed, ids in zip(first[turn], again[turn], (piece(300, turn), piece(70, turn + 9)), strict=True):
            assert_like(replayed, found, rtol=0, atol=0)
            assert_like(found, alone(model, ids, None), rtol=2e-2, atol=2e-2)
    (on,) = reader.read([piece(40, 30)], [first[0][0]])
    assert_like(on, alone(model, piece(40, 30), first[0][0]), rtol=2e-2, atol=2e-2)
    many = [piece(8, i) for i in range(MOST_DOCUMENTS)]
    for found, ids in zip(reader.read(many, [None] * len(many)), many, strict=True):
        assert_like(found, alone(model, ids, None), rtol=2e-2, atol=2e-2)
