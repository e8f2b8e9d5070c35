"""The page with all tabs, and its server: on the loopback address, behind a password, with nothing sent elsewhere."""

import logging
import os
import re
import secrets
import shutil
import signal
import sys
from contextlib import suppress
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from threading import Event
from types import FrameType

import gradio as gr

from diffusion.common.errors import UserError
from diffusion.generation.config import MAX_FILE_BYTES
from flows.config import Params
from flows.environment import loopback_no_proxy, settings
from flows.local_stack.http_protocol import BoundedProtocol
from flows.local_stack.server_process import LOOPBACK
from flows.studio import generation
from flows.studio.server import StudioApp, StudioPage
from flows.studio.source import StudioSource

USER = "darkroom"
WAITING = 32
"""Maximum events that wait for their turn."""
MAX_REMOVALS = 1000
"""Attempts to remove the folder of generated and uploaded images at the end."""
# Fonts of the system: Gradio's own would be fetched from Google.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = Path(__file__).with_name("studio.css")
THEME_SWITCH = """() => {
  const isDark = document.body.classList.toggle('dark');
  localStorage.setItem('darkroom-theme', isDark ? 'dark' : 'light');
}"""
LAST_THEME = """() => {
  const theme = localStorage.getItem('darkroom-theme');
  if (theme) document.body.classList.toggle('dark', theme === 'dark');
}"""


def build(source: StudioSource, model: str | None = None, uri: str | None = None) -> gr.Blocks:
    """Build the page for ``source``; with the tabs that need servers if it is a version of the registered ``model``.

    With a ``uri`` the version that it names at the time generates: the champion after a rollback is another one.
    """

    def current() -> StudioSource:
        if uri is None:
            return source
        from flows.studio.comparison import follow

        return follow(source, uri)

    name = uri or (source.name if model else Path(source.name).name)
    with StudioPage(title=f"Darkroom: {name}", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_classes="masthead"):
            gr.HTML(masthead(source, name))
            switch = gr.Button("◐", size="sm", min_width=44, scale=0, elem_classes="theme")
            switch.click(None, None, None, js=THEME_SWITCH)
        page.load(None, None, None, js=LAST_THEME)
        with gr.Tabs() as tabs:
            generation.tabs(source, page, tabs, current)
            if model is not None:
                # These import MLflow and boto3, which a model in a file does without.
                from flows.studio import batches, comparison, ledger, training

                comparison.tab(model, source)
                batches.tab(model)
                ledger.tab(model)
                training.tab()
    return page.queue(max_size=WAITING, default_concurrency_limit=4)


def masthead(source: StudioSource, name: str) -> str:
    """Title of the page: the model, and what it makes, as HTML."""
    header = source.model.header
    size = "×".join(map(str, reversed(source.model.shape[1:])))
    facts = f"{header.model.family} · {size} pixels · trained on {header.dataset}"
    title = re.sub("(?<=/)|(?=@)", "<wbr>", escape(name))
    return f"<h1><b>Darkroom</b> {title}</h1><p>{escape(facts)}</p>"


def launch(
    page: gr.Blocks,
    password: str,
    port: int | None = None,
    browser: bool = False,
    url: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Serve ``page`` in the background and return its address; raises UserError if ``port`` is taken.

    Behind a reverse proxy its address is ``url``; uploads have up to ``max_file_bytes``.
    """
    os.environ.update(loopback_no_proxy())
    try:
        _, address, _ = page.launch(
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
            max_file_size=max_file_bytes,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **FONTS),
            css_paths=CSS,
            _app=StudioApp(url, max_file_bytes),
        )
        page.server.config.http_protocol_class = BoundedProtocol
    except OSError as error:
        raise UserError(f"port {port or '7860'} of {LOOPBACK} cannot be used: give another one to --port") from error
    return url or str(address)


def serve(params: Params, model: str | None, port: int | None, browser: bool) -> None:
    """Serve the studio for a model file or a registered model until the process is interrupted."""
    scratch = mkdtemp(prefix="darkroom-ui-")
    try:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        max_file_bytes = MAX_FILE_BYTES
        if model is not None and model.endswith(".safetensors"):
            page = build(StudioSource.from_file(Path(model), params.sampling))
        else:
            from flows.storage.tags import parse_model_uri
            from flows.studio import training
            from flows.studio.comparison import has_champion, load_uri
            from flows.studio.image_sources import MAX_ZIP_BYTES

            uri, max_file_bytes = model or params.champion, MAX_ZIP_BYTES
            if model is None and not has_champion(params.model_name):
                page = training.page(params.model_name)
            else:
                page = build(load_uri(uri, params.sampling), parse_model_uri(uri)[0], uri)
        fixed_password, url = settings().ui_password, settings().ui_url
        password = fixed_password or secrets.token_urlsafe(12)
        address = launch(page, password, port, browser, url, max_file_bytes)
        text = "of DARKROOM_UI_PASSWORD" if fixed_password else password
        print(f"{address}  user {USER}  password {text}  (Ctrl+C ends it)", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, _end)
        with suppress(KeyboardInterrupt):
            Event().wait()
    finally:
        # Requests under way find their files gone, and would be logged with tracebacks.
        logging.getLogger("uvicorn.error").disabled = True
        for _ in range(MAX_REMOVALS):
            # Threads that still write keep a folder from being removed, until it is gone.
            shutil.rmtree(scratch, ignore_errors=True)
            if not Path(scratch).exists():
                break
    # Not by closing the page: a thread that generates would hold the process until its deadline.
    os._exit(0)


def _end(number: int, frame: FrameType | None) -> None:
    # An exception, so that the images that were generated are deleted.
    raise KeyboardInterrupt
