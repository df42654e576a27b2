"""The verb `glade serve`: load the models, listen, and stop in good order."""

import socket
import sys
from collections.abc import Mapping
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from glade.errors import ConfigError
from glade.serve.api import create_app
from glade.serve.config import ServeConfig, ServeSettings
from glade.serve.connection import Connection
from glade.serve.served import Served, load_all

_LOOPBACK = ("127.", "localhost", "::1")


def run(config: ServeConfig) -> None:
    """The verb `glade serve`: until Ctrl-C or SIGTERM, after which answers in flight have `serve.shutdown_seconds`."""
    settings = config.serve
    # before the models are loaded: a port that is taken should not cost that time
    with listen(settings) as listener:
        models = load_all(config)
        for served in models.values():
            print(_line(served), flush=True)
        if settings.api_key is None and not settings.host.startswith(_LOOPBACK):
            print(
                f"glade serve: anybody who reaches {settings.host} can use this server; set serve.api_key",
                file=sys.stderr,
            )
        print(address(settings, listener), flush=True)
        try:
            make_server(create_app(models, settings), settings).run(sockets=[listener])
        except KeyboardInterrupt:
            print("stopped", flush=True)


def listen(settings: ServeSettings) -> socket.socket:
    """The socket of the server.

    Raises:
        ConfigError: no such address here, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose others with "
            "--serve.host and --serve.port (0 takes a free port)"
        ) from error


def make_server(app: ASGIApp, settings: ServeSettings) -> uvicorn.Server:
    """uvicorn with this project's connections; it starts with `run` or `serve`."""
    config = uvicorn.Config(
        app,
        http=partial(Connection, settings),  # type: ignore[arg-type]  # it only calls it
        ws="none",
        lifespan="on",
        # a warning for every connection that sends no HTTP would fill a disk
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.idle_seconds)),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
    )
    return uvicorn.Server(config)


def address(settings: ServeSettings, listener: socket.socket) -> str:
    """Where to find it, to be read by people."""
    host, port = listener.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else f"[{host}]" if ":" in host else host
    page = f"page http://{shown}:{port}/   " if settings.ui else ""
    return f"{page}API http://{shown}:{port}/v1   (Ctrl-C stops)"


def _line(served: Served) -> str:
    mixers: Mapping[str, None] = dict.fromkeys(served.model.config.layer_mixers)
    return (
        f"model {served.name}: {' '.join(mixers)}, {served.num_parameters:,} parameters, "
        f"{served.state_bytes(1024):,} bytes of state a sequence after 1,024 tokens, "
        f"{'with' if served.tokenizer.chat_template else 'without'} a chat template"
    )
