"""The science: images to shards, shards to a model, a model to images; and the Python API.

>>> import diffusion
>>> model = diffusion.load("examples/emoji.safetensors")
>>> model.generate("a red heart", count=4, seed=7)
[<PIL.Image.Image image mode=RGB size=64x64 at ...>, ...]

Plain PyTorch and files. Nothing here knows of Prefect, MLflow, DVC or S3; what is needed of them
is stated as a protocol (see ``diffusion.training.logging``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.api import ImageGenerator, curate, distill, evaluate, ingest, load, train

__version__ = "0.2.0"
__all__ = ["ImageGenerator", "__version__", "curate", "distill", "evaluate", "ingest", "load", "train"]


def __getattr__(name: str) -> Any:
    # The command line imports this package before it knows whether it needs any of them.
    if name in __all__:
        return getattr(import_module("diffusion.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
