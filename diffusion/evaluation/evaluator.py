"""The evaluator: generates images from model files, extracts features and computes metrics, under equal conditions.

Selecting a checkpoint, comparing a candidate with the champion, monitoring a champion and comparing families all go
through it. Images, features, neighbours, losses and halves are each cached in a file under a digest of the weights and
everything else they depend on: work continues after a kill, and unchanged results are not computed again.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.config import Config, unset
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.common.progress import Progress, silent
from diffusion.common.threads import cores
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.bootstrap import FEWEST as FEWEST_FOR_ERRORS
from diffusion.evaluation.bootstrap import SPLITS, Figure, Replicates, compute_replicates
from diffusion.evaluation.cache import Tensors, cached, cached_result, pieces_folder
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import BATCH, extractor_for
from diffusion.evaluation.metrics.copies import Memorization, detect_duplicates, detect_memorization
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
    ImageSimilarity,
    ResamplingBaseline,
    compare_appearance,
    compare_images,
    measure_appearance,
    psnr,
    resample,
    ssim,
)
from diffusion.evaluation.real_images import (
    CHUNK,
    SHOWN,
    FeaturesKey,
    RealImages,
    packed,
    thumbnails_of_pieces,
    unpacked,
)
from diffusion.evaluation.results import (
    CheckpointEvaluation,
    EvaluationConditions,
    MetricEstimate,
    ModelEvaluation,
    ModelScores,
    RealBaseline,
    Reconstruction,
)
from diffusion.families.model import Model, ModelHeader
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.generation.generate import conditions_of, is_conditional, labels_of, reconstructed
from diffusion.generation.super_resolution import FromNoise, GenerationTask, generate, task_of
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


class GeneratedKey(Config):
    """Cache key of a model's images."""

    kind: Literal["generated"] = "generated"
    format_version: Literal[2] = 2
    """Incremented when the same model generates other images or gets other conditions."""
    model: str
    """SHA-256 of the model file."""
    samples: int
    seed: int
    sampling: SamplingConfig
    fingerprint: Fingerprint
    content_digest: str | None
    """Content digest of the data set whose captions or small images condition the model; None: neither, so that its
    images are the same for every data set."""
    reference: int | None
    """Number of held-out images that these come from; None as above."""


class PieceKey(Config):
    """Cache key of a piece of the generated images, within the folder of the whole."""

    kind: Literal["piece"] = "piece"
    first: int
    """Number of the first image of the piece."""
    count: int


class GeneratedFeaturesKey(Config):
    """Cache key of the features of generated images."""

    kind: Literal["features of generated images"] = "features of generated images"
    format_version: Literal[1] = 1
    """Incremented when features of the same name and preprocessing change."""
    generated: GeneratedKey
    extractor: str
    extractor_digest: str
    preprocessing: str
    fingerprint: Fingerprint


class NeighboursKey(Config):
    """Cache key of the training images nearest to generated ones."""

    kind: Literal["neighbours of generated images"] = "neighbours of generated images"
    format_version: Literal[1] = 1
    """Incremented when thumbnails or distances change."""
    generated: GeneratedFeaturesKey
    training: FeaturesKey
    mirrored: bool


class HeldOutKey(Config):
    """Cache key of losses, reconstructions and upscaled images of the first held-out images."""

    kind: Literal["losses", "reconstructions"]
    format_version: Literal[3] = 3
    """Incremented when their computation changes."""
    model: str
    """SHA-256 of the model file."""
    content_digest: str
    count: int
    fingerprint: Fingerprint
    extractor_digest: str | None = Field(None, exclude_if=unset)
    """Digest of the features in which reconstructions are compared, if any."""


class HalvesKey(Config):
    """Cache key of metrics on halves."""

    kind: Literal["halves"] = "halves"
    format_version: Literal[2] = 2
    """Incremented when metrics or halves change."""
    generated: tuple[GeneratedFeaturesKey, ...]
    real_baseline_seed: int
    training: FeaturesKey
    compared: FeaturesKey
    splits: int


class BaselineKey(Config):
    """Cache key of the scores of images resampled without a model."""

    kind: Literal["baseline"] = "baseline"
    format_version: Literal[2] = 2
    """Incremented when these scores change."""
    name: str
    samples: int
    low_resolution: int
    compared: FeaturesKey


