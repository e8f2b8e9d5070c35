"""The model behind the studio's pages: it answers a page's requests with files, and shows examples of what it makes."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

import gradio as gr

from diffusion.checkpoints import load_model
from diffusion.common.config import dataset_folder
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import sha256_file
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import Dataset
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import Model
from diffusion.generation.config import GenerationRequest, make_request
from diffusion.generation.generate import label_names
from diffusion.generation.limits import Budget
from diffusion.generation.requests import answer, encode, sampling_of, tasks_of
from diffusion.process.samplers import SamplingConfig
from flows.environment import settings
from flows.tracking.console import clock

logger = logging.getLogger(__name__)

MAX_IMAGES = 64
"""Maximum number of images of a request."""
EXAMPLES = 6
MAX_EXAMPLE_SECONDS = 60.0
"""Time after which a page begins without examples."""
FILES = ("image", "mask")
"""Fields of requests that are files."""


@dataclass(frozen=True)
class GeneratedImages:
    """Images of a request, in files."""

    fields: Mapping[str, Any]
    """Fields of the request, its files as paths."""
    seed: int
    first_index: int
    paths: tuple[Path, ...]
    """PNG files that carry the metadata of ``darkroom sample``."""
    prompts: tuple[str | None, ...]
    labels: tuple[str | None, ...]
    """Class that each image is conditioned on, also where the request named none."""
    made_by: str
    """Model, if it is registered, and the effective sampling."""
    title: str = ""

    @property
    def texts(self) -> list[str]:
        """Prompt and class of each image; empty for none."""
        return [" · ".join(filter(None, pair)) for pair in zip(self.prompts, self.labels, strict=True)]

    @property
    def note(self) -> str:
        """One line about how the images were made."""
        count = f"{len(self.paths)} images" if self.paths[1:] else "1 image"
        way = (
            f"from seed {self.seed} to {self.fields['to_seed']}" if "to_seed" in self.fields else f"of seed {self.seed}"
        )
        return f"{count} {way}{self.made_by}"

    def fields_of(self, number: int) -> dict[str, Any]:
        """Return the request's fields for the prompt and class of image ``number`` alone."""
        fields = dict(self.fields)
        index = self.first_index + number
        for name in ("prompt", "label"):
            if isinstance(fields.get(name), list):
                fields |= {name: fields[name][index % len(fields[name])], "count": 8}
        return fields


