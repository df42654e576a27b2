"""Held-out measures: sums over tokens, whatever the batches."""

import math

import pytest
import torch

from glade.data.config import DataConfig
from glade.data.loader import heldout_batches
from glade.evals.perplexity import LOGITS_LIMIT, heldout_batch_tokens, perplexity
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return DataConfig(corpus="stories:30", heldout=0.3, cache=str(tmp_path_factory.mktemp("cache"))).prepare(0)


@pytest.fixture
def model(prepared):
    return LanguageModel(ModelConfig(vocab_size=prepared.tokenizer.vocab_size, dim=16, num_layers=1, dropout=0.5))


def test_equals_every_document_by_itself(prepared, model):
    context = 10_000
    found = perplexity(model, heldout_batches(prepared.heldout, context=context, batch_tokens=2 * context))
    nats = tokens = correct = 0
    model.eval()
    for i in range(prepared.heldout.num_documents):
        ids = torch.from_numpy(prepared.heldout.document(i).astype("int64"))[None]
        with torch.no_grad():
            logits = model(ids[:, :-1])[0].double()
        nats += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        correct += (logits.argmax(-1) == ids[:, 1:]).sum().item()
        tokens += ids.shape[1] - 1
    assert found.tokens == tokens == prepared.heldout.num_pairs
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert abs(found.correct - correct) <= 2
    text = found.to_dict()
    assert text["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert text["bits_per_byte"] == pytest.approx(nats / math.log(2) / prepared.heldout.num_bytes, rel=1e-5)
    assert text["word_perplexity"] == pytest.approx(math.exp(nats / prepared.heldout.num_words), rel=1e-4)


def test_does_not_depend_on_the_batches_and_leaves_the_mode(prepared, model):
    model.train()
    results = [
        perplexity(model, heldout_batches(prepared.heldout, context=64, batch_tokens=size)) for size in (64, 192, 1024)
    ]
    assert model.training
    assert len({r.tokens for r in results}) == 1 and len({(r.bytes, r.words) for r in results}) == 1
    assert results[0].nats == pytest.approx(results[1].nats, rel=1e-6) == pytest.approx(results[2].nats, rel=1e-6)


def test_a_part_scores_as_many_tokens_as_asked(prepared, model):
    found = perplexity(model, heldout_batches(prepared.heldout, context=64, batch_tokens=256, max_tokens=333))
    assert found.tokens == 333 and 0 < found.words < found.bytes <= 333


def test_batches_keep_the_logits_small():
    assert heldout_batch_tokens(256, 4096, 85) == 4096
    assert heldout_batch_tokens(64, 65536, 32000) * 32000 <= LOGITS_LIMIT
    assert heldout_batch_tokens(64, 65536, 32000) % 64 == 0
    assert heldout_batch_tokens(4096, 8192, 500_000) == 4096
