"""Keep other people and other sites' pages away from web pages that we serve."""

import base64
import hmac
from typing import Any

from vla_foundry.params.commands.serving import is_loopback

# of everything that is not our own page: it loads nothing and runs nothing, whatever data held
_STRICT = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; media-src 'self'; frame-ancestors 'self'"
_OWN = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; frame-ancestors 'self'"
)


class Guard:
    """Let in only who may be, and add to answers what browsers must not do with them (an ASGI middleware)."""

    def __init__(self, app: Any, *, password: str | None, is_local: bool) -> None:
        self.app = app
        self.password = password
        self.is_local = is_local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, text = self._judge(headers)
        if status:
            more = [(b"www-authenticate", b'Basic realm="vla-foundry dashboard"')] if status == 401 else []
            await send(
                {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), *more]}
            )
            await send({"type": "http.response.body", "body": text.encode()})
            return
        policy = _STRICT if scope["path"].startswith("/files/") else _OWN

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = {
                    "content-security-policy": policy,
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                }
                message["headers"] = [
                    *message["headers"],
                    *((key.encode(), text.encode()) for key, text in added.items()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _judge(self, headers: dict[str, str]) -> tuple[int, str]:
        """Return 0, or the status and text of a refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        # another site's page, or a name that another site lets point here
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"Requests from {origin} are refused.\n"
        if self.is_local and not is_loopback(host.rpartition(":")[0].strip("[]") or host):
            return 403, f"This page is for this machine only; it is not {host}.\n"
        if self.password is not None:
            shown = headers.get("authorization", "").removeprefix("Basic ")
            try:
                given = base64.b64decode(shown, validate=True).partition(b":")[2]
            except ValueError:
                given = b""
            if not hmac.compare_digest(given, self.password.encode()):
                return 401, "The password is missing or wrong.\n"
        return 0, ""