@dataclass(frozen=True)
class StudioSource:
    """Loaded model, with what it is called, what its images say of their origin, and the configured sampling."""

    model: Model
    name: str
    origin: Mapping[str, str]
    sampling: SamplingConfig
    _examples: list[GeneratedImages | None] = field(default_factory=list, init=False, repr=False, compare=False)
    """The examples, once they were tried."""

    @classmethod
    def from_file(cls, weights: Path, sampling: SamplingConfig) -> Self:
        """Load the model in a file; raises UserError if it is none."""
        model = load_model(weights)
        origin = {"model": f"sha256:{sha256_file(weights)}", "content_digest": model.header.content_digest}
        return cls(model, str(weights), origin, sampling)

    @property
    def is_registered(self) -> bool:
        """Whether it is a version in the registry."""
        return self.name.startswith("models:/")

    @property
    def is_student(self) -> bool:
        """Whether its sampler, steps and guidance were fixed by distillation."""
        return self.model.header.student_steps is not None

    @property
    def defaults(self) -> SamplingConfig:
        """Sampling of a request that sets nothing."""
        return self.model.header.sampling(self.sampling)

    def generate(
        self,
        fields: Mapping[str, Any],
        progress: Progress = ignore_progress,
        is_abandoned: Callable[[], bool] = lambda: False,
        title: str = "",
    ) -> GeneratedImages:
        """Generate the images of a request into new PNG files.

        Files and pixels are as ``darkroom sample`` and ``darkroom edit`` make them with a model file. Raises UserError
        as ``make_request`` and ``answer`` do, and StoppedError if nobody waits for them any longer.
        """
        request = self.request(fields)
        [images] = answer(self.model, [request], self.sampling, progress, Budget(settings(), is_abandoned))
        folder = Path(mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
        stem = self.name.removeprefix("models:/").replace("/", "-") if self.is_registered else Path(self.name).stem
        paths = [folder / f"{stem}-seed{request.seed}-{index}.png" for index in request.indices]
        for path, index, image in zip(paths, request.indices, images, strict=True):
            path.write_bytes(encode(image, index, request, self.origin))
        kept = {name: value for name, value in fields.items() if value not in (None, "")}
        for name in kept.keys() & {*FILES}:
            # Not in memory: an upload may have many megabytes.
            (folder / name).write_bytes(kept[name])
            kept[name] = folder / name
        conditions, indices = request.conditions, request.indices
        prompts = tuple(conditions.prompt(index) for index in indices)
        labels = tuple(label_names(self.model, indices, request.seed, conditions))
        author = f" by {self.name}" if self.is_registered else ""
        made_by = f"{author}: {self.describe(request)}"
        return GeneratedImages(kept, request.seed, indices.start, tuple(paths), prompts, labels, made_by, title)

    def request(self, fields: Mapping[str, Any]) -> GenerationRequest:
        """Make a request of the fields of a form, in which empty texts mean left out.

        Guidance as it is by default is left out: it may be limited to some noise levels, or be autoguidance.
        """
        fields = {name: None if value == "" else value for name, value in fields.items()}
        if fields.get("guidance") == default_guidance(self.defaults):
            fields["guidance"] = None
        request = make_request(fields)
        if request.count > MAX_IMAGES:
            raise UserError(f"{request.count} images are more than a page shows, {MAX_IMAGES}: use `darkroom sample`")
        return request

    def describe(self, request: GenerationRequest) -> str:
        """Describe the effective sampling of ``request`` in words."""
        if not isinstance(self.model, DiffusionModel):
            return f"{self.model.config.family}, in one pass"
        config = sampling_of(self.model, request, self.sampling)
        guidance = f", guidance {config.guidance_text}" if config.is_guided else ""
        return f"{config.sampler}, {config.steps} steps{guidance}"

    @cached_property
    def example_fields(self) -> dict[str, Any]:
        """Fields of a request for one image each of EXAMPLES prompts or classes, or for images if it knows neither.

        Prompts are the lines of NAME.prompts.txt beside NAME.safetensors, or captions of the data set in this
        workspace; classes are the most frequent ones.
        """
        header, fields = self.model.header, {"task": "sample", "count": EXAMPLES}
        if self.model.config.text and (prompts := self._known_prompts()):
            return fields | {"prompt": prompts, "count": len(prompts)}
        if self.model.classes:
            labels = sorted(self.model.classes, key=lambda label: -header.class_histogram[label])[:EXAMPLES]
            return fields | {"label": labels, "count": len(labels)}
        return fields

    def _known_prompts(self) -> list[str]:
        file = Path(self.name).with_suffix(".prompts.txt")
        if not self.is_registered and file.is_file():
            return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()][:EXAMPLES]
        folder = dataset_folder(self.model.header.dataset)
        if not (folder / "manifest.json").is_file():
            return []
        dataset = Dataset.open(folder)
        try:
            rows = dataset.rows("train")
            # Rows are in the order of their digests, so that these are a random choice.
            captions = dataset.captions(rows[: 20 * EXAMPLES])
            return [*dict.fromkeys(caption.strip() for caption in captions if caption and caption.strip())][:EXAMPLES]
        finally:
            dataset.close()

    def make_examples(self, progress: Progress = ignore_progress) -> GeneratedImages | None:
        """Generate the examples, once; None if the model needs an image, or they would take too long."""
        if not self._examples:
            self._examples.append(self._make_examples(progress))
        return self._examples[0]

    def _make_examples(self, progress: Progress) -> GeneratedImages | None:
        if "sample" not in tasks_of(self.model):
            return None
        deadline = time.monotonic() + MAX_EXAMPLE_SECONDS
        # A whole compute batch would take ten times as long.
        small = StudioSource(
            self.model, self.name, self.origin, self.sampling.with_changes({"compute_batch": EXAMPLES})
        )
        try:
            return small.generate(
                self.example_fields, progress, is_abandoned=lambda: time.monotonic() > deadline, title="Examples"
            )
        except DarkroomError as error:
            logger.warning("the studio begins without examples: %s", error)
            return None


def default_guidance(sampling: SamplingConfig) -> float:
    """Scale of guidance that a form shows for ``sampling``; 1 for none, and for autoguidance."""
    return 1.0 if sampling.guidance is None else sampling.guidance


def make_progress_callback(bar: gr.Progress) -> Progress:
    """Progress callback that moves the ``bar`` of a page, from any thread, with rate and time left."""
    context, lock, begun = copy_context(), threading.Lock(), time.monotonic()

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        words = [f"{done} of {total} {what}" if total else f"{done} {what}"]
        if done and (seconds := time.monotonic() - begun) > 0:
            rate = done / seconds
            words.append(f"{rate:.2g} per second" if rate < 10 else f"{rate:.0f} per second")
            words += [f"{clock((total - done) / rate)} left"] if total and total > done else []
        with lock:
            context.run(bar, done / total if total else None, desc=" · ".join(words))

    return show
