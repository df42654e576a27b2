"""What the server does with clients that are wrong, slow, too many, or gone: raw HTTP, no client library errs so."""

import base64
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from glade.errors import ConfigError
from glade.serve import served as loading
from glade.serve.config import ServeConfig, ServeSettings
from glade.serve.server import listen

LONG: dict[str, Any] = {"model": "base", "prompt": "a", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer, once it has OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    return error


def exchange(port: int, *pieces: bytes, seconds: float = 10.0) -> bytes:
    """What a server answers to bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as s:
        for piece in pieces:
            s.sendall(piece)
        received = b""
        while chunk := s.recv(65536):
            received += chunk
        return received


def running_requests(server: Any) -> int:
    return server.models["base"].engine.stats().running


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/v1/models/nothing", {}, 404),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/health", {}, 405),
        ("POST", "/v1/completions", {"content": b"{}"}, 415),
        ("POST", "/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", "/v1/completions", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ("POST", "/v1/completions", {"json": {"prompt": "a"}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": [10**9]}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": [-1]}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": "ж"}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": "a", "max_tokens": 10**6}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": ["a"] * 65}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": "a", "n": 2, "best_of": 1}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "base", "prompt": "a", "best_of": 2, "stream": True}}, 400),
        ("POST", "/v1/chat/completions", {"json": {"model": "chat"}}, 400),
        ("POST", "/v1/chat/completions", {"json": {"model": "chat", "messages": [], "top_logprobs": 1}}, 400),
        ("GET", "/health", {"headers": {"host": "elsewhere.example"}}, 403),
    ],
)
def test_every_error_has_the_same_form(server: Any, method: str, path: str, options: Any, status: int) -> None:
    check_error(httpx.request(method, server.url + path, **options), status)


def test_a_path_never_leaves_the_api(server: Any) -> None:
    answer = exchange(server.port, b"GET /../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404") and b"root:" not in answer


def test_what_a_request_may_cost_is_bounded(start: Any) -> None:
    with start(max_body_bytes=2000, max_prompt_tokens=100, max_new_tokens=10, max_choices=3) as server:
        url = f"{server.url}/v1/completions"
        check_error(httpx.post(url, json={"model": "base", "prompt": "a" * 3000}), 413)
        check_error(
            httpx.post(url, content=(b"x" * 100 for _ in range(30)), headers={"content-type": "application/json"}), 413
        )
        error = check_error(httpx.post(url, json={"model": "base", "prompt": "a" * 100}), 400)
        assert error["code"] == "context_length_exceeded" and "101 tokens" in error["message"]
        check_error(httpx.post(url, json={"model": "base", "prompt": "a", "max_tokens": 11}), 400)
        check_error(httpx.post(url, json={"model": "base", "prompt": "a", "n": 4}), 400)
        assert httpx.post(url, json={"model": "base", "prompt": "a" * 99, "n": 3, "max_tokens": 10}).status_code == 200


def test_the_api_key_is_asked_of_everything_but_health(start: Any) -> None:
    with start(api_key="secret") as server:
        for path in ("/v1/models", "/metrics", "/nothing", "/"):
            error = check_error(httpx.get(server.url + path), 401)
            assert error["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("secre").models.list()
        assert len(list(server.client("secret").models.list())) == 2
        for scheme, key, status in (
            ("Basic", base64.b64encode(b"me:secret").decode(), 200),
            ("Basic", base64.b64encode(b"me:other").decode(), 401),
            ("Basic", "%%%", 401),
            ("Digest", "secret", 401),
            ("bearer", "secret", 200),
        ):
            answer = httpx.get(server.url + "/metrics", headers={"authorization": f"{scheme} {key}"})
            assert answer.status_code == status, (scheme, key)


def test_a_full_server_says_come_back(start: Any, until: Any) -> None:
    with start(max_batch=1, max_waiting=1) as server, server.client() as client:
        streams = [client.completions.create(**LONG, stream=True) for _ in range(2)]
        assert until(lambda: running_requests(server) == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="base", prompt="b")
        assert caught.value.response.headers["retry-after"] == "1"
        check_error(caught.value.response, 429)
        # two answers where there is room for one: neither is begun
        streams[0].close()
        assert until(lambda: server.models["base"].engine.stats().waiting == 0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="base", prompt="b", n=2)
        streams[1].close()
        assert server.idle("base")
        assert client.completions.create(model="base", prompt="b", max_tokens=1).choices


def test_a_client_that_leaves_takes_its_answers_along(server: Any, client: OpenAI, until: Any) -> None:
    for stream in (True, False):
        if stream:
            events: Any = client.completions.create(**LONG, n=3, stream=True)
            assert until(lambda: running_requests(server) == 3)
            next(iter(events))
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**LONG, n=3, timeout=0.5)
        assert server.idle("base")
    metrics = httpx.get(server.url + "/metrics").text
    assert 'glade_disconnects_total{model="base"} 2.0' in metrics


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_fault(
    server: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert until(lambda: 'status="499"' in httpx.get(server.url + "/metrics").text)
    assert not caplog.records


def test_an_answer_may_take_so_long_and_no_longer(start: Any) -> None:
    with start(max_seconds=0.3) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG)
        check_error(caught.value.response, 504)
        with pytest.raises(openai.APIError, match="longer than"):
            list(client.completions.create(**LONG, stream=True))
        assert server.idle("base")


def test_a_client_that_sends_nothing_is_not_kept(start: Any) -> None:
    with start(idle_seconds=0.4) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert exchange(server.port) == b""
        assert exchange(server.port, head) == b""
        late = exchange(server.port, head + b"Content-Length: 10\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408") and b'"error"' in late
        # a byte now and then does not help
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s, pytest.raises(OSError):
            while time.monotonic() < began + 10:
                s.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < began + 5


def test_connections_are_counted(start: Any) -> None:
    with start(max_connections=2) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        try:
            refused = exchange(server.port)
            assert refused.startswith(b"HTTP/1.1 503") and json.loads(refused.split(b"\r\n\r\n")[1])["error"]
        finally:
            for s in held:
                s.close()


@pytest.mark.parametrize("junk", [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET " + b"a" * 70_000])
def test_what_is_no_http_is_told_so_in_json(server: Any, junk: bytes) -> None:
    answer = exchange(server.port, junk + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "invalid_http"


def test_junk_behind_a_request_ends_only_its_connection(server: Any, client: OpenAI) -> None:
    body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 500, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    exchange(server.port, head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\x00junk\r\n\r\n")
    assert server.idle("base")
    assert client.completions.create(model="base", prompt="b", max_tokens=1).choices


def test_a_model_that_breaks_costs_its_request_alone(start: Any, make_model: Any) -> None:
    model = make_model()
    head = model.lm_head.weight.data.clone()
    with start(models={"base": model}) as server, server.client() as client:
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="base", prompt="a")
        assert check_error(caught.value.response, 500)["code"] == "engine_error"
        with pytest.raises(openai.APIError, match="finite"):
            list(client.completions.create(model="base", prompt="a", stream=True))
        model.lm_head.weight.data.copy_(head)
        assert client.completions.create(model="base", prompt="a", max_tokens=1).choices


def test_stopping_lets_answers_in_flight_finish(start: Any) -> None:
    texts: list[str] = []

    def ask() -> None:
        with server.client() as client:
            texts.append(client.completions.create(**LONG | {"max_tokens": 300, "seed": 1}).choices[0].text)

    with start(shutdown_seconds=30.0) as server:
        thread = threading.Thread(target=ask)
        thread.start()
        while not running_requests(server):
            time.sleep(0.01)
    thread.join()
    assert len(texts) == 1 and len(texts[0]) > 200


def test_stopping_does_not_wait_for_ever(start: Any) -> None:
    with start(shutdown_seconds=1.0) as server:
        client = server.client()
        stream = client.completions.create(**LONG | {"max_tokens": 4000}, stream=True)
        next(iter(stream))
        began = time.monotonic()
    assert time.monotonic() < began + 20
    client.close()


def test_a_server_without_its_engine_is_not_healthy(start: Any) -> None:
    with start() as server, server.client() as client:
        health = httpx.get(server.url + "/health").json()
        assert health["status"] == "ok" and health["models"] == ["base", "chat"]
        assert health["decode"] == {name: served.engine.stats().decode for name, served in server.models.items()}
        server.models["base"].engine.close()
        assert "engine of base" in check_error(httpx.get(server.url + "/health"), 503)["message"]
        with pytest.raises(openai.APIStatusError, match="closed"):
            client.completions.create(model="base", prompt="a")


def test_the_metrics_add_up(start: Any) -> None:
    with start() as server, server.client() as client:
        client.completions.create(model="base", prompt="abc", max_tokens=5, extra_body={"ignore_eos": True})
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        label = '{model="base"}'
        assert values[f"glade_engine_prompt_tokens_total{label}"] == "4.0"
        assert values[f"glade_engine_generated_tokens_total{label}"] == "5.0"
        assert values[f"glade_time_to_first_token_seconds_count{label}"] == "1.0"
        assert values[f"glade_time_between_tokens_seconds_count{label}"] == "4.0"
        assert values['glade_requests_total{path="/v1/completions",status="200"}'] == "1.0"


def test_a_port_that_is_taken_is_an_error_that_says_what_to_do() -> None:
    with listen(ServeSettings(port=0)) as listener, pytest.raises(ConfigError, match=r"--serve\.port"):
        listen(ServeSettings(port=listener.getsockname()[1]))


def test_models_are_named_by_their_folders_and_told_apart(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    for folder in ("a/model", "b/model", "run/checkpoints/step-5", "run/checkpoints/last"):
        model.save_pretrained(tmp_path / folder, model.tokenizer)
    sources = [str(tmp_path / "a/model"), str(tmp_path / "run"), str(tmp_path / "run/checkpoints/step-5")]
    models = loading.load_all(ServeConfig(checkpoints=tuple(sources), device="cpu"))
    assert list(models) == ["model", "run", "run/step-5"]
    assert models["run"].run == tmp_path / "run" and models["model"].run is None
    twice = (str(tmp_path / "a/model"), str(tmp_path / "b/model"))
    with pytest.raises(ConfigError, match=r"both be called 'model'.*--names"):
        loading.load_all(ServeConfig(checkpoints=twice))
    named = loading.load_all(ServeConfig(checkpoints=twice, names=("x", "y"), device="cpu"))
    assert list(named) == ["x", "y"]
    assert named["x"].state_bytes(10) == named["x"].state_bytes(10_000)
    assert named["x"].softmax_bytes(10_000) > 900 * named["x"].softmax_bytes(10)


@pytest.mark.parametrize("settings", [
    {"port": 70_000}, {"port": -1}, {"max_seconds": 0.0}, {"max_batch": 0}, {"api_key": "with space"}, {"api_key": ""},
    {"idle_seconds": float("nan")}, {"cache_bytes": -1},
])  # fmt: skip
def test_settings_out_of_range_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServeSettings(**settings)
    with pytest.raises(ConfigError, match="2 names for 1 checkpoints"):
        ServeConfig(checkpoints=("a",), names=("x", "y"))