def require_enough(data: Path) -> None:
    """Raise UserError if a split of the data set in folder ``data`` is too small for an evaluation."""
    for split, count in read_manifest(data).counts.items():
        if count < FEWEST:
            raise UserError(
                f"data set {data} has {count} {split.replace('_', '-').replace('train', 'training')} images, "
                f"and evaluation needs {FEWEST}: ingest more, or change ingest.held_out"
            )


def require_shape(path: Path, header: ModelHeader, dataset: Dataset) -> None:
    """Raise UserError unless the model in the file ``path`` generates images of the shape of those in ``dataset``."""
    shape = header.channels, header.size, header.size
    if shape != dataset.shape:
        theirs, ours = ("×".join(map(str, each)) for each in (shape, dataset.shape))
        raise UserError(
            f"{path} generates images of {theirs} and {dataset.folder} holds {ours} (channels × height × width): "
            "evaluate it on the data set it was trained on"
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
        task: GenerationTask = FromNoise(),  # noqa: B008 (frozen)
    ) -> None:
        require_enough(data)
        dataset = Dataset.open(data)
        extractor = extractor_for(config, dataset, folder, progress)
        self.real = RealImages(dataset, extractor, config.reference, config.samples, folder, task, progress)
        self.config = config
        self.sampling = sampling
        self.folder = folder
        self.progress = progress
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
        self, path: Path, samples: int | None = None, sampling: SamplingConfig | None = None, name: str = ""
    ) -> "ModelEvaluator":
        """Return the lazy evaluation of the model in the file ``path``.

        Args:
            path: A checkpoint, or a final model.
            samples: Images to generate; None: as configured.
            sampling: How to generate them; None: as configured.
            name: Name shown with progress; empty: the file's name.

        Raises:
            UserError: The file does not exist, is not a model, or has another image shape or task.
        """
        if not path.is_file():
            raise UserError(f"no model at {path}: train one with `darkroom train`")
        found = ModelEvaluator(path, self, samples or self.config.samples, sampling or self.sampling, name or path.stem)
        require_shape(path, found.header, self.real.dataset)
        theirs, ours = task_of(found.header.model), self.real.task
        if theirs.low_resolution != ours.low_resolution:
            raise UserError(
                f"{path} {theirs.description}, and what it would be compared with {ours.description}: scores say "
                "nothing of two tasks"
            )
        return found

    def replicates(self, models: Sequence["ModelEvaluator"]) -> list[MetricReplicates]:
        """Return metrics on halves for each model, then for the real baseline.

        Empty if a set has too few images for errors.
        """
        real, seed = self.real, self.config.seed
        _, real_baseline = real.real_baseline(seed)
        sets, reference = [*(each.features for each in models), real_baseline], real.reference.features
        if min(map(len, (*sets, reference))) < FEWEST_FOR_ERRORS:
            return []
        points = [*(each.scores for each in models), self.real_baseline().scores]

        def work() -> Tensors:
            found = compute_replicates(sets, reference, SPLITS, self.progress, points)
            return {
                f"{number}/{figure}": some.halves for number, each in enumerate(found) for figure, some in each.items()
            }

        key = HalvesKey(
            generated=tuple(each.features_key for each in models),
            real_baseline_seed=seed,
            training=real.training_key,
            compared=real.compared_key,
            splits=SPLITS,
        )
        kept = cached(self.folder, key, work)
        return [
            {
                figure: Replicates.of(figure, score.of(figure), kept[f"{number}/{figure}"], features, reference)
                for figure in get_args(Figure)
            }
            for number, (features, score) in enumerate(zip(sets, points, strict=True))
        ]

    def real_baseline(self, replicates: MetricReplicates | None = None) -> RealBaseline:
        """Return the metrics of real training images in the place of generated ones."""
        return RealBaseline(
            scores=self.real.scores(*self.real.real_baseline(self.config.seed)),
            estimates=self.estimates(replicates or {}),
        )

    def estimates(self, replicates: MetricReplicates) -> dict[str, MetricEstimate]:
        """Return estimates of metrics by name, such as kid_efflite0."""
        return {
            f"{figure}_{self.conditions.extractor}": MetricEstimate.of(each.estimate)
            for figure, each in replicates.items()
        }

    def baselines(self) -> dict[str, ResamplingBaseline] | None:
        """Return the scores of resampling for super-resolution models; None for other models."""
        low_resolution = self.real.task.low_resolution
        return None if low_resolution is None else {name: self._baseline(name, low_resolution) for name in RESAMPLING}

    def _baseline(self, name: str, low_resolution: int) -> ResamplingBaseline:
        real = self.real

        def work() -> tuple[ResamplingBaseline, Tensors]:
            assert real.small is not None
            large = resample(real.small, real.dataset.manifest.size // low_resolution, name)
            alike = compare_images(large, torch.cat(list(real.images(real.shown))))
            return ResamplingBaseline(scores=real.score(real.extractor(large)), similarity=alike), {}

        key = BaselineKey(name=name, samples=len(real.shown), low_resolution=low_resolution, compared=real.compared_key)
        return cached_result(self.folder, key, ResamplingBaseline, work)[0]


class ModelEvaluator:
    """Lazy evaluation of one model file under an evaluator's conditions; expensive parts are cached.

    It generates image numbers 0 … ``samples`` − 1 of the configured seed, or upscales held-out images.
    """

    def __init__(self, path: Path, evaluator: Evaluator, samples: int, sampling: SamplingConfig, name: str) -> None:
        self.header = read_model_header(path)
        self.sha256 = sha256_file(path)
        self.path = path
        self.evaluator = evaluator
        self.real = evaluator.real
        self.config = evaluator.config
        self.samples = samples if evaluator.real.small is None else min(samples, len(evaluator.real.shown))
        self.sampling = sampling
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
        """Return captions of held-out images for models with captions, else classes as frequent as in the data set."""
        if not self.header.model.text:
            return UNCONDITIONAL
        real = self.real
        captioned = [caption is not None for caption in real.dataset.captions(real.held_out)]
        return conditions_of(real.dataset, real.held_out[captioned][: self.config.samples], self.model.classes)

    @cached_property
    def guided(self) -> SamplingConfig:
        """Return the sampling configuration, without guidance if the model has no conditions."""
        leads = is_conditional(self.model.classes, self.conditions) and self.header.model.low_resolution is None
        return self.sampling if leads else self.sampling.unguided()

    @cached_property
    def images(self) -> Tensor:
        """Return the generated images, (samples, C, H, W) uint8."""
        return cached(self.folder, self.generated_key, lambda: {"images": self._generate()})["images"]

    def _generate(self) -> Tensor:
        """Generate all images in pieces, each cached until the whole is.

        Pieces consist of whole compute batches, so they are bit-identical to a single pass.
        """
        size = BATCHES * cores() * self.sampling.compute_batch
        folder = pieces_folder(self.folder, self.generated_key)

        def piece(numbers: range) -> Tensor:
            def counted(what: str, done: int, total: int | None, note: str = "") -> None:
                of_images = total == len(numbers)
                done, total = (numbers.start + done, self.samples) if of_images else (done, total)
                self.progress(what, done, total, note)

            def work() -> Tensors:
                small = self.real.small
                inputs = None if small is None else small[numbers.start : numbers.stop]
                seed, conditions = self.config.seed, self.conditions
                images = generate(self.model, inputs, numbers, seed, self.guided, counted, conditions)
                return {"images": images}

            return cached(folder, PieceKey(first=numbers.start, count=len(numbers)), work)["images"]

        starts = range(0, self.samples, size)
        return torch.cat([piece(range(start, min(start + size, self.samples))) for start in starts])

    @cached_property
    def features(self) -> Tensor:
        """Return the features of the generated images, (samples, D) float32."""
        return cached(self.folder, self.features_key, lambda: {"features": self.real.extractor(self.images)})[
            "features"
        ]

    @cached_property
    def scores(self) -> Scores:
        """Return the distances of the generated images to held-out ones."""
        return self.real.scores(self.features_key, self.features)

    @cached_property
    def memorization(self) -> Memorization:
        """Return the test for copies of training images, mirrored ones as well if the model was trained on those."""
        mirrored = bool(self.header.training.get("flip", False))

        def work() -> Tensors:
            views = self.real.views(torch.split(self.images, CHUNK), self.features, mirrored)
            return unpacked(self.real.neighbours(views))

        key = NeighboursKey(generated=self.features_key, training=self.real.training_key, mirrored=mirrored)
        return detect_memorization(packed(cached(self.folder, key, work)), self.real.held_out_neighbours(mirrored))

    @cached_property
    def labels(self) -> Tensor | None:
        """Return the class of each image, (samples,), see ``labels_of``; None for models without classes."""
        if self.header.model.low_resolution:
            return None
        return labels_of(self.model, range(self.samples), self.config.seed, self.conditions)

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

    @cached_property
    def similarity(self) -> ImageSimilarity | None:
        """Return the similarity of upscaled to real images; None for other models."""
        if self.header.model.low_resolution is None:
            return None
        return compare_images(self.images, torch.cat(list(self._originals())))

    @property
    def reconstruction(self) -> Reconstruction | None:
        """Return the reconstruction metrics of the model's autoencoder; None if it has none."""
        return self._reconstructed[0] if self._reconstructed else None

    @property
    def reconstructed(self) -> Tensor | None:
        """Return reconstructions of the first held-out images, (N, C, H, W) uint8; None without an autoencoder."""
        return self._reconstructed[1]["shown"] if self._reconstructed else None

    @cached_property
    def psnr(self) -> Tensor | None:
        """Return the PSNR in dB of each reconstructed or upscaled held-out image, (M,); None for other models."""
        if self.header.model.low_resolution is not None:
            pairs = zip(torch.split(self.images, CHUNK), self._originals(), strict=True)
            return torch.cat([psnr(*pair) for pair in pairs])
        return self._reconstructed[1]["psnr"] if self._reconstructed else None

    @cached_property
    def _reconstructed(self) -> tuple[Reconstruction, Tensors] | None:
        if self.header.model.evaluated_by != "reconstructions" and self.header.latents is None:
            return None
        real = self.real
        rows = real.held_out if self.samples == self.config.samples else real.held_out[: self.samples]

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

        key = self._held_out_key("reconstructions", len(rows)).model_copy(
            update={"extractor_digest": real.extractor.digest}
        )
        return cached_result(self.folder, key, Reconstruction, work)

    def _originals(self) -> Iterator[Tensor]:
        """Yield the held-out images that the model upscales, chunk by chunk."""
        return self.real.images(self.real.shown[: self.samples])

    def scored(self) -> ModelScores:
        """Return the metrics that every model has."""
        return ModelScores(
            sha256=self.sha256,
            family=self.header.model.family,
            images=self.header.images,
            fingerprint=self.fingerprint,
            scores=self.scores,
            reconstruction=self.reconstruction,
            similarity=self.similarity,
        )

    def checkpoint(self) -> CheckpointEvaluation:
        """Return the metrics for the selection of a checkpoint."""
        return CheckpointEvaluation(**dict(self.scored()), file=str(self.path))

    def evaluate(self) -> ModelEvaluation:
        """Return all metrics, without estimates."""
        appearances = [measure_appearance(images) for images in torch.split(self.images, CHUNK)]
        return ModelEvaluation(
            **dict(self.scored()),
            memorization=self.memorization,
            duplicates=detect_duplicates(thumbnails_of_pieces(torch.split(self.images, CHUNK)), self.real.thumbnails),
            drift=compare_appearance(
                {name: torch.cat([each[name] for each in appearances]) for name in appearances[0]}, self.real.appearance
            ),
            per_class=self.per_class,
            held_out_loss=self.held_out_loss,
            gflop=gflop(self.model, self.guided),
        )

    @property
    def generated_key(self) -> GeneratedKey:
        """Return the cache key of the generated images."""
        conditioned = self.header.model.text or self.header.model.low_resolution is not None
        return GeneratedKey(
            model=self.sha256,
            samples=self.samples,
            seed=self.config.seed,
            sampling=self.sampling,
            fingerprint=self.fingerprint,
            content_digest=self.real.dataset.manifest.content_digest if conditioned else None,
            reference=self.config.reference if conditioned else None,
        )

    @property
    def features_key(self) -> GeneratedFeaturesKey:
        """Return the cache key of the features of the generated images."""
        extractor = self.real.extractor
        return GeneratedFeaturesKey(
            generated=self.generated_key,
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            preprocessing=extractor.preprocessing,
            fingerprint=fingerprint(BATCH, "fp32", "cpu"),
        )

    def _held_out_key(self, kind: Literal["losses", "reconstructions"], count: int) -> HeldOutKey:
        return HeldOutKey(
            kind=kind,
            model=self.sha256,
            content_digest=self.real.dataset.manifest.content_digest,
            count=count,
            fingerprint=self.fingerprint,
        )


def gflop(model: Model, config: SamplingConfig) -> float:
    """Count the floating-point operations, in 10⁹, of matrix products and convolutions to generate one image.

    The count is the same on every machine under any load. Seconds are not: they would make the gate depend on what else
    ran while each model was timed.
    """
    operations = 0
    for times, once in model.passes(config):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            once()
        operations += times * counter.get_total_flops()
    return float(operations / 1e9)
