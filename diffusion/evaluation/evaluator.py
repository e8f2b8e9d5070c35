"""The evaluator: generates images from model files, extracts features and computes metrics, under equal conditions.

Images, features, neighbours, losses and halves are each cached in a file under a digest of the weights and everything
else they depend on: work continues after a kill, and unchanged results are not computed again.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.bootstrap import Replicates
from diffusion.evaluation.cache import Key, Tensors, load_or_compute, load_or_compute_result
from diffusion.evaluation.config import EvaluationConfig, require_enough
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.features.feature_extractor import Extractor, make_extractor
from diffusion.evaluation.features.label_classifier import load_label_classifier
from diffusion.evaluation.features.text_image_encoder import TextImageEncoder, open_text_image_encoder
from diffusion.evaluation.metrics import load_figures, metric_versions
from diffusion.evaluation.metrics.metric import SPLITS, ImageSet
from diffusion.evaluation.metrics.pixel_metrics import RESAMPLING, ResamplingBaseline, compare_images, resample
from diffusion.evaluation.metrics.scores import MIN_FOR_ERRORS, compute_halves
from diffusion.evaluation.model_evaluator import ModelEvaluator, restore_order
from diffusion.evaluation.real_images import RealImages, metrics_key
from diffusion.evaluation.results import EvaluationConditions, RealBaseline
from diffusion.generation.super_resolution import GenerationTask, task_of
from diffusion.process.samplers import SamplingConfig

CACHE = "evaluations"
"""Name of the cache folder inside the folder of an evaluation."""
MetricReplicates = dict[str, Replicates]
"""Metrics of one model with their values on halves; empty if there are too few images for errors."""


class Evaluator:
    """Evaluator of model files against the held-out images of the data set in folder ``data``.

    Results are cached in ``folder``, for all evaluators of the same data set. Super-resolution models upscale one part
    of the held-out images and are compared with the others. Images are numbered from ``first``. Raises UserError for a
    data set that is too small.
    """

    def __init__(
        self,
        data: Path,
        config: EvaluationConfig,
        sampling: SamplingConfig,
        folder: Path,
        progress: Progress = ignore_progress,
        task: GenerationTask = GenerationTask(),  # noqa: B008 (frozen)
        first: int = 0,
    ) -> None:
        require_enough(read_manifest(data))
        dataset = Dataset.open(data)
        if config.extractor == "labels":
            extractor: Extractor = load_label_classifier(dataset, config.extractor_size, folder, progress)
        else:
            extractor = make_extractor(config)
        self.real = RealImages(dataset, extractor, config.reference, config.samples, folder, task, progress)
        self.config, self.sampling, self.folder, self.progress = config, sampling, folder, progress
        self.encoder: TextImageEncoder | None = None
        if config.text_image_encoder is not None:
            self.encoder = open_text_image_encoder(config.text_image_encoder)
        self.generated: dict[str, Tensor] = {}
        """Images of the last evaluation of each model and shape, by all that they depend on but their number."""
        self.conditions = EvaluationConditions(
            content_digest=dataset.manifest.content_digest,
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            preprocessing=extractor.preprocessing,
            evaluation=config,
            first=first,
            text_image_encoder=None if self.encoder is None else self.encoder.digest,
            sampling=sampling,
            low_resolution=task.low_resolution,
            extensions=metric_versions(),
        )

    def model(
        self,
        path: Path,
        samples: int | None = None,
        sampling: SamplingConfig | None = None,
        name: str = "",
        seed: int | None = None,
        captioned: Rows | None = None,
    ) -> ModelEvaluator:
        """Return the lazy evaluation of the model in the file ``path``, a checkpoint or a final model.

        ``samples``, ``sampling`` and ``seed`` of the images are as configured if None; ``name`` is shown with progress,
        by default the file's; ``captioned``: images whose captions condition a model with captions, by default held-out
        ones. Raises UserError if the file does not exist, is not a model, or has another image shape or task.
        """
        config = self.config if seed is None else self.config.model_copy(update={"seed": seed})
        samples, sampling = samples or config.samples, sampling or self.sampling
        name = name or path.stem
        first = self.conditions.first
        model = ModelEvaluator(path, self.real, config, first, samples, sampling, name, captioned, self.generated)
        model.encoder = self.encoder
        header, dataset = model.header, self.real.dataset
        if header.square != dataset.shape and not header.takes_other_sizes(dataset.shape):
            raise UserError(
                f"{path} generates images of {'×'.join(map(str, header.square))} and {dataset.folder} holds "
                f"{'×'.join(map(str, dataset.shape))} (channels × height × width): "
                "evaluate it on the data set it was trained on"
            )
        task = task_of(header.model, header.size)
        if task.low_resolution != self.real.task.low_resolution:
            raise UserError(
                f"{path} {task.description}, and what it would be compared with {self.real.task.description}: scores "
                "say nothing of two tasks"
            )
        for shape in [] if header.shapes is None and not dataset.manifest.storage.buckets else dataset.shapes:
            model.model.with_size(shape)  # raises for a shape of the data set that its network does not take
        return model

    def replicates(self, models: Sequence[ModelEvaluator]) -> list[MetricReplicates]:
        """Return metrics on halves for each model, then for the real baseline; empty if a set has too few images."""
        real, seed = self.real, self.config.seed
        # As many as are generated, since the Fréchet distance depends on their number.
        count = max(len(model.features) for model in models)
        baseline_key, baseline = real.real_baseline(seed, count)
        sets, reference = [*(model.image_set for model in models), baseline], real.reference
        if min(map(len, (*sets, reference))) < MIN_FOR_ERRORS:
            return [{} for _ in sets]
        scores = [*(model.scores for model in models), real.scores(baseline_key, baseline)]

        def work() -> Tensors:
            figures = compute_halves(sets, reference, SPLITS, self.progress)
            return {f"{n}/{figure}": halves for n, values in enumerate(figures) for figure, halves in values.items()}

        key: Key = {"kind": "halves", "format_version": 3, "generated": [model.features_key for model in models]}
        key |= {"real_baseline": [seed, count], "training": real.key(real.train), "compared": real.key(real.compared)}
        tensors = load_or_compute(self.folder, key | {"splits": SPLITS} | metrics_key(), work)
        figures = [name for name, figure in load_figures().items() if figure.interval is not None]
        return [
            {
                f: Replicates(f, score.get_metric(f), tensors[f"{n}/{f}"], samples, *reference.features.shape)
                for f in figures
            }
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
        return {
            f"{figure}_{extractor}": MetricEstimate.from_estimate(halves.estimate)
            for figure, halves in replicates.items()
        }

    def baselines(self) -> dict[str, ResamplingBaseline] | None:
        """Return the scores of resampling for super-resolution models; None for other models."""
        real, low_resolution = self.real, self.real.task.low_resolution
        if low_resolution is None:
            return None

        def compute(name: str) -> tuple[ResamplingBaseline, Tensors]:
            assert real.small is not None
            outputs = {shape: resample(images, real.task.scale, name) for shape, images in real.small.items()}
            large_images = restore_order(real.shapes(real.shown), outputs)
            similarity = compare_images(large_images, real.dataset.images_in_order(real.shown))
            images = ImageSet(real.extractor(large_images), lambda: [large_images])
            return ResamplingBaseline(scores=real.score(images), similarity=similarity), {}

        key: Key = {"kind": "baseline", "format_version": 3, "samples": len(real.shown)} | metrics_key()
        key |= {"low_resolution": low_resolution, "compared": real.key(real.compared)}
        return {
            name: load_or_compute_result(self.folder, key | {"name": name}, ResamplingBaseline, partial(compute, name))[
                0
            ]
            for name in RESAMPLING
        }
