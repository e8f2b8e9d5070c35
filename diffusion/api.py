"""Python API, for notebooks and scripts: load a model and generate images, or ingest, train and evaluate.

Data sets, runs and reports lie where the command line has them, below the working folder: ``data/NAME``, ``runs/NAME``
and ``reports/NAME``. What one begins the other goes on with (``darkroom train --local`` and so on).
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, Unpack, get_args

from pydantic import TypeAdapter, ValidationError

from diffusion.common.config import dataset_folder
from diffusion.common.errors import UserError, install_hint
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.config import EvaluationConfig
from diffusion.families.config import FamilyConfig, sampling_conflict, training_conflict
from diffusion.generation.config import Task, describe_diffusers_names, read_request
from diffusion.presets import PresetName, complete_from_preset
from diffusion.process.samplers import SamplingConfig, sampling_config
from diffusion.training.config import TrainingConfig

# Each function imports what it runs: torch takes seconds, and the evaluation has libraries of its own.
if TYPE_CHECKING:
    from PIL import Image

    from diffusion.data.ingest.ingest import IngestResult, Rebuild
    from diffusion.evaluation.results import Evaluation
    from diffusion.families.model import Model
    from diffusion.training.train import TrainResult

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
    """Scale of classifier-free guidance, instead of autoguidance: 1 is none, 2 to 8 gives clearer and less varied
    images."""


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

        try:
            sampling = self.sampling.with_changes({"device": str(device)})
        except ValidationError as error:
            raise UserError(f"device {device}: give cpu, cuda or auto") from error
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

        ``options`` are those of ``generate``, and ``prompt``; a model with classes needs a ``label`` or ``prompt``.

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

        The other arguments are those of ``generate``.

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
    config = _sampling(model.config, sampling)
    resolve_device(config.device)
    return ImageGenerator(model, config)


def _fetch_registered(uri: str) -> Path:
    """Fetch the weights of a registered version by what the entry point ``darkroom.registry`` names.

    The registry is that of the flows, which stand on this package.
    """
    try:
        [fetch] = (entry.load() for entry in entry_points(group="darkroom.registry"))
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(
            f"{uri} is a registered version, and no registry is installed: {install_hint('pipeline')}, or give a file"
        ) from error
    return Path(fetch(uri))


def ingest(
    source: str | Path,
    dataset: str,
    *,
    rebuild: Rebuild = "never",
    requeue: bool = False,
    progress: Progress = ignore_progress,
    **config: Any,
) -> IngestResult:
    """Add the new images of a folder, tar, zip, Parquet file or table of URLs to the data set in ``data/DATASET``.

    Args:
        source: Where the images lie. Labels and captions come from sub-folders, or metadata.csv beside them.
        dataset: Name of the data set.
        rebuild: Whether to build the data set from this source alone; ``if_different``: if it stores images otherwise.
        requeue: Whether to read sources again that were quarantined.
        progress: Called with what is done, how much, of how much, and a note.
        **config: Fields of the section ``ingest``: ``size=32``, ``fit="pad"``, ``held_out=0.2``.

    Raises:
        UserError: The source cannot be understood, no image can be used, or a field is not valid.

    Example:
        >>> ingest("images/faces", "faces", size=32).kept
        387
    """
    from diffusion.data.ingest.ingest import ingest as ingest_images

    # Not every source is a path: s3://bucket/prefix.
    place = str(Path(source).expanduser()) if str(source).startswith("~") else str(source)
    ingest_config = _validate(IngestConfig, config | {"source": place}, "ingest")
    return ingest_images(dataset_folder(dataset), ingest_config, progress, requeue=requeue, rebuild=rebuild)


def train(
    dataset: str,
    *,
    preset: PresetName = "fast",
    model: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress = ignore_progress,
    **training: Any,
) -> TrainResult:
    """Train on the data set ``data/DATASET`` into ``runs/DATASET``; the same call resumes an interrupted run.

    Args:
        dataset: Name of the data set.
        preset: Source of the fields left out of all three sections.
        model: Fields of the section ``model``: ``{"width": 64}``; ``{"family": "vae"}`` is another family, whose run
            lies in ``runs/DATASET-vae``.
        sampling: Fields of the section ``sampling``, for sample grids.
        restart: Whether to discard the run in that folder and start over.
        progress: Called with what is done, how much, of how much, and a note.
        **training: Fields of the section ``training``: ``minutes=10`` or ``images=200_000``, ``learning_rate=1e-3``,
            ``output="runs/wide"``.

    Returns:
        The result, whose ``final`` is the file to ``load``.

    Raises:
        UserError: There is no such data set, a field is not valid, or the folder holds a run of another configuration.

    Example:
        >>> run = train("faces", minutes=10, model={"width": 64}, flip=True)
        >>> load(run.final).generate(count=4)
    """
    from diffusion.training.run_folder import discard
    from diffusion.training.train import train as train_model

    if preset not in get_args(PresetName):
        raise UserError(f"preset {preset!r} is unknown: use one of {', '.join(get_args(PresetName))}")
    try:
        sections = complete_from_preset(
            {"model": dict(model or {}), "training": training | {"dataset": dataset}}, preset
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    network: FamilyConfig = _validate(FamilyConfig, sections["model"], "model")
    config = _validate(TrainingConfig, sections["training"], "training")
    options = _sampling(network, sampling or {}, preset)
    if words := training_conflict(network, config):
        raise UserError(words)
    output = config.output or Path("runs") / (dataset if network.family == "ddpm" else f"{dataset}-{network.family}")
    # Without its data set, nothing could replace the run that is discarded.
    read_manifest(data := dataset_folder(dataset))
    if restart:
        discard(output)
    return train_model(data, output, network, config, options, progress=progress)


def evaluate(
    dataset: str,
    run: str | Path | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    progress: Progress = ignore_progress,
    **evaluation: Any,
) -> Evaluation:
    """Evaluate the checkpoints of a run, or a single model, against the held-out images of a data set.

    Writes the report to ``report.html`` in ``reports/DATASET``, with metrics, their intervals and sample grids.

    Args:
        dataset: Name of the data set.
        run: Folder of the run, by default ``runs/DATASET``, or the file of a model. The report of another run lies in
            ``reports`` under the name of its folder, that of a file under names of folder and file: ``faces-final``.
        sampling: Fields of the section ``sampling``.
        progress: Called with what is done, how much, of how much, and a note.
        **evaluation: Fields of the section ``evaluation``: ``samples=1000``, ``extractor="inception"``.

    Raises:
        UserError: There is no model or data set, the data set is too small, a field is not valid, or the libraries of
            the extra ``evaluation`` are not installed.

    Example:
        >>> found = evaluate("faces", samples=1000)
        >>> found.best.scores.kid
        0.69
    """
    try:
        from diffusion.evaluation.evaluate import evaluate as evaluate_checkpoints
    except ModuleNotFoundError as error:
        raise UserError(
            f"an evaluation needs {error.name}, which is not installed: {install_hint('evaluation')}"
        ) from error
    from diffusion.checkpoints import read_model_header
    from diffusion.training.ema import models_to_evaluate

    config = _validate(EvaluationConfig, evaluation, "evaluation")
    folder = Path(run or Path("runs") / dataset)
    if folder.is_file():
        # Not the folder of the run's own report.
        output, models = Path("reports") / f"{folder.resolve().parent.name}-{folder.stem}", [folder]
    else:
        output = Path("reports") / folder.name
        models = models_to_evaluate(folder, output, config.ema_stds)
    if not models:
        raise UserError(f"there is no checkpoint in {folder}: train first, or name the run's folder")
    options = _sampling(read_model_header(models[0]).model, sampling or {})
    losses = folder / "losses.csv"
    return evaluate_checkpoints(
        dataset_folder(dataset), models, config, options, output, losses if losses.is_file() else None, progress
    )


def _sampling(model: FamilyConfig, fields: Mapping[str, Any], preset: PresetName = "fast") -> SamplingConfig:
    """Complete ``fields`` of the section ``sampling`` from the preset for ``model``, as params.yaml is."""
    sections = complete_from_preset({"model": model.model_dump(), "sampling": dict(fields)}, preset)
    sampling = sampling_config(**sections["sampling"])
    if words := sampling_conflict(model, sampling):
        raise UserError(words)
    return sampling


def _validate(kind: Any, fields: Mapping[str, Any], section: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (section, *first["loc"])))
        if first["type"] == "extra_forbidden":
            names = difflib.get_close_matches(str(first["loc"][-1]), getattr(kind, "model_fields", ()), n=1)
            hint = (
                f"did you mean {names[0]}?" if names else f"see docs/reference/configuration.md for those of {section}"
            )
            raise UserError(f"there is no field {name}: {hint}") from error
        is_list = first["type"] in ("tuple_type", "list_type")
        words = "give a list, as [a, b]" if is_list else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}: {words}") from error
