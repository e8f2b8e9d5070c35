"""A trained model as the Python API gives it: load it and generate images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, Unpack

from diffusion.api.config import complete_sampling
from diffusion.common.errors import UserError, install_hint
from diffusion.common.progress import Progress, ignore_progress
from diffusion.families.config import sampling_conflict
from diffusion.generation.config import Task, describe_diffusers_names, read_request
from diffusion.process.samplers import SamplingConfig

# Each function imports what it runs: torch takes seconds.
if TYPE_CHECKING:
    from PIL import Image

    from diffusion.families.model import Model

    ImageFile: TypeAlias = str | Path | bytes | Image.Image
    """Path of an image file, its bytes, or an image of Pillow's."""


class StepOptions(TypedDict, total=False):
    """How images are sampled; what is left out is as in ``ImageGenerator.sampling``."""

    steps: int
    """Number of noise levels."""
    sampler: str
    """Name of the sampler, such as ``heun``, with the defaults of its own options."""


class ImageOptions(StepOptions, total=False):
    """What images show besides their prompt, and how they are sampled."""

    label: str | list[str] | None
    """One of ``ImageGenerator.classes``, or several that take turns; left out, classes come as often as in the data
    set."""
    negative_prompt: str | None
    """What guidance leads away from."""
    size: str | tuple[int, int]
    """Width and height in pixels as ``"96x64"``, or (H, W); left out, the most frequent shape of the training images,
    or for an edit the one of them that is nearest to the image's."""
    guidance: float
    """Scale of classifier-free guidance, instead of autoguidance: 1 does not guide, 2 to 8 gives clearer and less
    varied images."""


class ConditionalOptions(ImageOptions, total=False):
    """What images show, and how they are sampled."""

    prompt: str | list[str] | None
    """Text in the words of the captions, for a model with ``model.text``, or several that take turns."""


