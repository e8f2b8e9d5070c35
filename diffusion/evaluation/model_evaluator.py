"""Evaluation of one model file: the images that it generates under equal conditions, and metrics of any model."""

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
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import load_model, model_digest, read_model_header
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.fingerprint import fingerprint
from diffusion.common.shapes import (
    Images,
    Shape,
    apportion,
    group_by_shape,
    height_and_width,
    interleave,
    shape_name,
    stack_images,
)
from diffusion.common.threads import cores
from diffusion.data.dataset import Rows
from diffusion.evaluation.cache import (
    Key,
    Tensors,
    find_cached,
    load_or_compute,
    load_or_compute_result,
    pieces_folder,
)
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.text_image_encoder import OPTION, TextImageEncoder
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.metric import ImageSet
from diffusion.evaluation.metrics.per_group import PerShape, evaluate_shapes
from diffusion.evaluation.metrics.pixel_metrics import compare_images, psnr, ssim
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.metrics.text_image_agreement import (
    Cosines,
    TextImageAgreement,
    compute_cosines,
    number_of_each,
    summarize_agreement,
)
from diffusion.evaluation.real_images import CHUNK, SHOWN, RealImages, extractor_key
from diffusion.evaluation.results import ModelScores, Reconstruction
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions, is_conditional
from diffusion.generation.generate import conditions_of, labels_of, reconstruct_images
from diffusion.generation.super_resolution import generate
from diffusion.process.samplers import SamplingConfig

T = TypeVar("T")
BATCHES = 2
"""Compute batches per core in a cached piece: little is lost to a kill, and no core waits for long."""


