"""What ``--dry-run`` shows: an ingest, and trainings with the time that they would take."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffusion.common.errors import DarkroomError
from flows.cli.command import CommandOutput, connect, display_progress

if TYPE_CHECKING:
    from diffusion.common.progress import Progress
    from diffusion.data.ingest.ingest import Rebuild
    from diffusion.data.ingest.preview import IngestPreview
    from flows.config import Params
    from flows.datasets.remote_shards import RemoteShards
    from flows.environment import Server


def preview_ingest(config: "Params", requeue: bool = False, rebuild: "Rebuild" = "never") -> "IngestPreview":
    """Look at the source, on S3 with its credentials; writes nothing."""
    from diffusion.data.ingest.preview import preview

    if not config.ingest.source.startswith("s3://"):
        return preview(config.dataset_folder, config.ingest, requeue=requeue, rebuild=rebuild)
    with connect("s3"):
        from flows.storage.s3 import S3Objects

        return preview(config.dataset_folder, config.ingest, requeue=requeue, rebuild=rebuild, objects=S3Objects())


def preflight_training(config: "Params") -> CommandOutput:
    """Output of what a training would do."""
    from diffusion.data.manifest import read_manifest

    read_manifest(config.dataset_folder)
    from diffusion.training.train import preflight

    with prepare_inputs(config, dry_run=True) as (config, store):
        estimate = preflight(config.dataset_folder, config.model, config.training, config.sampling, store)
    return CommandOutput(estimate, [f"{name:10} {text}" for name, text in estimate.lines()])


def preflight_trainings(variants: "Mapping[str, Params]") -> CommandOutput:
    """Output of what the trainings of several configurations, by name, would do; measured one after the other."""
    from humanize import precisedelta

    from diffusion.training.train import preflight

    estimates = {}
    for name, variant in variants.items():
        with prepare_inputs(variant, dry_run=True) as (config, store):
            estimates[name] = preflight(config.dataset_folder, config.model, config.training, config.sampling, store)
    lines = []
    for name, estimate in estimates.items():
        rows = dict(estimate.lines())
        is_single = len(estimates) == 1
        lines += [f"{key:10} {text}" for key, text in rows.items()] if is_single else [f"{name}: {rows['time']}"]
    seconds = sum(estimate.seconds or 0 for estimate in estimates.values())
    if len(estimates) > 1:
        unit = "seconds" if seconds < 60 else "minutes"
        lines.append(f"{len(estimates)} trainings, {precisedelta(seconds, minimum_unit=unit, format='%d')} in all")
    value = {name: estimate.model_dump(mode="json") for name, estimate in estimates.items()}
    return CommandOutput({"dry_run": True, "seconds": seconds, "trainings": value}, lines)


def preview_retraining(config: "Params", version: str | None) -> CommandOutput:
    """Output of what a retraining would do: its ingest, and its training if the data set exists."""
    from diffusion.data.manifest import read_manifest

    value: dict[str, Any] = {"dry_run": True, "ingest": None, "start": None, "training": None}
    lines: list[str] = []
    has_new_data = False
    if version is None:
        preview = preview_ingest(config)
        value["ingest"], lines = preview.model_dump(mode="json"), preview.lines()
        has_new_data = preview.new > 0 and (preview.forecast is None or preview.forecast.kept > 0)
    if (config.dataset_folder / "manifest.json").is_file():
        if version is not None:
            has_new_data = not read_manifest(config.dataset_folder).digest.startswith(version)
        config, value["start"] = preview_start(config, has_new_data)
        training = preflight_trainings({config.training.dataset: config})
        value["training"] = training.value
        lines += ["training, on the images that are there now:", f"start      {value['start']}", *training.lines]
    else:
        lines.append("training   measured after `darkroom ingest`, by `darkroom train --dry-run`")
    return CommandOutput(value, lines)


def preview_start(config: "Params", has_new_data: bool) -> "tuple[Params, str]":
    """Configuration of the training of a retraining now, and what it would begin with in a line; records nothing.

    ``has_new_data``: its ingest changes the data set. Raises UserError as the retraining would.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(connect("mlflow", "s3"))
        except DarkroomError as error:
            return config, f"from nothing, or from the champion: the registry is not there to say ({error})"
        from flows.registry.retraining_start import preview_retraining_start

        start = preview_retraining_start(config, has_new_data)
    return start.apply(config), start.text


@contextmanager
def reach_shards(config: "Params", wanted: bool = True) -> "Iterator[tuple[RemoteShards | None, Progress]]":
    """Shards of the data set that are on the remote alone, None without any or if not ``wanted``, and a progress."""
    from diffusion.data.manifest import read_manifest
    from diffusion.data.shards import missing_shards

    if not wanted or not missing_shards(config.dataset_folder, read_manifest(config.dataset_folder)):
        with display_progress() as progress:
            yield None, progress
        return
    with connect("s3"):
        from flows.datasets.remote_shards import RemoteShards
        from flows.environment import data_source
        from flows.tracking.console import reporter

        yield RemoteShards(config.dataset_folder, data_source()), reporter()


@contextmanager
def prepare_inputs(config: "Params", dry_run: bool = False) -> "Iterator[tuple[Params, RemoteShards | None]]":
    """Configuration with local files for registered models, and the shards' store if training streams them."""
    from flows.config import registered_autoencoder, registered_initial_weights

    from_registry = registered_autoencoder(config) is not None or registered_initial_weights(config) is not None
    streams = config.training.stream_bytes is not None
    if not from_registry and not streams:
        yield config, None
        return
    servers: tuple[Server, ...] = ("mlflow", "s3") if from_registry else ("s3",)
    with connect(*servers):
        from flows.datasets.remote_shards import RemoteShards
        from flows.environment import data_source

        store = RemoteShards(config.dataset_folder, data_source()) if streams else None
        if from_registry:
            from flows.registry.dependencies import resolve_params

            config = resolve_params(config, dry_run).params
        yield config, store
