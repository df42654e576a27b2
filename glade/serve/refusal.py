"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "overloaded"),
    504: ("timeout_error", "timeout"),
}


class Refusal(Exception):
    """A request that gets an error for an answer.

    Args:
        status:  the HTTP status
        message: what was given, what is allowed, what to do
        param:   the field that is at fault
        code:    a word for programs; default by status
        headers: more headers of the response, as Retry-After
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        kind, usual = _TYPES.get(status, ("server_error", "internal_error") if status >= 500 else _TYPES_400)
        self.type, self.code = kind, code or usual

    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # ASCII, since a message may quote characters that no encoding can write
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


_TYPES_400 = ("invalid_request_error", "invalid_value")
