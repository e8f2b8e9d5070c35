"""The evaluator: generates images from model files, extracts features and computes metrics, under equal conditions.

Images, features, neighbours, losses and halves are each cached in a file under a digest of the weights and everything
else they depend on: work continues after a kill, and unchanged results are not computed again.
"""

import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import torch
from pydantic_core import to_jsonable_python
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import load_model, model_digest, read_model_header
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.fingerprint import fingerprint
from diffusion.common.progress import Progress, silent
from diffusion.common.threads import cores
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.bootstrap import FEWEST_FOR_ERRORS, SPLITS, Figure, Replicates, compute_halves
from diffusion.evaluation.cache import Key, Tensors, cached, cached_result, pieces_folder
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.features.feature_extractor import Extractor, make_extractor
from diffusion.evaluation.features.label_classifier import load_label_classifier
from diffusion.evaluation.metrics.copies import detect_duplicates, detect_memorization
from diffusion.evaluation.metrics.distances import Scores, compute_moments, frechet_distance
from diffusion.evaluation.metrics.held_out_loss import (
    HeldOutLoss,
    conditioning_of_rows,
    measure_losses,
    summarize_losses,
)
from diffusion.evaluation.metrics.per_class import Labelled, PerClass, evaluate_classes
from diffusion.evaluation.metrics.pixel_metrics import (
    RESAMPLING,
    ResamplingBaseline,
    compare_appearance,
    compare_images,
    psnr,
    resample,
    ssim,
)
from diffusion.evaluation.real_images import CHUNK, SHOWN, RealImages, appearance_of_pieces, thumbnails_of_pieces
from diffusion.evaluation.results import (
    EvaluationConditions,
    ModelEvaluation,
    ModelScores,
    RealBaseline,
    Reconstruction,
)
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions, is_conditional
from diffusion.generation.generate import conditions_of, labels_of, reconstructed
from diffusion.generation.super_resolution import GenerationTask, generate, task_of
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import SamplingConfig

CACHE = "evaluations"
"""Name of the cache folder inside the folder of an evaluation."""
FEWEST = 10
"""Fewest images of either split for which metrics are meaningful."""
BATCHES = 2
"""Compute batches per core in a cached piece: little is lost to a kill, and no core waits for long."""
MetricReplicates = dict[Figure, Replicates]
"""Metrics of one model with their values on halves; empty if there are too few images for errors."""


def require_enough(data: Path) -> None:
    """Raise UserError if a split of the data set in folder ``data`` is too small for an evaluation."""
    for split, count in read_manifest(data).counts.items():
        if count < FEWEST:
            raise UserError(
                f"data set {data} has {count} {split.replace('_', '-').replace('train', 'training')} images, "
                f"and evaluation needs {FEWEST}: ingest more, or change ingest.held_out"
            )


