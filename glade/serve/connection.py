"""uvicorn's HTTP/1.1 connection, which also closes what sends nothing, caps how many there are, and errs in JSON."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from glade.serve.config import ServeSettings
from glade.serve.refusal import Refusal


class Connection(H11Protocol):
    """uvicorn's own limits begin with a request: a client that never completes its headers would stay for ever."""

    def __init__(
        self,
        settings: ServeSettings,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._settings = settings
        self._expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(Refusal(503, f"{self._settings.max_connections} connections are open, the most there may be"))
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, msg, code="invalid_http"))

    def _watch(self) -> None:
        """Time runs from the first byte of a request (or from the connection) until its headers are whole."""
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting or self.transport.is_closing():
            self._forget()
        elif self._expiry is None:
            self._expiry = self.loop.call_later(self._settings.idle_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, if the connection is in a state for it, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (
            self.cycle is None or self.cycle.response_complete
        ):
            body = json.dumps(refusal.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            start = self.conn.send(h11.Response(status_code=refusal.status, headers=headers))
            self.transport.write((start or b"") + (self.conn.send(h11.Data(data=body)) or b""))
        elif self.cycle is not None:
            # what an application still sends has nowhere to go
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
