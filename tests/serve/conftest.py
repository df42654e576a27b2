"""Servers on loopback with tiny models: what the tests of this folder talk to."""

import shutil
import string
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from openai import OpenAI
from playwright.sync_api import sync_playwright

from glade.data.tokenizer import Tokenizer
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.serve.api import create_app
from glade.serve.config import ServeSettings
from glade.serve.served import Served, serve_model
from glade.serve.server import listen, make_server

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Running(NamedTuple):
    """A server that answers: where, and what it serves."""

    url: str
    port: int
    models: dict[str, Served]

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def idle(self, model: str, seconds: float = 10.0) -> bool:
        """Whether all slots of the model's engine are free, or become so in time."""
        return wait_until(lambda: _at_rest(self.models[model]), seconds)


def _at_rest(served: Served) -> bool:
    stats = served.engine.stats()
    return not (stats.running or stats.waiting or stats.prefilling)


def wait_until(holds: Any, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def tiny_model(template: str | None = None, *, seed: int = 0, mixer: str = "gdn2") -> LanguageModel:
    """A model that says various things (wide weights, no tied head): of characters, or, with a template, of bytes."""
    if template is None:
        tokenizer = Tokenizer.build("char", [string.printable + "é漢🙂"])
    else:
        tokenizer = Tokenizer.build("byte")
        tokenizer.model.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>"])
        tokenizer = Tokenizer(tokenizer.model, eos=tokenizer.eos, chat_template=template)
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, dim=32, init_std=0.3, tie_embeddings=False, mixer=mixer
    )
    model: Any = LanguageModel(config).eval()
    model.tokenizer = tokenizer
    return model


def served(name: str, model: LanguageModel, folder: Path, settings: ServeSettings) -> Served:
    return serve_model(name, folder, model, settings)


@contextmanager
def running(folder: Path, *, models: dict[str, LanguageModel] | None = None, **settings: Any) -> Iterator[Running]:
    """A server with the given settings until the block ends; default: `base`, and `chat` with a chat template."""
    chosen = ServeSettings(**({"port": 0, "ui": False, "shutdown_seconds": 1.0} | settings))
    given = models or {"base": tiny_model(), "chat": tiny_model(TEMPLATE)}
    ready = {name: served(name, model, folder, chosen) for name, model in given.items()}
    with listen(chosen) as listener:
        server = make_server(create_app(ready, chosen), chosen)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert wait_until(lambda: server.started or not thread.is_alive())
            port = listener.getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", port, ready)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("served")) as here:
        yield here


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., AbstractContextManager[Running]]:
    """`running` for tests that need settings or models of their own."""
    return partial(running, tmp_path)


@pytest.fixture(scope="session")
def session_start() -> Callable[..., AbstractContextManager[Running]]:
    """`running`, for servers that several tests share."""
    return running


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A headless Chromium of this machine; tests that need one are skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs Chromium on this machine: none of {', '.join(names)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    return tiny_model


@pytest.fixture
def until() -> Callable[..., bool]:
    return wait_until


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
