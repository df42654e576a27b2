"""A prompt that is read once and forked equals running it whole with each answer, gradients of everything included."""

import pytest
import torch

from glade.model.config import MIXERS, ModelConfig
from glade.model.lm import LanguageModel
from glade.train.shared_prompt import pack, sum_by_answer, token_log_probs

VOCAB = 50


def two_layers(layers, **options):
    torch.manual_seed(0)
    if layers != "rnn":
        options = {"num_heads": 2, **options}
    model = LanguageModel(ModelConfig(layers=layers, num_layers=2, dim=32, vocab_size=VOCAB, **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # biases and gates start at values where a wrong gradient could be zero by chance
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pairs(*lengths):
    """(prompt, chosen, rejected) of random ids for each (|prompt|, |chosen|, |rejected|)."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(VOCAB, (n,), generator=generator).tolist() for n in three] for three in lengths]


# prompts of a single token, longer than a chunk and than the window, answers of a single token, and a repeated prompt
MIXED = pairs((1, 3, 5), (9, 1, 7), (70, 4, 66), (2, 6, 2))
MIXED.append([MIXED[2][0], [3, 1], [4, 1, 5]])


def apart(model, pair_list):
    """[A] log-probabilities of the answers, each run with its own copy of the prompt."""
    out = []
    for prompt, *answers in pair_list:
        for answer in answers:
            ids = torch.tensor([prompt + answer])
            targets = torch.full((1, ids.shape[1] - 1), -1)
            targets[0, len(prompt) - 1 :] = torch.tensor(answer)
            losses, _ = model(ids[:, :-1], targets=targets)
            out.append(-losses.sum())
    return torch.stack(out)


def shared(model, pair_list):
    packed = pack([p for p, *answers in pair_list for _ in answers], [a for _, *answers in pair_list for a in answers])
    log_probs, _ = token_log_probs(model, packed)
    return sum_by_answer(log_probs, packed.borders)


def gradients(model, function, pair_list):
    model.zero_grad()
    log_probs = function(model, pair_list)
    chosen, rejected = log_probs.view(-1, 2).unbind(1)
    (-torch.nn.functional.logsigmoid(0.3 * (chosen - rejected + 1)).sum() - 0.1 * chosen.sum()).backward()
    return log_probs.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "layers, options",
    [(mixer, {}) for mixer in MIXERS if mixer != "swa"]
    + [
        ("swa", {"window": 16}),
        ("softmax", {"num_kv_heads": 1, "learned_positions": 200, "rope": False}),
        ("gdn2 swa", {"window": 5}),
        ("gla softmax", {}),
        ("kda rnn", {}),
    ],
)
def test_gradients_flow_through_the_shared_prompt(layers, options):
    model = two_layers(layers, **options)
    expected, expected_gradients = gradients(model, apart, MIXED)
    got, got_gradients = gradients(model, shared, MIXED)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-12)
    for name, gradient in expected_gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("layers", ["gdn2", "softmax", "rnn", "swa"])
def test_prompts_of_one_token_leave_nothing_to_read(layers):
    model = two_layers(layers)
    pair_list = pairs((1, 3, 5), (1, 2, 1))
    expected, expected_gradients = gradients(model, apart, pair_list)
    got, got_gradients = gradients(model, shared, pair_list)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-12)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-12, atol=1e-12)


def test_equal_prompts_are_read_once():
    packed = pack([[1, 2, 3], [1, 2, 3], [1, 4], [1, 2, 3]], [[5], [6, 7], [8], [9]])
    assert packed.prompt_ids.tolist() == [[1, 2, 1]]
    assert packed.prompt_borders.tolist() == [0, 2, 3]
    assert packed.prompt_of.tolist() == [0, 0, 1, 0]
    assert packed.ids.tolist() == [[3, 3, 6, 4, 3]]
    assert packed.targets.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.borders.tolist() == [0, 1, 3, 4, 5]
    assert packed.num_tokens == 8


def test_reading_only_gives_the_same_state():
    model = two_layers("gdn2 softmax").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    _, state = model(ids)
    nothing, read = model(ids, logits="none")
    assert nothing.shape == (1, 0, VOCAB)
    for layer, expected in zip(read.layers, state.layers, strict=True):
        for x, y in zip(layer, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_experts_balance_their_load_over_both_halves():
    model = two_layers("gla", ffn="moe", num_experts=4, load_balance=0.5)
    packed = pack([[1, 2, 3, 4]] * 2, [[5, 6], [7]])
    _, load_balance = token_log_probs(model, packed)
    assert load_balance is not None and load_balance.requires_grad and load_balance.item() > 0
