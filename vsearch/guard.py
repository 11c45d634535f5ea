"""What stands before every request: who may ask, how much they may send, what every answer carries."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from vsearch.api import problem
from vsearch.keys import Keys

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "vsearch_key"
BODY_BYTES = 24 << 20
"""An image of 16 MiB takes a third more in base64."""
BODY_S = 30.0
"""So long may a request take to arrive."""
OPEN_PATHS = {"/healthz", "/readyz", "/v1/login", "/v1/logout", "/openapi.json"}
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware. With `keys` all of /v1 needs one; without, and with `local`, only requests to this
    machine's own names are answered: else a page from elsewhere could reach the service through a
    name of its own that points here (DNS rebinding).
    """

    def __init__(self, app: App, keys: Keys | None, local: bool) -> None:
        self._app, self._keys, self._local = app, keys, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        answer = _with_headers(send, scope["path"])
        request_id = headers.get("x-request-id")
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._keys is None and self._local and host.lower() not in LOCAL_HOSTS:
            await _refuse(answer, 403, "This service answers to localhost only.", request_id)
            return
        keys = None if _is_open(scope["path"]) else self._keys
        if keys is not None and keys.name_of(_presented(headers)) is None:
            await _refuse(answer, 401, "A key is needed, or this one is not valid.", request_id)
            return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            try:
                body = await asyncio.wait_for(_body(headers, receive), BODY_S)
            except TimeoutError:
                await _refuse(answer, 408, "The request took too long to arrive.", request_id)
                return
            if body is None:
                limit = f"The request has more than {BODY_BYTES >> 20} MiB."
                await _refuse(answer, 413, limit, request_id)
                return
            receive = _replay(body, receive)
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await answer(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:  # the server logs it; the client learns nothing of what is inside
            if not begun:
                detail = "Something went wrong here; the log has it."
                await _refuse(answer, 500, detail, request_id)
            raise


def _is_open(path: str) -> bool:
    """The page itself is no secret; what it shows is."""
    return path in OPEN_PATHS or not path.startswith("/v1/")


def _presented(headers: dict[str, str]) -> str:
    """The key of a request: from a header, or the cookie that signing in has set."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    if "x-api-key" in headers:
        return headers["x-api-key"]
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[COOKIE].value if COOKIE in cookie else ""


async def _body(headers: dict[str, str], receive: Receive) -> bytes | None:
    """All of a request's body, None if it is too large."""
    claimed = headers.get("content-length", "0")
    if claimed.isdecimal() and int(claimed) > BODY_BYTES:
        return None
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        piece = message.get("body", b"")
        pieces.append(piece)
        size += len(piece)
        if size > BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send, path: str) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.decode("latin-1").lower() for name, _ in message.get("headers", [])}
            more = dict(HEADERS)
            if path.startswith("/v1/") and "cache-control" not in given:
                more["cache-control"] = "no-store"
            extra = [(n.encode(), v.encode()) for n, v in more.items() if n not in given]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return answer


TITLES = {
    401: "Unauthorized", 403: "Forbidden", 408: "Request Timeout", 413: "Content Too Large",
    500: "Internal Server Error",
}  # fmt: skip


async def _refuse(send: Send, status: int, detail: str, request_id: str | None) -> None:
    body = json.dumps(problem(status, TITLES[status], detail, request_id)).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
