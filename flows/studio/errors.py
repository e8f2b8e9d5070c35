"""Errors in the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from diffusion.common.errors import DarkroomError


@contextmanager
def show_errors() -> Iterator[None]:
    """Context that shows errors with a one-line message in the page; others are logged, without details there."""
    try:
        yield
    except DarkroomError as error:
        # Gradio renders the message as HTML, and it may hold texts of a model or a bucket.
        raise gr.Error(escape(str(error)), duration=20, print_exception=False) from error