class ModelEvaluator:
    """Lazy evaluation of one model file; expensive parts are cached.

    Its images are generated when they are needed: numbers ``first`` … ``first`` + ``samples`` − 1 of the configured
    seed, where ``first`` is a multiple of the compute batch.

    Super-resolution models upscale held-out images instead. ``generated`` holds images of earlier evaluations by all
    that they depend on but their number, and gets the images of this one. ``captioned``: see ``Evaluator.model``.
    """

    encoder: TextImageEncoder | None = None
    """The encoder that measures text-image agreement, if any."""

    def __init__(
        self,
        path: Path,
        real: RealImages,
        config: EvaluationConfig,
        first: int,
        samples: int,
        sampling: SamplingConfig,
        name: str,
        captioned: Rows | None,
        generated: dict[str, Tensor],
    ) -> None:
        self.header = read_model_header(path)
        self.sha256, self.digest = sha256_file(path), model_digest(path)
        self.path, self.real, self.config, self.first, self.captioned = path, real, config, first, captioned
        self.samples = samples if real.small is None else min(samples, len(real.shown))
        self.sampling = sampling = self.header.sampling(sampling)
        self.folder, self.name, self._generated = real.folder, name, generated
        self.fingerprint = fingerprint(sampling.compute_batch, sampling.precision, sampling.device)

    def progress(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Report progress under the model's name."""
        self.real.progress(f"{self.name}: {what}", done, total, note)

    @cached_property
    def model(self) -> Model:
        """Return the model, a pipeline for images of the data set's size."""
        model, shape = load_model(self.path), self.real.dataset.shape
        return model if self.header.square == shape else model.with_size(shape[1:])

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
        """Return the indices in the seed of the images of a shape, from ``first`` in the first one.

        Images of one index and as many values would have equal noise, and the bootstrap takes them for independent.
        """
        conditions = self._conditions_at(shape)
        cycle = math.lcm(self.sampling.compute_batch, len(conditions.labels) or 1, len(conditions.prompts) or 1)
        start = self.real.dataset.shapes.index(shape) * math.ceil(2**32 / cycle) * cycle + self.first
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
            whole_batches = load_or_compute(self.folder, key, partial(self._generate, shape, key))["images"]
            self._generated[_compute_digest(key)] = whole_batches
            images[shape] = whole_batches[: len(self._numbers[shape])]
        return next(iter(images.values())) if len(images) == 1 else self._merge(images)

    def images_at(self, numbers: Sequence[int]) -> Images:
        """Return the generated images of these ``numbers``."""
        images = self.images
        return [images[number] for number in numbers] if isinstance(images, list) else images[numbers]

    def _generate(self, shape: Shape, images_key: Key) -> Tensors:
        """Generate the images of a shape in pieces of whole compute batches, bit-identical to one pass.

        They are cached until all are there, and ``images_key`` is the key of all. Those of an earlier evaluation are
        the first of them. The rest of the last compute batch is kept, too, as it costs nothing.
        """
        batch, requested = self.sampling.compute_batch, len(self._numbers[shape])
        count = requested if self.real.small is not None else math.ceil(requested / batch) * batch
        size, begin = BATCHES * cores() * batch, self._indices(shape).start
        folder = pieces_folder(self.folder, images_key)
        previous_images = self._find_generated(images_key)
        reused_count = min(len(previous_images), count) // batch * batch

        def piece(start: int) -> Tensors:
            numbers = range(start, min(start + size, count))

            def report_progress(what: str, done: int, total: int | None, note: str = "") -> None:
                if total == len(numbers):  # it counts images
                    done, total = min(start + done, requested), requested
                self.progress(what, done, total, note)

            inputs = None if self.real.small is None else self.real.small[shape][start : numbers.stop]
            seed, conditions, model = self.config.seed, self._conditions_at(shape), self.model
            model = model if inputs is not None else model.with_size(shape)
            indices = range(begin + numbers.start, begin + numbers.stop)
            return {"images": generate(model, inputs, indices, seed, self.guided, report_progress, conditions)}

        pieces = [previous_images[:reused_count]] if reused_count else []
        for start in range(reused_count, count, size):
            key = {"kind": "piece", "first": start, "count": min(size, count - start)}
            pieces.append(load_or_compute(folder, key, partial(piece, start))["images"])
        return {"images": torch.cat(pieces)}

    def _find_generated(self, images_key: Key) -> Tensor:
        """Return the first images of ``images_key``, as many as an earlier evaluation generated, perhaps none.

        An evaluation of checkpoints begins with image 0, and part of what it generated may come after ``first``.
        """
        previous_images = self._generated.get(_compute_digest(images_key))
        if previous_images is not None:
            return previous_images
        from_zero = {name: value for name, value in images_key.items() if name != "first"}
        cached = find_cached(self.folder, from_zero | {"samples": self.config.samples}) if self.first else None
        return torch.empty(0) if cached is None else cached["images"][self.first :]

    @cached_property
    def features(self) -> Tensor:
        """Return the features of the generated images, (samples, D) float32."""
        work = lambda: {"features": self.real.extractor(self.images)}  # noqa: E731
        return load_or_compute(self.folder, self.features_key, work)["features"]

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
                shape: [conditions.prompt(index) for index in self._indices(shape)]
                for shape in self._numbers
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
        if self.first:
            key["first"] = self.first
        if self.header.model.text or self.header.model.low_resolution is not None:
            # Real captions or small images condition the model. Other models' images suit every data set.
            digest = self.real.dataset.manifest.content_digest
            key |= {"content_digest": digest, "reference": self.config.reference}
        if self.header.model.text and self.captioned is not None:
            key |= {"captioned": self.real.key(self.captioned)}
        if self.header.square != self.real.dataset.shape:
            key |= {"square": self.real.dataset.manifest.size}
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

    @cached_property
    def scores(self) -> Scores:
        """Return the distances of the generated images to held-out ones."""
        return self.real.scores(self.features_key, self.image_set)

    @cached_property
    def per_shape(self) -> PerShape | None:
        """Return metrics by shape; None for a data set of one shape."""
        real = self.real
        if len(real.dataset.shapes) == 1:
            return None
        reference = real.reference.features
        return evaluate_shapes(self.features, self.shapes, reference, real.shapes(real.compared), real.extractor.name)

    @cached_property
    def cosines(self) -> tuple[Cosines, Cosines] | str | None:
        """Return cosines of generated and of real images with the prompts; why there are none; None without captions.

        The real images are those that the prompts are captions of.
        """
        if not self.header.model.text:
            return None
        encoder, real = self.encoder, self.real
        if encoder is None:
            return f"set {OPTION}"
        rows = np.array(self._captioned_rows, np.int64)
        captions, prompts = number_of_each([caption or "" for caption in real.dataset.captions(rows)])
        # They are used in turn if there are more images than captions.
        image_prompts = prompts
        if len(prompts):
            places = group_by_shape(real.shapes(rows)) if len(real.dataset.shapes) > 1 else {}
            positions = {}
            for shape, numbers in self._numbers.items():
                shape_places = places.get(shape, range(len(rows)))
                positions[shape] = [
                    shape_places[(self.first + number) % len(shape_places)] for number in range(len(numbers))
                ]
            image_prompts = prompts[torch.tensor(self._merge(positions))]
        if len(set(image_prompts.tolist())) < 2:
            return "the images have fewer than two different prompts: ingest captions"
        key: Key = extractor_key(encoder)
        texts_key: Key = {"kind": "embeddings of texts", "format_version": 1, "texts": digest_of(captions)} | key
        texts = load_or_compute(self.folder, texts_key, lambda: {"texts": encoder.embed(captions)})["texts"]
        images_key: Key = {"kind": "embeddings of generated images", "format_version": 1} | key
        images_key["generated"] = self.generated_key
        images = load_or_compute(self.folder, images_key, lambda: {"images": encoder(self.images)})["images"]
        real_embeddings = real.features(rows, extractor=encoder)
        if len(widths := {texts.shape[1], images.shape[1]}) > 1:
            raise UserError(
                f"{OPTION} = {encoder.folder} embeds images and texts in {widths} dimensions: use one model"
            )
        return compute_cosines(images, texts, image_prompts), compute_cosines(real_embeddings, texts, prompts)

    @property
    def text_image_agreement(self) -> TextImageAgreement | str | None:
        """Return the agreement of images with their prompts, or why it is not measured; None without captions."""
        cosines, encoder = self.cosines, self.encoder
        if isinstance(cosines, tuple):
            assert encoder is not None
            return summarize_agreement(encoder.name, *cosines)
        return cosines

    @property
    def reconstructed(self) -> Images | None:
        """Return reconstructions of the first held-out images, uint8; None without an autoencoder."""
        batches = [images for name, images in self._reconstruction[1].items() if name.startswith("shown")]
        if len(batches) < 2:
            return next(iter(batches), None)
        shapes = self.real.shapes(self.real.held_out[:SHOWN])
        return restore_order(shapes, {height_and_width(images): images for images in batches})

    @property
    def psnr(self) -> Tensor | None:
        """Return the PSNR in dB of each reconstructed held-out image, (M,); None without an autoencoder."""
        return self._reconstruction[1].get("psnr")

    @cached_property
    def _reconstruction(self) -> tuple[Reconstruction | None, Tensors]:
        """Return the reconstruction metrics of the model's autoencoder with the tensors above, if it has one."""
        if self.header.model.evaluated_by != "reconstructions" and self.header.latents is None:
            return None, {}
        real = self.real
        rows = real.held_out if self.samples >= self.config.samples else real.held_out[: self.samples]

        def work() -> tuple[Reconstruction, Tensors]:
            model = self.model.to(resolve_device(self.sampling.device))
            ratios, ssims, features, examples = list[Tensor](), list[Tensor](), list[Tensor](), dict[str, Tensor]()
            for images in real.read_by_bucket(rows):
                outputs = reconstruct_images(model, images, self.sampling)
                ratios.append(psnr(outputs, images))
                ssims.append(ssim(outputs, images))
                features.append(real.extractor(outputs))
                suffix = "" if len(real.dataset.shapes) == 1 else f"/{shape_name(height_and_width(images))}"
                examples.setdefault(f"shown{suffix}", outputs[:SHOWN])
                self.progress("images reconstructed", sum(map(len, ratios)), len(rows))
            image_psnr = torch.cat(ratios)
            reconstruction = Reconstruction(
                extractor=real.extractor.name,
                images=len(image_psnr),
                psnr=image_psnr.mean().item(),
                psnr_se=image_psnr.std().item() / math.sqrt(len(image_psnr)),
                ssim=torch.cat(ssims).mean().item(),
                fd=frechet_distance(compute_moments(torch.cat(features)), real.reference.moments),
            )
            return reconstruction, {"psnr": image_psnr, **examples}

        key = self.held_out_key("reconstructions", len(rows)) | {"extractor_digest": real.extractor.digest}
        return load_or_compute_result(self.folder, key, Reconstruction, work)

    def compute_model_scores(self) -> ModelScores:
        """Return the metrics that every model has."""
        similarity = None
        if self.header.model.low_resolution is not None:
            real = self.real.dataset.images_in_order(self.real.shown[: self.samples])
            similarity = compare_images(self.images, real)
        return ModelScores(
            sha256=self.sha256,
            family=self.header.model.family,
            images=self.header.images,
            fingerprint=self.fingerprint,
            scores=self.scores,
            reconstruction=self._reconstruction[0],
            similarity=similarity,
            text_image_agreement=self.text_image_agreement,
            per_shape=self.per_shape,
        )

    def held_out_key(self, kind: str, count: int) -> Key:
        """Return the cache key of what is computed of the first ``count`` held-out images."""
        digest = self.real.dataset.manifest.content_digest
        key: Key = {"kind": kind, "format_version": 4, "model": self.digest, "content_digest": digest}
        return key | {"count": count, "fingerprint": self.fingerprint}


def count_gflop(model: Model, config: SamplingConfig) -> float:
    """Count the operations, in 10⁹, of an image's matrix products and convolutions: unlike seconds, always the same."""
    operations = 0
    for times, forward in model.passes(config):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            forward()
        operations += times * counter.get_total_flops()
    return float(operations / 1e9)


def _compute_digest(key: Key) -> str:
    """Compute the digest of the ``key`` of generated images for any number of them."""
    return digest_of(to_jsonable_python(key | {"samples": None}))


def restore_order(shapes: Sequence[Shape], images: Mapping[Shape, Tensor]) -> Images:
    """Put images of each shape into the order of ``shapes``, of which there may be fewer."""
    iterators = {shape: iter(batch) for shape, batch in images.items()}
    return stack_images([next(iterators[shape]) for shape in shapes])
