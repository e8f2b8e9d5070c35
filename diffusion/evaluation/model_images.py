"""Images that one model file generates under the conditions of an evaluation, cached with their features."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic_core import to_jsonable_python
from torch import Tensor

from diffusion.checkpoints import load_model, model_digest, read_model_header
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.fingerprint import fingerprint
from diffusion.common.shapes import Images, Shape, apportion, group_by_shape, interleave, shape_name, stack_images
from diffusion.common.threads import cores
from diffusion.data.dataset import Rows
from diffusion.evaluation.cache import Key, Tensors, load_or_compute, pieces_folder
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.metrics.metric import ImageSet
from diffusion.evaluation.real_images import CHUNK, SHOWN, RealImages, extractor_key
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions, is_conditional
from diffusion.generation.generate import conditions_of, labels_of
from diffusion.generation.super_resolution import generate
from diffusion.process.samplers import SamplingConfig

T = TypeVar("T")
BATCHES = 2
"""Compute batches per core in a cached piece: little is lost to a kill, and no core waits for long."""


class ModelImages:
    """Images of one model file, generated when they are needed: numbers 0 … ``samples`` − 1 of the configured seed.

    Super-resolution models upscale held-out images instead. ``generated`` holds images of earlier evaluations by all
    that they depend on but their number, and gets those of this one. ``captioned``: see ``Evaluator.model``.
    """

    def __init__(
        self,
        path: Path,
        real: RealImages,
        config: EvaluationConfig,
        samples: int,
        sampling: SamplingConfig,
        name: str,
        captioned: Rows | None,
        generated: dict[str, Tensor],
    ) -> None:
        self.header = read_model_header(path)
        self.sha256, self.digest = sha256_file(path), model_digest(path)
        self.path, self.real, self.config, self.captioned = path, real, config, captioned
        self.samples = samples if real.small is None else min(samples, len(real.shown))
        self.sampling = sampling = self.header.sampling(sampling)
        self.folder, self.name, self._generated = real.folder, name, generated
        self.fingerprint = fingerprint(sampling.compute_batch, sampling.precision, sampling.device)

    def progress(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Report progress under the model's name."""
        self.real.progress(f"{self.name}: {what}", done, total, note)

    @cached_property
    def model(self) -> Model:
        """Return the model."""
        return load_model(self.path)

    @cached_property
    def conditions(self) -> Conditions:
        """Return captions of real images for models with captions, else classes as frequent as in the data set."""
        if not self.header.model.text:
            return UNCONDITIONAL
        return conditions_of(self.real.dataset, self._captioned_rows, self.model.classes)

    @cached_property
    def _captioned_rows(self) -> list[int]:
        """Return the real images whose captions are the prompts."""
        dataset, rows = self.real.dataset, self.real.held_out if self.captioned is None else self.captioned
        captioned_rows = [row for row, caption in zip(rows, dataset.captions(rows), strict=True) if caption is not None]
        return captioned_rows[: self.config.samples]

    @cached_property
    def _rows(self) -> np.ndarray:
        """Return the real images whose captions or inputs the generated ones have, or else only the shapes."""
        if self.real.small is not None:
            return np.asarray(self.real.shown[: self.samples], np.int64)
        return np.asarray(self._captioned_rows if self.header.model.text else self.real.held_out, np.int64)

    @cached_property
    def shapes(self) -> list[Shape]:
        """Return the shape (H, W) of each image: shapes of held-out images in their shares, evenly spread.

        The inputs of super-resolution decide by themselves.
        """
        dataset = self.real.dataset
        if self.real.small is not None:
            return self.real.shapes(self._rows)
        counts = Counter(self.real.shapes(self._rows)) if len(dataset.shapes) > 1 and len(self._rows) else None
        counts = counts or Counter(dataset.shapes[:1])
        return [shape for shape, _ in interleave(apportion(counts, self.samples))]

    @cached_property
    def _numbers(self) -> dict[Shape, list[int]]:
        """Return the places of the images of each shape among all."""
        return group_by_shape(self.shapes)

    def _indices(self, shape: Shape) -> range:
        """Return the indices in the seed of the images of a shape, from 0 in the first one.

        Images of one index and as many values would have equal noise, and the bootstrap takes them for independent.
        """
        conditions = self._conditions_at(shape)
        cycle = math.lcm(self.sampling.compute_batch, len(conditions.labels) or 1, len(conditions.prompts) or 1)
        start = self.real.dataset.shapes.index(shape) * math.ceil(2**32 / cycle) * cycle
        return range(start, start + len(self._numbers[shape]))

    def _merge(self, values_by_shape: Mapping[Shape, Iterable[T]]) -> list[T]:
        """Put what there is of the images of each shape into the order of all."""
        values: dict[int, T] = {}
        for shape, numbers in self._numbers.items():
            values |= zip(numbers, values_by_shape[shape], strict=True)
        return [values[number] for number in range(self.samples)]

    def _conditions_at(self, shape: Shape) -> Conditions:
        """Return the conditions of the images of one shape: of several, the labels and captions of held-out ones."""
        if len(self.real.dataset.shapes) == 1 or self.real.small is not None or not self.is_conditional:
            return self.conditions
        rows = self._rows[[row_shape == shape for row_shape in self.real.shapes(self._rows)]]
        conditions = conditions_of(self.real.dataset, rows, self.model.classes)
        return conditions if self.header.model.text else conditions.model_copy(update={"prompts": ()})

    @property
    def is_conditional(self) -> bool:
        """Return whether images have a class or caption that guidance leads towards."""
        return self.header.model.low_resolution is None and is_conditional(self.model.classes, self.conditions)

    @cached_property
    def guided(self) -> SamplingConfig:
        """Return the sampling configuration, without guidance if the model has no conditions."""
        return self.sampling if self.is_conditional else self.sampling.without_guidance()

    @cached_property
    def images(self) -> Images:
        """Return the generated images, each (C, H, W) uint8."""
        images = {}
        for shape in self._numbers:
            key = self._key_at(shape)
            images[shape] = load_or_compute(self.folder, key, partial(self._generate, shape, key))["images"]
            self._generated[_compute_digest(key)] = images[shape]
        return next(iter(images.values())) if len(images) == 1 else self._merge(images)

    def images_at(self, numbers: Sequence[int]) -> Images:
        """Return the generated images of these ``numbers``."""
        images = self.images
        return [images[number] for number in numbers] if isinstance(images, list) else images[numbers]

    def _generate(self, shape: Shape, images_key: Key) -> Tensors:
        """Generate the images of a shape in pieces of whole compute batches, bit-identical to one pass.

        They are cached until all are there, and ``images_key`` is the key of all. Those of an evaluation on fewer
        images, as many as fill compute batches, are the first of them.
        """
        batch, count = self.sampling.compute_batch, len(self._numbers[shape])
        size = BATCHES * cores() * batch
        folder = pieces_folder(self.folder, images_key)
        previous_images = self._generated.get(_compute_digest(images_key), torch.empty(0))
        reused_count = min(len(previous_images), count) // batch * batch

        def piece(start: int) -> Tensors:
            numbers = range(start, min(start + size, count))

            def report_progress(what: str, done: int, total: int | None, note: str = "") -> None:
                counts_images = total == len(numbers)
                self.progress(what, start + done if counts_images else done, count if counts_images else total, note)

            inputs = None if self.real.small is None else self.real.small[shape][start : numbers.stop]
            seed, conditions, model = self.config.seed, self._conditions_at(shape), self.model
            model = model if inputs is not None else model.with_size(shape)
            indices = self._indices(shape)[numbers.start : numbers.stop]
            return {"images": generate(model, inputs, indices, seed, self.guided, report_progress, conditions)}

        pieces = [previous_images[:reused_count]] if reused_count else []
        for start in range(reused_count, count, size):
            key = {"kind": "piece", "first": start, "count": min(size, count - start)}
            pieces.append(load_or_compute(folder, key, partial(piece, start))["images"])
        return {"images": torch.cat(pieces)}

    @cached_property
    def features(self) -> Tensor:
        """Return the features of the generated images, (samples, D) float32."""
        return load_or_compute(self.folder, self.features_key, lambda: {"features": self.real.extractor(self.images)})[
            "features"
        ]

    @property
    def image_set(self) -> ImageSet:
        """Return the generated images as metrics see them."""
        return ImageSet(self.features, self.pieces)

    def pieces(self) -> list[Images]:
        """Return the generated images in chunks."""
        return [self.images[start : start + CHUNK] for start in range(0, len(self.images), CHUNK)]

    @cached_property
    def labels(self) -> Tensor | None:
        """Return the class of each image, (samples,), see ``labels_of``; None for models without classes."""
        if self.header.model.low_resolution or not self.model.classes:
            return None
        groups = {}
        for shape in self._numbers:
            labels = labels_of(self.model, self._indices(shape), self.config.seed, self._conditions_at(shape))
            assert labels is not None
            groups[shape] = labels
        return next(iter(groups.values())) if len(groups) == 1 else torch.stack(self._merge(groups))

    @property
    def captions(self) -> list[str]:
        """Return the prompt, or else the class, of each of the first images; empty if they have none."""
        if self.header.model.low_resolution:
            return []
        numbers, names = range(min(self.samples, SHOWN)), [*self.model.classes, ""]
        classes = [""] * len(numbers) if self.labels is None else [names[n] for n in self.labels[: len(numbers)]]
        prompts = self._merge(
            {
                shape: [conditions.prompt(number) for number in range(len(shape_numbers))]
                for shape, shape_numbers in self._numbers.items()
                for conditions in [self._conditions_at(shape)]
            }
        )
        captions = [prompts[n] or name for n, name in zip(numbers, classes, strict=True)]
        return captions if any(captions) else []

    @property
    def generated_key(self) -> Key:
        """Return the cache key of the generated images."""
        key: Key = {"kind": "generated", "format_version": 3, "model": self.digest, "samples": self.samples}
        key |= {"seed": self.config.seed, "sampling": self.sampling, "fingerprint": self.fingerprint}
        if self.header.model.text or self.header.model.low_resolution is not None:
            # Real captions or small images condition the model. Other models' images suit every data set.
            digest = self.real.dataset.manifest.content_digest
            key |= {"content_digest": digest, "reference": self.config.reference}
        if self.header.model.text and self.captioned is not None:
            key |= {"captioned": self.real.key(self.captioned)}
        if len(self.real.dataset.shapes) > 1 or self.header.shapes is not None:
            digest = self.real.dataset.manifest.content_digest
            key |= {"content_digest": digest, "shapes": [shape_name(shape) for shape in self.real.dataset.shapes]}
            key |= {"indices": "of each shape"}
        return key

    def _key_at(self, shape: Shape) -> Key:
        """Return the cache key of the generated images of a shape; for a data set of one shape, of all images."""
        if len(self.real.dataset.shapes) == 1:
            return self.generated_key
        return self.generated_key | {"samples": len(self._numbers[shape]), "shape": shape_name(shape)}

    @property
    def features_key(self) -> Key:
        """Return the cache key of the features of the generated images."""
        key: Key = {"kind": "features of generated images", "format_version": 1, "generated": self.generated_key}
        return key | extractor_key(self.real.extractor)


def _compute_digest(key: Key) -> str:
    """Compute the digest of the ``key`` of generated images for any number of them."""
    return digest_of(to_jsonable_python(key | {"samples": None}))


def restore_order(shapes: Sequence[Shape], images: Mapping[Shape, Tensor]) -> Images:
    """Put images of each shape into the order of ``shapes``, of which there may be fewer."""
    iterators = {shape: iter(batch) for shape, batch in images.items()}
    return stack_images([next(iterators[shape]) for shape in shapes])
