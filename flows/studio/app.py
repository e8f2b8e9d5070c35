"""The studio: its pages, and their server on the loopback address, behind a password, with nothing sent elsewhere.

The server answers its own pages and programs, not other pages in the same browser.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from html import escape
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.routes import App, ORJSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.common.files import is_model_file
from diffusion.generation.config import MAX_FILE_BYTES
from diffusion.generation.requests import tasks_of
from flows.config import Params
from flows.environment import loopback_no_proxy, settings
from flows.local_stack.http_api import split_login
from flows.local_stack.http_protocol import BoundedProtocol
from flows.local_stack.same_origin import refusal
from flows.local_stack.server_process import LOOPBACK
from flows.studio import edit
from flows.studio.generate import StudioSource, TaskForm

if TYPE_CHECKING:
    from flows.registry.model_versions import Version

logger = logging.getLogger(__name__)

USER = "darkroom"
WAITING = 32
"""Maximum events that wait for their turn."""
# Fonts of the system: Gradio's own would be fetched from Google.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = Path(__file__).with_name("studio.css")
MAX_FORM_BYTES = 2**20
"""Maximum size of a request without a file, in bytes."""
FILE_ROUTES = ("/upload", "/component_server")
MIN_FREE_BYTES = 2**30
"""Free bytes of disk that an upload leaves."""
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
    if not isinstance(error, gr.Error | DarkroomError) and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({Path(frame.filename).name}:{frame.lineno})"
    text = escape_controls(str(error.message if isinstance(error, gr.Error) else error))
    logger.warning("a request failed: %s: %s%s", type(error).__name__, text[:MAX_LOGGED], place)


class StudioPage(gr.Blocks):  # type: ignore[misc]
    """Page that shows errors with a one-line message, and logs each error of an event in one line."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Answer an event."""
        try:
            output: dict[str, Any] = await super().process_api(*arguments, **options)
        except Exception as error:
            # Gradio has one of its own around what an input raises.
            error = error.__cause__ if isinstance(error.__cause__, DarkroomError) else error
            log_error(error)
            message = "this failed: the server's log says why"
            if isinstance(error, gr.Error | DarkroomError):
                # Gradio renders the message as HTML, and it may hold texts of a model or a request.
                message = escape(str(error.message if isinstance(error, gr.Error) else error))
            # Gradio would print the traceback of another error, with what the request contained.
            raise gr.Error(message, duration=20, print_exception=False) from error
        return output


class StudioApp(App):  # type: ignore[misc]
    """Gradio's application behind a check of each request, also of those that Gradio answers itself."""

    def __init__(self, url: str | None = None) -> None:
        """Serve pages at loopback names, and at ``url`` if a reverse proxy leads from there."""
        super().__init__(default_response_class=ORJSONResponse, openapi_url=None)
        address = urlsplit(url or "")
        self.origin = f"{address.scheme}://{address.netloc}".lower() if url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 403, or 411 and 413 for its length."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        status, reason = self._refuse(scope)
        if reason is None:
            try:
                await super().__call__(scope, receive, lambda message: send(self._protect(message)))
            except Exception as error:  # noqa: BLE001  (it was answered with 500)
                log_error(error)
            return
        logger.warning("a request was refused: %s", escape_controls(reason))
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, send)

    def _refuse(self, scope: Scope) -> tuple[int, str | None]:
        """Status and reason of a refusal; no reason: the request is answered."""
        sent = Headers(scope=scope)
        headers = {name: ", ".join(sent.getlist(name)) for name in sent}
        if reason := refusal(scope.get("method", "GET"), scope["path"], headers, self.origin):
            hint = "open the address that `darkroom ui` printed, or set DARKROOM_UI_URL to your reverse proxy's"
            return 403, f"{reason}: {hint}"
        if "transfer-encoding" in headers:
            return 411, "requests need a Content-Length"
        has_file = scope["path"].endswith(FILE_ROUTES)
        limit = MAX_FORM_BYTES + (MAX_FILE_BYTES if has_file else 0)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            return 413, f"the request has over {limit} bytes"
        if has_file:
            free = shutil.disk_usage(os.environ.get("GRADIO_TEMP_DIR", gettempdir())).free
            if int(length) > free - MIN_FREE_BYTES:
                return 507, "the disk of the server has too little space for this file"
        return 200, None

    def _protect(self, message: Message) -> Message:
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
            message["headers"] = headers.raw
        return message