@dataclass(frozen=True, repr=False)
class ImageGenerator:
    """A trained model and its sampling options, as ``load`` makes it.

    Image ``index`` of ``seed`` has the same bits in every call, in ``darkroom sample`` and in a sampling batch, within
    the fingerprint of the machine. The methods raise UserError for what the model was not trained to do, and for
    options that would have no effect. ``progress`` is called with what is done, how much, of how much, and a note.
    """

    model: Model
    sampling: SamplingConfig

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the model can do, named as the methods; ``sample`` is ``generate``."""
        from diffusion.generation.requests import tasks_of

        return tasks_of(self.model)

    @property
    def classes(self) -> list[str]:
        """Labels that it is conditioned on; empty: none."""
        return self.model.classes

    def to(self, device: str) -> Self:
        """Return the generator on another device: ``cpu``, ``cuda``, or ``auto``, a GPU if there is one.

        Raises UserError if it is not there.

        Example:
            >>> model = load("examples/emoji.safetensors").to("cuda")
        """
        from diffusion.common.device import resolve_device

        sampling = self.sampling.with_changes({"device": str(device)})
        return replace(self, model=self.model.to(resolve_device(sampling.device)), sampling=sampling)

    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        count: int = 1,
        seed: int = 0,
        index: int = 0,
        progress: Progress = ignore_progress,
        **options: Unpack[ImageOptions],
    ) -> list[Image.Image]:
        """Generate the images ``index`` to ``index + count - 1`` of ``seed``.

        Args:
            prompt: Text in the words of the captions, for a model with ``model.text``, or several that take turns.
            count: Number of images.
            seed: Seed of the noise, 0 to 2⁶³ − 1.
            index: Index of the first image.
            progress: Called now and then.
            **options: ``label``, ``negative_prompt``, ``size``, ``guidance``, ``steps``, ``sampler``. A ``size`` in
                words is width x height, ``"96x64"``; a tuple is (height, width), (64, 96).

        Example:
            >>> model.generate("a red heart", count=4, seed=7)
        """
        if isinstance(prompt, int):
            raise UserError(f"generate({prompt}) would be a prompt: give the number of images as count={prompt}")
        return self._answer("sample", options, progress, prompt=prompt, count=count, seed=seed, index=index)

    def inpaint(
        self,
        image: ImageFile,
        mask: ImageFile,
        count: int = 1,
        *,
        method: Literal["replace", "repaint", "pigdm"] = "replace",
        resample_steps: int | None = None,
        strength: float | None = None,
        seed: int = 0,
        index: int = 0,
        progress: Progress = ignore_progress,
        **options: Unpack[ConditionalOptions],
    ) -> list[Image.Image]:
        """Generate the part of an image where a mask is white again; what is black is kept.

        Args:
            image: Cropped and scaled to ``size``.
            mask: As large as ``image``.
            count: Number of versions.
            method: ``replace``: set the known pixels in each step. ``repaint``: repeat stretches of steps. ``pigdm``:
                guide each step by a gradient, for 2.5 times the work.
            resample_steps: How often each stretch of steps is run; None: 5 with repaint, 1 with pigdm.
            strength: Noise added to the hole, above 0 and at most 1; None: 1, which replaces all.
            seed: As for ``generate``.
            index: As for ``generate``.
            progress: Called now and then.
            **options: As for ``generate``, and ``prompt``.

        Example:
            >>> model.inpaint("face.png", "hole.png", method="pigdm")
        """
        fields: dict[str, Any] = {"method": method, "resample_steps": resample_steps, "strength": strength}
        fields |= {"count": count, "seed": seed, "index": index, "image": image, "mask": mask}
        return self._answer("inpaint", options, progress, **fields)

    def img2img(
        self,
        image: ImageFile,
        count: int = 1,
        *,
        strength: float | None = None,
        seed: int = 0,
        index: int = 0,
        progress: Progress = ignore_progress,
        **options: Unpack[ConditionalOptions],
    ) -> list[Image.Image]:
        """Generate variations of an image.

        Args:
            image: Cropped and scaled to ``size``.
            count: Number of versions.
            strength: Noise added, above 0 and below 1; None: 0.6, at which the image is still recognisable.
            seed: As for ``generate``.
            index: As for ``generate``.
            progress: Called now and then.
            **options: As for ``generate``, and ``prompt``.

        Example:
            >>> model.img2img("face.png", 4, strength=0.5)
        """
        fields = {"count": count, "seed": seed, "index": index, "image": image, "strength": strength}
        return self._answer("img2img", options, progress, **fields)

    def interpolate(
        self,
        seed: int,
        to_seed: int,
        count: int = 8,
        *,
        progress: Progress = ignore_progress,
        **options: Unpack[ConditionalOptions],
    ) -> list[Image.Image]:
        """Generate the path from image 0 of ``seed`` to image 0 of ``to_seed``, both ends included.

        ``options`` are as for ``generate``, and ``prompt``; a model with classes needs a ``label`` or ``prompt``.

        Example:
            >>> model.interpolate(3, 7, 10)
        """
        return self._answer("interpolate", options, progress, seed=seed, to_seed=to_seed, count=count)

    def upscale(
        self,
        image: ImageFile,
        count: int = 1,
        *,
        seed: int = 0,
        index: int = 0,
        progress: Progress = ignore_progress,
        **options: Unpack[StepOptions],
    ) -> list[Image.Image]:
        """Enlarge an image with a super-resolution model (``model.low_resolution``), in overlapping tiles if large.

        The other arguments are as for ``generate``.

        Example:
            >>> model.upscale("small.png")
        """
        return self._answer("upscale", options, progress, count=count, seed=seed, index=index, image=image)

    def _answer(self, task: Task, options: Mapping[str, Any], progress: Progress, **fields: Any) -> list[Image.Image]:
        from PIL import Image, ImageOps

        from diffusion.common.image_grids import to_pil_image
        from diffusion.generation.requests import answer

        paths = {}
        for name in fields.keys() & {"image", "mask"}:
            if isinstance(image := fields[name], Image.Image):
                image = ImageOps.exif_transpose(image)
                # PNG has no other modes.
                png_image = (
                    image if image.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA") else image.convert("RGB")
                )
                png_image.save(stream := io.BytesIO(), "png")
                fields[name] = stream.getvalue()
            elif isinstance(image, str | Path):
                paths[name] = Path(fields.pop(name))
            elif not isinstance(image, bytes):
                raise UserError(
                    f"the {name} is a {type(image).__name__}: give the path or the bytes of an image file, or an image "
                    "of Pillow's (Image.fromarray makes one of an array)"
                )
        request = read_request({"task": task, **options, **fields}, **paths)
        [images] = answer(self.model, [request], self.sampling, progress)
        return [to_pil_image(image) for image in images]

    def __repr__(self) -> str:
        header, size = self.model.header, "×".join(map(str, reversed(self.model.shape)))
        parameters = sum(tensor.numel() for tensor in self.model.network.parameters())
        inputs = f", {len(self.classes)} classes" if self.classes else ""
        inputs += ", prompts" if self.model.config.text else ""
        return f"<{self.model.config.family} of {header.dataset}: {size}, {parameters / 1e6:.1f} M parameters{inputs}>"


def load(path: str | Path, **sampling: Any) -> ImageGenerator:
    """Load the model in a ``.safetensors`` file, or a registered version, whose file is fetched.

    Args:
        path: ``final.safetensors`` of a run, a checkpoint, ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``. Nothing
            in it is unpickled.
        **sampling: Fields of the section ``sampling``, over the preset: ``device="cuda"``, ``steps=32``.

    Raises:
        UserError: The file is not a model of Darkroom, an option is not valid for it, or its device is not there.
        DarkroomError: The servers of the registry do not answer.

    Example:
        >>> model = load("examples/emoji.safetensors", sampler="heun", steps=20)
        >>> model
        <ddpm of emoji-distinct: 64×64×3, 2.0 M parameters, prompts>
    """
    from diffusion.checkpoints import load_model
    from diffusion.common.device import resolve_device

    if not isinstance(path, str | Path):
        raise UserError(
            f"load takes the path of a model file, such as train(...).final, and not a {type(path).__name__}"
        )
    if words := describe_diffusers_names(sampling):
        raise UserError(words)
    is_registered = str(path).startswith("models:/")
    model = load_model(_fetch_registered(str(path)) if is_registered else Path(path).expanduser())
    config = complete_sampling(model.config, sampling)
    if words := sampling_conflict(model.config, config):
        raise UserError(words)
    resolve_device(config.device)
    return ImageGenerator(model, config)


def _fetch_registered(uri: str) -> Path:
    """Fetch the weights of a registered version by what the entry point ``darkroom.registry`` names.

    The registry belongs to the flows, which stand on this package.
    """
    with warnings.catch_warnings():
        # Libraries of the registry have tqdm's bars, which in a notebook ask for a widget that nothing here needs.
        warnings.filterwarnings("ignore", "IProgress not found")
        try:
            [fetch] = (entry.load() for entry in entry_points(group="darkroom.registry"))
        except (ValueError, ModuleNotFoundError) as error:
            raise UserError(
                f"{uri} is a registered version, and no registry is installed: {install_hint('pipeline')}, or give a "
                "file"
            ) from error
        return Path(fetch(uri))
