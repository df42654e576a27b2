"""A model with a tokenizer, in a checkpoint folder, for tests of what compares two of them."""

from collections.abc import Callable

import pytest
import torch

from glade.data.templates import TEMPLATES
from glade.data.tokenizer import Tokenizer
from glade.model import LanguageModel, ModelConfig

MakeCheckpoint = Callable[..., str]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint(name, seed, text) -> the folder of a small model over bytes, or over the characters of `text`."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str, seed: int, text: str | None = None, chat: bool = False) -> str:
        tokenizer = Tokenizer.build("byte") if text is None else Tokenizer.build("char", [text])
        tokenizer.chat_template = TEMPLATES["plain"] if chat else None
        torch.manual_seed(seed)
        config = ModelConfig(mixer="gla", vocab_size=tokenizer.vocab_size, dim=16, num_layers=1, init_std=0.3)
        path = folder / name
        LanguageModel(config).save_pretrained(path, tokenizer)
        return str(path)

    return make
