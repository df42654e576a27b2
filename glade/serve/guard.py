"""Who may ask, and how much: the outermost layer, before any route, the page's included. Plain ASGI."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glade.serve.config import ServeSettings
from glade.serve.metrics import Metrics
from glade.serve.refusal import Refusal

_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")

# what the page in the browser asks for; Gradio offers more (uploads, files, proxies), which nobody here needs
_PAGE_FILES = ("/ui/", "/ui/config", "/ui/theme.css", "/ui/favicon.ico", "/ui/gradio_api/startup-events")
_PAGE_PATHS = (
    "/ui/assets/",
    "/ui/static/",
    "/ui/svelte/",
    "/ui/gradio_api/queue/",
    "/ui/gradio_api/heartbeat/",
    "/ui/gradio_api/reset",
    "/ui/gradio_api/cancel",
)


class Guard:
    """Refuses, in OpenAI's form, what is not to reach `app`: a wrong host or key, a body too long or too slow.

    A local server answers only to local names: a web page elsewhere could otherwise have its own name point here, and
    read the answers in its visitor's browser.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.hosts = settings.allowed_hosts or (_LOCAL if settings.host in _LOCAL else ())
        self.key = settings.api_key.encode() if settings.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]
        started = False
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, _bounded(receive, self.settings), watched_send)
        except Refusal as refusal:
            # too late for a status once the answer has begun: the connection breaks off instead
            if started:
                raise
            await refusal.response()(scope, receive, watched_send)
        finally:
            self.metrics.answered(scope["path"], status)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if path.startswith("/ui/") and not path.startswith(_PAGE_PATHS) and path not in _PAGE_FILES:
            raise Refusal(404, f"there is nothing at {path[:200]}")
        if scope["method"] == "POST" and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refusal(403, "a page of another site may not use this server", code="cross_site")
        if self.hosts and _name(headers.get("host", "")) not in self.hosts:
            raise Refusal(
                403,
                f"this server answers to {', '.join(self.hosts)}, not to {headers.get('host', '')[:100]!r}; "
                "serve.allowed_hosts names others",
                code="host_not_allowed",
            )
        if self.key is not None and path != "/health":
            self._check_key(headers.get("authorization", ""), path)

    def _check_key(self, authorization: str, path: str) -> None:
        scheme, _, credentials = authorization.partition(" ")
        given = _password(credentials) if scheme.lower() == "basic" else credentials.strip().encode("latin-1")
        assert self.key is not None
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(given, self.key):
            # a browser asks its user for a password where the page is, programs send the key
            scheme = "Bearer" if path.startswith("/v1/") else 'Basic realm="glade"'
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY` (in a browser: as the "
                "password, with any name)",
                headers={"WWW-Authenticate": scheme},
            )


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _password(credentials: str) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _bounded(receive: Receive, settings: ServeSettings) -> Callable[[], Any]:
    """`receive`, but a body that is too long or does not come raises a Refusal."""
    read_bytes, whole = 0, False

    async def bounded() -> Message:
        nonlocal read_bytes, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(settings.idle_seconds):
                message = await receive()
        except TimeoutError as error:
            raise Refusal(408, f"the rest of the body did not come within {settings.idle_seconds:g} s") from error
        if message["type"] == "http.request":
            read_bytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read_bytes > settings.max_body_bytes:
                raise Refusal(413, f"the body is longer than {settings.max_body_bytes} bytes, the most that is read")
        return message

    return bounded