class Evaluator:
    """Evaluator of model files against the held-out images of the data set in folder ``data``.

    Results are cached in ``folder``, for all evaluators of the same data set. Super-resolution models upscale one part
    of the held-out images and are compared with the others. Raises UserError for a data set that is too small.
    """

    def __init__(
        self,
        data: Path,
        config: EvaluationConfig,
        sampling: SamplingConfig,
        folder: Path,
        progress: Progress = silent,
        task: GenerationTask = GenerationTask(),  # noqa: B008 (frozen)
    ) -> None:
        require_enough(data)
        dataset = Dataset.open(data)
        if config.extractor == "labels":
            extractor: Extractor = load_label_classifier(dataset, config.extractor_size, folder, progress)
        else:
            extractor = make_extractor(config)
        self.real = RealImages(dataset, extractor, config.reference, config.samples, folder, task, progress)
        self.config, self.sampling, self.folder, self.progress = config, sampling, folder, progress
        self.generated: dict[str, Tensor] = {}
        """Images of the last evaluation of each model, by all that they depend on but their number."""
        self.conditions = EvaluationConditions(
            content_digest=dataset.manifest.content_digest,
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            preprocessing=extractor.preprocessing,
            evaluation=config,
            sampling=sampling,
            low_resolution=task.low_resolution,
        )

    def model(
        self,
        path: Path,
        samples: int | None = None,
        sampling: SamplingConfig | None = None,
        name: str = "",
        seed: int | None = None,
        captioned: Rows | None = None,
    ) -> "ModelEvaluator":
        """Return the lazy evaluation of the model in the file ``path``, a checkpoint or a final model.

        ``samples``, ``sampling`` and ``seed`` of the images are as configured if None; ``name`` is shown with progress,
        by default the file's; ``captioned``: images whose captions condition a model with captions, by default held-out
        ones. Raises UserError if the file does not exist, is not a model, or has another image shape or task.
        """
        config = self.config if seed is None else self.config.model_copy(update={"seed": seed})
        samples, sampling = samples or config.samples, sampling or self.sampling
        found = ModelEvaluator(path, self, config, samples, sampling, name or path.stem, captioned)
        header, dataset = found.header, self.real.dataset
        if (shape := (header.channels, header.size, header.size)) != dataset.shape:
            raise UserError(
                f"{path} generates images of {'×'.join(map(str, shape))} and {dataset.folder} holds "
                f"{'×'.join(map(str, dataset.shape))} (channels × height × width): "
                "evaluate it on the data set it was trained on"
            )
        theirs, ours = task_of(header.model), self.real.task
        if theirs.low_resolution != ours.low_resolution:
            raise UserError(
                f"{path} {theirs.description}, and what it would be compared with {ours.description}: scores say "
                "nothing of two tasks"
            )
        return found

    def replicates(self, models: Sequence["ModelEvaluator"]) -> list[MetricReplicates]:
        """Return metrics on halves for each model, then for the real baseline; empty if a set has too few images."""
        real, seed = self.real, self.config.seed
        # As many as are generated, since the Fréchet distance depends on their number.
        count = max(len(each.features) for each in models)
        baseline_key, baseline = real.real_baseline(seed, count)
        sets, reference = [*(each.features for each in models), baseline], real.reference.features
        if min(map(len, (*sets, reference))) < FEWEST_FOR_ERRORS:
            return [{} for _ in sets]
        scores = [*(each.scores for each in models), real.scores(baseline_key, baseline)]

        def work() -> Tensors:
            found = compute_halves(sets, reference, SPLITS, self.progress)
            return {f"{n}/{figure}": halves for n, each in enumerate(found) for figure, halves in each.items()}

        key: Key = {"kind": "halves", "format_version": 3, "generated": [each.features_key for each in models]}
        key |= {"real_baseline": [seed, count], "training": real.key(real.train), "compared": real.key(real.compared)}
        kept = cached(self.folder, key | {"splits": SPLITS}, work)
        count, dimensions = reference.shape
        return [
            {f: Replicates(f, score.of(f), kept[f"{n}/{f}"], samples, count, dimensions) for f in get_args(Figure)}
            for n, (samples, score) in enumerate(zip(map(len, sets), scores, strict=True))
        ]

    def real_baseline(self, replicates: MetricReplicates) -> RealBaseline:
        """Return the metrics of real training images in the place of generated ones."""
        count = replicates["kid"].samples if replicates else self.real.samples
        scores = self.real.scores(*self.real.real_baseline(self.config.seed, count))
        return RealBaseline(scores=scores, estimates=self.estimates(replicates))

    def estimates(self, replicates: MetricReplicates) -> dict[str, MetricEstimate]:
        """Return estimates of metrics by name, such as kid_efflite0."""
        extractor = self.conditions.extractor
        return {f"{figure}_{extractor}": MetricEstimate.of(each.estimate) for figure, each in replicates.items()}

    def baselines(self) -> dict[str, ResamplingBaseline] | None:
        """Return the scores of resampling for super-resolution models; None for other models."""
        real, low_resolution = self.real, self.real.task.low_resolution
        if low_resolution is None:
            return None

        def compute(name: str) -> tuple[ResamplingBaseline, Tensors]:
            assert real.small is not None
            large = resample(real.small, real.dataset.manifest.size // low_resolution, name)
            alike = compare_images(large, torch.cat(list(real.images(real.shown))))
            return ResamplingBaseline(scores=real.score(real.extractor(large)), similarity=alike), {}

        key: Key = {"kind": "baseline", "format_version": 2, "samples": len(real.shown)}
        key |= {"low_resolution": low_resolution, "compared": real.key(real.compared)}
        return {
            name: cached_result(self.folder, key | {"name": name}, ResamplingBaseline, partial(compute, name))[0]
            for name in RESAMPLING
        }


class ModelEvaluator:
    """Lazy evaluation of one model file under an evaluator's conditions; expensive parts are cached.

    It generates image numbers 0 … ``samples`` − 1 of the configured seed, or upscales held-out images.
    """

    def __init__(
        self,
        path: Path,
        evaluator: Evaluator,
        config: EvaluationConfig,
        samples: int,
        sampling: SamplingConfig,
        name: str,
        captioned: Rows | None,
    ) -> None:
        self.header = read_model_header(path)
        self.sha256, self.digest = sha256_file(path), model_digest(path)
        self.path, self.evaluator = path, evaluator
        self.real = evaluator.real
        self.config, self.captioned = config, captioned
        self.samples = samples if evaluator.real.small is None else min(samples, len(evaluator.real.shown))
        self.sampling = sampling = self.header.sampling(sampling)
        self.folder = evaluator.folder
        self.name = name
        self.fingerprint = fingerprint(sampling.compute_batch, sampling.precision, sampling.device)

    def progress(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Report progress under the model's name."""
        self.evaluator.progress(f"{self.name}: {what}", done, total, note)

    @cached_property
    def model(self) -> Model:
        """Return the model."""
        return load_model(self.path)

    @cached_property
    def conditions(self) -> Conditions:
        """Return captions of real images for models with captions, else classes as frequent as in the data set."""
        if not self.header.model.text:
            return UNCONDITIONAL
        dataset, rows = self.real.dataset, self.real.held_out if self.captioned is None else self.captioned
        captioned = [row for row, caption in zip(rows, dataset.captions(rows), strict=True) if caption is not None]
        return conditions_of(dataset, captioned[: self.config.samples], self.model.classes)

    @property
    def is_conditional(self) -> bool:
        """Return whether images have a class or caption that guidance leads towards."""
        return self.header.model.low_resolution is None and is_conditional(self.model.classes, self.conditions)

    @cached_property
    def guided(self) -> SamplingConfig:
        """Return the sampling configuration, without guidance if the model has no conditions."""
        return self.sampling if self.is_conditional else self.sampling.unguided()

    @cached_property
    def images(self) -> Tensor:
        """Return the generated images, (samples, C, H, W) uint8."""
        images = cached(self.folder, self.generated_key, lambda: {"images": self._generate()})["images"]
        self.evaluator.generated[self._numbered_key] = images
        return images

    def _generate(self) -> Tensor:
        """Generate all images in pieces of whole compute batches, bit-identical to one pass, cached until all are.

        Those of an evaluation on fewer images, as many as fill compute batches, are the first of them.
        """
        batch = self.sampling.compute_batch
        size = BATCHES * cores() * batch
        folder = pieces_folder(self.folder, self.generated_key)
        before = self.evaluator.generated.get(self._numbered_key, torch.empty(0))
        first = min(len(before), self.samples) // batch * batch

        def piece(start: int) -> Tensors:
            numbers = range(start, min(start + size, self.samples))

            def counted(what: str, done: int, total: int | None, note: str = "") -> None:
                of_images = total == len(numbers)
                self.progress(what, start + done if of_images else done, self.samples if of_images else total, note)

            inputs = None if self.real.small is None else self.real.small[start : numbers.stop]
            seed, conditions = self.config.seed, self.conditions
            return {"images": generate(self.model, inputs, numbers, seed, self.guided, counted, conditions)}

        pieces = [before[:first]] if first else []
        for start in range(first, self.samples, size):
            key = {"kind": "piece", "first": start, "count": min(size, self.samples - start)}
            pieces.append(cached(folder, key, partial(piece, start))["images"])
        return torch.cat(pieces)

    @cached_property
    def features(self) -> Tensor:
        """Return the features of the generated images, (samples, D) float32."""
        kept = cached(self.folder, self.features_key, lambda: {"features": self.real.extractor(self.images)})
        return kept["features"]

    @cached_property
    def scores(self) -> Scores:
        """Return the distances of the generated images to held-out ones."""
        return self.real.scores(self.features_key, self.features)

    @cached_property
    def labels(self) -> Tensor | None:
        """Return the class of each image, (samples,), see ``labels_of``; None for models without classes."""
        if self.header.model.low_resolution:
            return None
        return labels_of(self.model, range(self.samples), self.config.seed, self.conditions)

    @property
    def captions(self) -> list[str]:
        """Return the prompt, or else the class, of each of the first images; empty if they have none."""
        if self.header.model.low_resolution:
            return []
        numbers, names = range(min(self.samples, SHOWN)), [*self.model.classes, ""]
        classes = [""] * len(numbers) if self.labels is None else [names[n] for n in self.labels[: len(numbers)]]
        found = [self.conditions.prompt(n) or name for n, name in zip(numbers, classes, strict=True)]
        return found if any(found) else []

    @cached_property
    def per_class(self) -> PerClass | None:
        """Return metrics by class; None for models without classes, or none that the data set has images of."""
        classes, real = self.model.classes, self.real
        if self.labels is None or not real.dataset.manifest.class_histogram.keys() & set(classes):
            return None
        generated = Labelled(self.features, self.labels)
        return evaluate_classes(generated, real.labelled(classes), real.reader(classes), classes, real.extractor.name)

    @cached_property
    def held_out_loss(self) -> HeldOutLoss:
        """Return the loss on as many held-out images as are generated."""
        rows = self.real.held_out[: self.config.samples]

        def work() -> Tensors:
            dataset = self.real.dataset
            chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
            pieces = ((dataset.images(some), conditioning_of_rows(self.model, dataset, some)) for some in chunks)
            terms = measure_losses(self.model, pieces, self.sampling, self.progress)
            bits = {} if terms.bits is None else {"bits": terms.bits}
            return {"edges": terms.edges, "losses": terms.losses, **bits}

        kept = cached(self.folder, self._held_out_key("losses", len(rows)), work)
        return summarize_losses(Terms(kept["edges"], kept["losses"], kept.get("bits")))

    @property
    def reconstructed(self) -> Tensor | None:
        """Return reconstructions of the first held-out images, (N, C, H, W) uint8; None without an autoencoder."""
        return self._reconstruction[1].get("shown")

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
            model = self.model.on(resolve_device(self.sampling.device))
            ratios, similar, features, back = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
            for images in real.images(rows):
                back.append(reconstructed(model, images, self.sampling))
                ratios.append(psnr(back[-1], images))
                similar.append(ssim(back[-1], images))
                features.append(real.extractor(back[-1]))
                self.progress("images reconstructed", sum(map(len, ratios)), len(rows))
            of_each = torch.cat(ratios)
            found = Reconstruction(
                extractor=real.extractor.name,
                images=len(of_each),
                psnr=of_each.mean().item(),
                psnr_se=of_each.std().item() / math.sqrt(len(of_each)),
                ssim=torch.cat(similar).mean().item(),
                fd=frechet_distance(compute_moments(torch.cat(features)), real.reference.moments),
            )
            return found, {"psnr": of_each, "shown": back[0][:SHOWN]}

        key = self._held_out_key("reconstructions", len(rows)) | {"extractor_digest": real.extractor.digest}
        return cached_result(self.folder, key, Reconstruction, work)

    def scored(self) -> ModelScores:
        """Return the metrics that every model has."""
        similarity = None
        if self.header.model.low_resolution is not None:
            real = torch.cat(list(self.real.images(self.real.shown[: self.samples])))
            similarity = compare_images(self.images, real)
        return ModelScores(
            sha256=self.sha256,
            family=self.header.model.family,
            images=self.header.images,
            fingerprint=self.fingerprint,
            scores=self.scores,
            reconstruction=self._reconstruction[0],
            similarity=similarity,
        )

    def evaluate(self) -> ModelEvaluation:
        """Return all metrics, without estimates."""
        real, pieces = self.real, torch.split(self.images, CHUNK)
        mirrored = bool(self.header.training.get("flip", False))  # then mirrored copies count as well
        nearest = real.neighbours(self.features_key, pieces, self.features, mirrored)
        rows = real.held_out
        nearest_to_real = real.neighbours(real.key(rows), real.images(rows), real.features(rows), mirrored)
        return ModelEvaluation(
            **dict(self.scored()),
            sampling=self.guided,
            memorization=detect_memorization(nearest, nearest_to_real),
            duplicates=detect_duplicates(thumbnails_of_pieces(pieces), real.thumbnails),
            drift=compare_appearance(appearance_of_pieces(pieces), real.appearance),
            per_class=self.per_class,
            held_out_loss=self.held_out_loss,
            gflop=gflop(self.model, self.guided),
        )

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
        return key

    @property
    def _numbered_key(self) -> str:
        """Return the digest of ``generated_key`` for any number of images."""
        return digest_of(to_jsonable_python(self.generated_key | {"samples": None}))

    @property
    def features_key(self) -> Key:
        """Return the cache key of the features of the generated images."""
        key: Key = {"kind": "features of generated images", "format_version": 1, "generated": self.generated_key}
        return key | self.real.extractor_key

    def _held_out_key(self, kind: str, count: int) -> Key:
        """Return the cache key of what is computed of the first ``count`` held-out images."""
        digest = self.real.dataset.manifest.content_digest
        key: Key = {"kind": kind, "format_version": 4, "model": self.digest, "content_digest": digest}
        return key | {"count": count, "fingerprint": self.fingerprint}


def gflop(model: Model, config: SamplingConfig) -> float:
    """Count the operations, in 10⁹, of an image's matrix products and convolutions: unlike seconds, always the same."""
    operations = 0
    for times, once in model.passes(config):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            once()
        operations += times * counter.get_total_flops()
    return float(operations / 1e9)
