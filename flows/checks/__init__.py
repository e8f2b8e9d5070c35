"""What must hold before work begins: cheap checks, before torch and the servers' clients are imported.

What they find would otherwise stand in Prefect as a failed run, or end hours of training. The flows check again
whatever may have changed since.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion.common.errors import UserError
from diffusion.common.files import is_model_file, require_writable
from diffusion.data.ingest.ingest import Rebuild
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.shards import missing_shards
from diffusion.evaluation.config import require_enough
from diffusion.families.base import classes_of
from diffusion.generation.config import UNCONDITIONAL, Conditions, GenerationRequest, check_conditions
from flows.checks import images, models
from flows.config import Params, registered_autoencoder, registered_initial_weights

Verb = Literal[
    "ingest", "train", "evaluate", "promote", "sample", "edit", "retrain", "distill", "sweep", "compare", "monitor"
]


@dataclass(frozen=True)
class Request:
    """What is asked for besides the configuration; each verb has its own part of it."""

    model: str | None = None
    """URI of a registered model, or the path of a model file; None: the verb's default."""
    version: str | None = None
    """Digest of the data set version to retrain on; None: what an ingest makes."""
    rebuild: Rebuild = "never"
    restart: Literal["never", "if_different", "set_aside", "always"] = "never"
    advice: tuple[str, ...] = ()
    """What a message says to do with another run in a folder; empty: the usual."""
    count: int | None = None
    seed: int = 0
    to: str | None = None
    conditions: Conditions = UNCONDITIONAL
    requests: str | None = None
    """Table of requests."""
    generation: GenerationRequest | None = None
    """Images to generate or to edit."""
    overrides: Sequence[str] = ()
    """``key=value`` of ``--set``: one without effect on the images is an error."""


def check(verb: Verb, params: Params, request: Request = Request(), *, connected: bool = False) -> None:
    """Raise UserError if ``verb`` could not succeed, as far as it is cheap to know.

    Without ``connected`` by what is on this machine; with it by what the servers, to which this process is connected
    by then, say. Both are needed.
    """
    local, remote = CHECKS[verb]
    (remote if connected else local)(params, request)


def _train(params: Params, _: Request) -> None:
    read_manifest(params.dataset_folder)
    require_writable(params.run_folder, "training.output")


def _train_connected(params: Params, request: Request) -> None:
    models.require_models(params)
    _require_trainable(params, request)


def _require_trainable(params: Params, request: Request) -> None:
    """Raise UserError as a training would before its first step, if its inputs are on this machine."""
    is_remote = registered_autoencoder(params) or registered_initial_weights(params)
    folder, streams = params.dataset_folder, params.training.stream_bytes is not None
    if not streams and not is_remote and not missing_shards(folder, read_manifest(folder)):
        from diffusion.training.train import check as check_training

        sections = params.model, params.training, params.sampling
        check_training(folder, params.run_folder, *sections, request.restart, *request.advice)


def _evaluate(params: Params, request: Request) -> None:
    if request.model is None:
        images.require_run(params)
    elif is_model_file(request.model):
        models.require_shape(Path(request.model), request.model, params)


def _evaluate_connected(params: Params, request: Request) -> None:
    if request.model is not None:
        models.require_version(request.model)
        models.require_shape(models.fetch_weights(request.model), request.model, params)


def _promote(params: Params, request: Request) -> None:
    read_manifest(params.dataset_folder)
    if request.model is None:
        images.require_run(params)
        images.require_evaluation(params.report_folder)


def _promote_connected(params: Params, request: Request) -> None:
    if request.model is not None:
        models.require_version(request.model)
        folder = params.model_report_folder(models.fetch_weights(request.model).stem)
        images.require_evaluation(folder, request.model)


def _sample_connected(params: Params, request: Request) -> None:
    uri = request.model or params.champion
    models.require_version(uri, params, request.conditions)
    models.require_destination(request.to)
    batch = request.count, request.seed, request.conditions, request.requests
    models.require_batch(params, uri, *batch, request.overrides)


