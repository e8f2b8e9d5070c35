"""The web server of the studio: it answers its own pages and programs, not other pages in the same browser."""

import logging
import os
import secrets
import shutil
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.routes import App, ORJSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from diffusion.common.config import plain_name
from diffusion.common.errors import ConflictError
from diffusion.common.escaping import escape_controls
from diffusion.generation.config import MAX_FILE_BYTES
from flows.local_stack.same_origin import refusal

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_FORM_BYTES = 2**20
"""Maximum size of a request without a file, in bytes."""
FILE_ROUTES = ("/upload", "/component_server")
MIN_FREE_BYTES = 2**30
"""Free bytes of disk that an upload leaves."""
REPORT_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""What a report may do in the browser: show itself, without scripts and requests."""
RESPONSE_HEADERS = {
    # No other page shows this one in a frame, or keeps a handle of its window.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


MAX_LOGGED = 300
"""Maximum number of characters of an error in the log, which may repeat what a request contained."""


def log_error(error: Exception) -> None:
    """Log an error of a request in one line, without control characters; the last place is named if it is a bug."""
    place = ""
    if not isinstance(error, gr.Error) and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({Path(frame.filename).name}:{frame.lineno})"
    text = escape_controls(str(error.message if isinstance(error, gr.Error) else error))
    text = f"{text[:MAX_LOGGED]}…" if len(text) > MAX_LOGGED else text
    logger.warning("a request failed: %s: %s%s", type(error).__name__, text, place)


class StudioPage(gr.Blocks):  # type: ignore[misc]
    """Page that logs the errors of its events in one line each."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Answer an event."""
        try:
            output: dict[str, Any] = await super().process_api(*arguments, **options)
        except Exception as error:
            log_error(error)
            # Gradio would print its traceback, with what the request contained.
            message = error.message if isinstance(error, gr.Error) else "this failed: the server's log says why"
            raise gr.Error(message, duration=20, print_exception=False) from error
        return output


class StudioApp(App):  # type: ignore[misc]
    """Gradio's application behind a check of each request, also of those that Gradio answers itself."""

    def __init__(self, url: str | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Serve pages at loopback names, and at ``url`` if a reverse proxy leads from there.

        ``max_file_bytes``: of an uploaded file.
        """
        super().__init__(default_response_class=ORJSONResponse, openapi_url=None)
        self.max_file_bytes = max_file_bytes
        self.add_api_route("/reports/{name:path}", self._report, methods=["GET"])
        address = urlsplit(url or "")
        self.origin = f"{address.scheme}://{address.netloc}".lower() if url else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 403, or 411 and 413 for its length."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        status, reason = self._refuse(scope)
        is_report = "/reports/" in scope["path"]
        if reason is None:
            try:
                await super().__call__(scope, receive, lambda message: send(self._protect(message, is_report)))
            except Exception as error:  # noqa: BLE001  (it was answered with 500)
                log_error(error)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, send)

    def _refuse(self, scope: Message) -> tuple[int, str | None]:
        """Status and reason of a refusal; no reason: the request is answered."""
        sent = Headers(scope=scope)
        headers = {name: ", ".join(sent.getlist(name)) for name in sent}
        if reason := refusal(scope.get("method", "GET"), scope["path"], headers, self.origin):
            hint = "open the address that `darkroom ui` printed, or set DARKROOM_UI_URL to your reverse proxy's"
            return 403, f"{reason}: {hint}"
        if "transfer-encoding" in headers:
            return 411, "requests need a Content-Length"
        has_file = scope["path"].endswith(FILE_ROUTES)
        limit = MAX_FORM_BYTES + (self.max_file_bytes if has_file else 0)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            return 413, f"the request has over {limit} bytes"
        if has_file:
            free = shutil.disk_usage(os.environ.get("GRADIO_TEMP_DIR", gettempdir())).free
            if int(length) > free - MIN_FREE_BYTES:
                return 507, "the disk of the server has too little space for this file"
        return 200, None

    async def _report(self, request: Request, name: str) -> Response:
        """Answer with the report of a data set's evaluation in this folder, to whoever is logged in."""
        cookies = [request.cookies.get(f"access-token{kind}-{self.cookie_id}") for kind in ("", "-unsecure")]
        if not any(cookie is not None and cookie in self.tokens for cookie in cookies):
            return PlainTextResponse("log in first\n", 401)
        try:
            path = Path("reports", *map(plain_name, name.split("/")), "report.html")
        except ValueError:
            path = Path()
        return FileResponse(path) if path.is_file() else PlainTextResponse("there is no such report\n", 404)

    def _protect(self, message: Message, is_report: bool) -> Message:
        """Add to a response what keeps other pages from using it."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            cookies = headers.getlist("set-cookie")
            for name in [*headers]:
                if name == "set-cookie" or name.startswith("access-control-"):
                    del headers[name]
            for cookie in cookies:
                parts = [part.strip() for part in cookie.split(";")]
                kept = [part for part in parts if not part.lower().startswith(("samesite", "httponly"))]
                headers.append("set-cookie", "; ".join([*kept, "HttpOnly", "SameSite=Strict"]))
            headers.update(RESPONSE_HEADERS)
            if is_report:
                headers["Content-Security-Policy"] = REPORT_POLICY
            message["headers"] = headers.raw
        return message


def new_token() -> str:
    """Make a token for one change of the registry, which only the page that it is sent to can send back."""
    return secrets.token_urlsafe(16)


def require_token(expected: str | None, token: str | None) -> None:
    """Raise ConflictError unless ``token`` is the one that was ``expected`` in this session."""
    if not expected or not secrets.compare_digest(expected.encode(), (token or "").encode()):
        raise ConflictError("this question was answered, or asked in another page: ask again")