def build(source: StudioSource, version: "Version | None" = None) -> gr.Blocks:
    """Build the pages for ``source``; with votes if it is the registered ``version``."""
    with StudioPage(title=f"Darkroom: {source.name}", analytics_enabled=False, fill_width=True) as studio:
        gr.HTML(masthead(source, version), elem_classes="masthead")
        with gr.Tabs() as pages:
            form = None
            if "sample" in tasks_of(source.model):
                with gr.Tab("Generate"):
                    form = TaskForm(source, "sample", "Generate")
            edit.add_page(source, pages, form)
            if version is not None:
                # It imports MLflow and boto3, which a model in a file does without.
                from flows.studio import votes

                votes.add_page(version.model, source)
    return studio.queue(max_size=WAITING, default_concurrency_limit=4)


def masthead(source: StudioSource, version: "Version | None") -> str:
    """Title of the studio as HTML: the model, what it makes, and where its training and its batches are shown."""
    header = source.model.header
    size = "×".join(map(str, reversed(source.model.shape[1:])))
    facts = f"{header.model.family} · {size} pixels · trained on {header.dataset}"
    links = list[tuple[str, str]]()
    if version is not None:
        from flows.tracking.runs import version_page

        links.append(("MLflow", version_page(version.model, version.number)))
        if api := os.environ.get("PREFECT_API_URL"):
            links.append(("Prefect", split_login(api)[0].rstrip("/").removesuffix("/api")))
    words = [escape(facts), *(f"<a href='{escape(page)}' target='_blank'>{name}</a>" for name, page in links)]
    return f"<h1><b>Darkroom</b> {escape(source.name)}</h1><p>{' · '.join(words)}</p>"


def launch(
    studio: gr.Blocks, password: str, port: int | None = None, browser: bool = False, url: str | None = None
) -> str:
    """Serve the ``studio`` in the background and return its address; raises UserError if ``port`` is taken.

    Behind a reverse proxy its address is ``url``.
    """
    os.environ.update(loopback_no_proxy())
    try:
        _, address, _ = studio.launch(
            auth=(USER, password),
            server_name=LOOPBACK,
            server_port=port,
            inbrowser=browser and url is None,
            root_path=url,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_FILE_BYTES,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **FONTS),
            css_paths=CSS,
            _app=StudioApp(url),
        )
        studio.server.config.http_protocol_class = BoundedProtocol
    except OSError as error:
        raise UserError(f"port {port or '7860'} of {LOOPBACK} cannot be used: give another one to --port") from error
    return url or str(address)


def serve(params: Params, model: str | None, port: int | None, browser: bool) -> None:
    """Serve the studio for a model file or a registered model until the process is interrupted."""
    scratch = mkdtemp(prefix="darkroom-ui-")
    try:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        if is_model_file(model):
            studio = build(StudioSource.from_file(Path(model), params.sampling))
        else:
            from mlflow.client import MlflowClient

            from flows.registry.model_versions import resolve
            from flows.studio.votes import load_version

            version = resolve(MlflowClient(), model or params.champion)
            studio = build(load_version(version.uri, params.sampling), version)
        fixed_password, url = settings().ui_password, settings().ui_url
        password = fixed_password or secrets.token_urlsafe(12)
        address = launch(studio, password, port, browser, url)
        text = "of DARKROOM_UI_PASSWORD" if fixed_password else password
        print(f"{address}  user {USER}  password {text}  (Ctrl+C ends it)", file=sys.stderr, flush=True)
        # An exception, so that the images that were generated are deleted.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            Event().wait()
    finally:
        # Requests under way find their files gone, and would be logged with tracebacks.
        logging.getLogger("uvicorn.error").disabled = True
        for _ in range(1000):
            # Threads that still write keep a folder from being removed, until it is gone.
            shutil.rmtree(scratch, ignore_errors=True)
            if not Path(scratch).exists():
                break
    # Not by closing the page: a thread that generates would hold the process until its deadline.
    os._exit(0)
