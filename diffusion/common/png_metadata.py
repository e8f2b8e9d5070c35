"""Images that say of themselves that a model made them, and which."""

import io
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's mark of images made by a trained model."""
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{SYNTHETIC}"/></rdf:RDF></x:xmpmeta>'
)


def marked_png(image: Image.Image, about: Mapping[str, str | None]) -> bytes:
    """``image`` as a PNG with IPTC's mark, and what ``about`` says of it as texts ``darkroom:NAME``."""
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP)
    for name, text in about.items():
        if text:
            texts.add_itxt(f"darkroom:{name}", text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()