def _edit(params: Params, request: Request) -> None:
    """Without overrides none can be without effect, and the model is loaded once, by the work itself."""
    if (file := request.model) is not None and is_model_file(file) and request.generation is not None:
        models.require_conditions(Path(file), params, request.generation.conditions)
        if request.overrides:
            from diffusion.checkpoints import read_model_header

            sampling = params.resolve_sampling(read_model_header(Path(file)).model)
            models.require_answerable(params, sampling, request.overrides, Path(file), file, request.generation)


def _edit_connected(params: Params, request: Request) -> None:
    assert request.generation is not None
    uri = request.model or params.champion
    models.require_version(uri, params, request.generation.conditions)
    weights = models.fetch_weights(uri)
    models.require_answerable(params, params.sampling, request.overrides, weights, uri, request.generation)


def _retrain(params: Params, request: Request) -> None:
    is_default = request.count in (None, 64) and (request.seed, request.to) == (0, None)
    if params.model.low_resolution is not None and not is_default:
        raise UserError("a model with model.low_resolution only upscales images: leave --count, --seed and --to out")
    if request.version is None:
        images.require_source(params.ingest)
        images.require_conditions_in_source(params, request.conditions)


def _retrain_connected(params: Params, request: Request) -> None:
    from flows.registry.dependencies import require_versions_without_takedown

    require_writable(params.run_folder, "training.output")
    if params.model.family != "diffusers":  # which has a tokenizer of its own
        models.require_prompts(request.conditions)
    models.require_destination(request.to)
    images.require_extractor(params.evaluation)
    models.require_models(params)
    require_versions_without_takedown(params)
    if request.version is None:
        images.require_enough_images(params, images.require_ingestable(params))
        images.require_network(params)
    else:
        from flows.datasets.checkout import DatasetLocation
        from flows.environment import data_source

        require_enough(DatasetLocation(params.dataset_folder, data_source).choose(request.version))


def require_worth_training(params: Params, manifest: Manifest, conditions: Conditions) -> None:
    """Raise UserError if a model of the data set could not be evaluated, promoted, or sampled under ``conditions``."""
    from flows.registry.dependencies import require_promotable_dependencies

    require_enough(manifest)
    classes = classes_of(params.model, manifest.class_histogram)
    check_conditions(classes, params.model.text, params.sampling, conditions)
    if params.model.family != "diffusers":  # which has a tokenizer of its own
        models.require_prompts(conditions)
    require_promotable_dependencies(params)


def _distill_connected(params: Params, _: Request) -> None:
    teacher = params.distillation.teacher
    models.require_version(params.champion if teacher == "champion" else teacher)


def _compare(params: Params, request: Request) -> None:
    images.require_evaluable(params)
    if request.restart == "never":
        _require_trainable(params, request)


VerbCheck = Callable[[Params, Request], object]
CHECKS: Mapping[Verb, tuple[VerbCheck, VerbCheck]] = {
    "ingest": (
        lambda params, _: images.require_source(params.ingest),
        lambda params, request: images.require_ingestable(params, request.rebuild),
    ),
    "train": (_train, _train_connected),
    "evaluate": (_evaluate, _evaluate_connected),
    "promote": (_promote, _promote_connected),
    "sample": (lambda *_: None, _sample_connected),
    "edit": (_edit, _edit_connected),
    "retrain": (_retrain, _retrain_connected),
    "distill": (lambda params, _: images.require_evaluable(params), _distill_connected),
    "sweep": (lambda params, _: images.require_evaluable(params), lambda *_: None),
    "compare": (_compare, lambda *_: None),
    "monitor": (lambda *_: None, lambda params, _: models.require_version(params.champion)),
}
"""Checks of each verb: of what is on this machine, and of what the servers say."""
