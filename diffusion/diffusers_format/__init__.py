"""Our models as diffusers knows models: a network class, the schedulers of our samplers, and a pipeline.

    from diffusion.diffusers_format import DarkroomPipeline
    pipe = DarkroomPipeline.from_pretrained("exports/faces")
    pipe(batch_size=4, seed=7).images

Stock pipelines load the same folder once ``diffusion.diffusers_format.network`` was imported: it holds the class of the
network, which diffusers does not import because a folder names it. Nothing is run that lies in the folder. Needs the
extra ``diffusers``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.diffusers_format.network import DarkroomUNet
    from diffusion.diffusers_format.pipeline import DarkroomPipeline

__all__ = ["DarkroomPipeline", "DarkroomUNet"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # diffusers takes seconds to import, and those who only name the export do not need it.
    from diffusion.diffusers_format import pipeline

    return getattr(pipeline, name)
