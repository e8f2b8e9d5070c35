"""An HTML page as a test sees it."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """Addresses, images and text of a page; fails on tags that do not close in order."""

    VOID = ("meta", "img", "source", "br", "wbr", "link", "rect", "line", "path")
    WITHIN_WORDS = ("code", "wbr", "span", "i", "b")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[tuple[str, np.ndarray]] = []
        """What each image stands for, and its pixels."""
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        self.addresses += [attributes[name] for name in ("src", "srcset", "href", "action") if name in attributes]
        if tag == "img":
            png = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
            self.images.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(png)))))
        if tag not in self.VOID:
            self.open.append(tag)
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag
        self._separate(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def _separate(self, tag: str) -> None:
        if tag not in self.WITHIN_WORDS:
            self.words.append(" ")

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def image(self, name: str) -> np.ndarray:
        """The pixels of the image that stands for ``name``."""
        (pixels,) = (pixels for alt, pixels in self.images if alt == name)
        return pixels
