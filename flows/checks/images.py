"""Checks of images: a source, a data set, and what can be made of them."""

import math
import posixpath
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, prepare
from diffusion.data.ingest.ingest import Rebuild, ingest, require_same_storage
from diffusion.data.manifest import Manifest, read_manifest, read_records
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access
from diffusion.data.sources.conventions import (
    METADATA_FILES,
    class_of_folder,
    holds_images,
    is_image,
    make_printable,
    may_hold_captions,
    visible_files,
)
from diffusion.data.sources.hub_dataset import HubDataset
from diffusion.data.sources.local_files import find_files
from diffusion.evaluation.config import MIN_PER_SPLIT, EvaluationConfig, require_enough
from diffusion.families.config import ModelConfig, classes_of
from diffusion.generation.config import Conditions, check_conditions
from flows.config import Params

MAX_CHECKED = 1000
"""Maximum number of images that are decoded to check whether they suffice: seconds."""
MAX_LISTED = 20_000
"""Number of files from which a folder is not checked."""
SPOT_CHECKED = 16
"""Number of images that are decoded to see whether more have to be."""
SAMPLING_ERROR = 0.1
"""Difference between the shares of unusable images in a sample of ``MAX_CHECKED`` and in the source: six deviations."""


def require_source(config: IngestConfig) -> None:
    """Raise UserError if ``ingest.source`` is missing, not understood, a folder without images, or not on the Hub."""
    if config.source.startswith("s3://"):
        return
    source = open_source(config.source, Access(config, Path()))
    if isinstance(source, HubDataset):
        source.find()
    scheme, _, place = config.source.partition(":")
    if scheme in ("wds", "parquet") and not place.startswith("s3://"):
        find_files(place.partition("?")[0], f".{scheme}")  # raises for files that are not there
    if Path(config.source).is_dir() and not holds_images(Path(config.source)):
        raise UserError(f"no images in {config.source}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images")


def require_ingestable(params: Params, rebuild: Rebuild = "never") -> Manifest | None:
    """Version that an ingest adds to, if any; UserError if it stores images in another way and is not to be rebuilt."""
    from flows.datasets.catalog import Catalog
    from flows.datasets.checkout import read_pin
    from flows.datasets.sync import find_newer_version
    from flows.environment import data_source
    from flows.storage.s3 import S3Objects

    manifest, folder = None, params.dataset_folder
    if (source := params.ingest.source).startswith("s3://") and next(S3Objects().find(source), None) is None:
        raise UserError(f"there is nothing at {source}: check the address")
    catalog = Catalog.of(params.training.dataset, data_source())
    if read_pin(folder) is None and (digest := find_newer_version(params, catalog)) is not None:
        manifest = catalog.version(digest)
    elif (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
    if manifest is not None:
        require_same_storage(manifest, params.ingest, rebuild)
    require_usable(params.ingest)
    return manifest


def require_usable(config: IngestConfig) -> None:
    """Raise UserError if so few images of a folder can be used that its ingest would fail; large folders are not read.

    A few evenly spaced ones are decoded, and many more only if some of these are unusable.
    """
    root = Path(config.source)
    if not root.is_dir() or sum(1 for _ in islice(visible_files(root), MAX_LISTED)) == MAX_LISTED:
        return
    if config.fit == "bucket":  # whose shapes, which decide what is too small, may not be chosen yet
        config = config.model_copy(update={"fit": "crop", "buckets": None, "enlarge": True})
    reasons, checked, step = Counter[str](), 0, 1
    with TemporaryDirectory() as scratch:
        source = open_source(config.source, Access(config, Path(scratch)))
        entries = list(source.entries())
        for limit in (SPOT_CHECKED, MAX_CHECKED):
            step = math.ceil(len(entries) / limit) or 1
            reasons, checked = Counter[str](), len(entries[::step])
            for payload in source.read(entries[::step]):
                try:
                    if isinstance(payload, UnusableEntryError):
                        raise payload
                    prepare(payload, config)
                except UnusableEntryError as error:
                    reasons[str(error)] += 1
            if not reasons:
                return
    # A sample may have more unusable ones than the folder.
    allowed_share = config.max_quarantined + (0 if step == 1 else SAMPLING_ERROR)
    words = "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(3))
    if reasons.total() == checked:
        raise UserError(f"no usable image in {config.source}: all {checked} that were looked at are unusable ({words})")
    if reasons.total() > allowed_share * checked:
        raise UserError(
            f"{reasons.total()} of {checked} images of {config.source} cannot be used ({words}), more than the share "
            f"of {config.max_quarantined:g} that ingest.max_quarantined allows: fix them, or allow more"
        )


def require_enough_images(params: Params, version: Manifest | None) -> None:
    """Raise UserError if the images of ``ingest.source`` and of ``version`` are too few for an evaluation.

    Which images are held out depends on their pixels: a small source is ingested into a temporary folder for that.
    Sources that would be downloaded, and versions that are not on this machine, are left to the flow.
    """
    folder, config = params.dataset_folder, params.ingest
    if version is not None and min(version.counts.values()) >= MIN_PER_SPLIT:
        return
    from flows.storage.s3 import S3Objects

    share, objects = min(config.held_out, 1 - config.held_out), S3Objects()
    if not (config.source.startswith("s3://") or Path(config.source).exists()):
        return
    with TemporaryDirectory() as temporary:
        source, scratch = Path(temporary, "source"), Path(temporary, folder.name)
        source.mkdir()
        # With four times as many as needed, chance leaves enough.
        max_count = math.ceil(4 * MIN_PER_SPLIT / share)
        count = sum(1 for _ in islice(open_source(config.source, Access(config, source, objects)).entries(), max_count))
        if count == max_count:
            return
        if count > MAX_CHECKED:
            if count * share < MIN_PER_SPLIT:
                raise UserError(
                    f"ingest.held_out = {config.held_out:g} of {count:,} images leaves about {count * share:.0f} on "
                    f"one side, and evaluation needs {MIN_PER_SPLIT}: change it, or give more images"
                )
            return
        if version is not None:
            is_here = (folder / "manifest.json").is_file() and read_manifest(folder) == version
            if version.kept > MAX_CHECKED or not is_here:
                return
            shutil.copytree(folder, scratch)
        # Captions decide nothing here, and each would be paid for.
        ingest(scratch, config.model_copy(update={"runner": "threads", "captioner": None}), objects=objects)
        require_enough(read_manifest(scratch))


def require_network(params: Params) -> None:
    """Raise UserError for a device that is not there, or a network that images of ``ingest.size`` do not fit."""
    from diffusion.common.device import resolve_device

    for device in (params.training.device, params.sampling.device):
        resolve_device(device)
    has_weights = params.training.init_from is not None or params.model.family == "diffusers"
    if has_weights or (isinstance(params.model, ModelConfig) and params.model.autoencoder is not None):
        return  # pretrained weights decide
    import torch

    from diffusion.families import family_of

    with torch.device("meta"):
        family_of(params.model).make_network(params.model, (1, params.ingest.size, params.ingest.size), 0)


def require_extractor(config: EvaluationConfig) -> None:
    """Raise UserError if the file of the feature network is missing."""
    if config.extractor_weights is not None and not config.extractor_weights.is_file():
        raise UserError(f"no network at evaluation.extractor_weights = {config.extractor_weights}: give its path")


def require_evaluable(params: Params) -> None:
    """Raise UserError if the data set is missing or too small for an evaluation, or its feature network is missing."""
    require_enough(read_manifest(params.dataset_folder))
    require_extractor(params.evaluation)


def require_run(params: Params) -> None:
    """Raise UserError if there is no run to evaluate, or it cannot be evaluated."""
    require_evaluable(params)
    if not any((params.run_folder / "checkpoints").glob("*.safetensors")):
        raise UserError(f"no checkpoint in {params.run_folder}: run `darkroom train` first")


def require_evaluation(folder: Path, model: str | None = None) -> None:
    """Raise UserError if ``folder`` has no evaluation of the training, or of ``model``, to promote by."""
    if not (folder / "evaluation.json").is_file():
        option = "" if model is None else f" --model {model}"
        raise UserError(f"no evaluation in {folder}: run `darkroom evaluate{option}` first")


def require_conditions_in_source(params: Params, conditions: Conditions) -> None:
    """Raise UserError for conditions that a model of the data set and the images of ``ingest.source`` will not know.

    Classes and captions of a source other than a folder of images are known only once it is read.
    """
    root, folder, known_classes, has_captions = Path(params.ingest.source), params.dataset_folder, set[str](), False
    if is_there := (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        known_classes.update(manifest.labels)
        captions = (read_records(folder, part, ["caption"])["caption"] for part in manifest.parts)
        has_captions = params.model.text and any(column.null_count < len(column) for column in captions)
    is_plain = root.is_dir() and not any((root / name).exists() for name in METADATA_FILES)
    if params.model.text and is_plain and not has_captions and not may_hold_captions(root, params.ingest):
        raise UserError(
            f"model.text conditions the network on captions, and {root} has none: put each into a NAME.txt beside its "
            "image, or all into a captions.csv with columns file_name and caption, or leave model.text out"
        )
    labels = {label for label in conditions.labels if label is not None}
    required_count = 2 if labels or params.sampling.guides else 0
    if is_plain and not (labels <= known_classes and len(known_classes) >= required_count):
        for name in map(make_printable, visible_files(root)):
            if is_image(name) and (parent := posixpath.dirname(name)):
                known_classes.add(class_of_folder(parent, params.ingest.folders) or "")
                if labels <= known_classes and len(known_classes) >= required_count:
                    break
    if not is_plain and not labels <= known_classes:
        known_classes |= labels
    if unknown_labels := sorted(labels - known_classes):
        hint = f"there is {', '.join(sorted(known_classes)[:20])}" if known_classes else "there are no classes"
        raise UserError(f"no class {unknown_labels[0]!r} in {root} or data set {params.training.dataset}: {hint}")
    if is_plain or is_there:
        classes = classes_of(params.model, dict.fromkeys(sorted(known_classes), 1))
        check_conditions(classes, params.model.text, params.sampling, conditions)


def deployment_notes(params: Params, workspace: Path) -> list[str]:
    """Say what the first scheduled retraining would find in ``workspace``, as far as it is on this machine.

    Raises UserError if the data set there stores images in another way, so that every retraining would fail.
    """
    if not workspace.is_dir():
        return []
    notes, folder, run = [], workspace / params.dataset_folder, workspace / params.run_folder
    if (folder / "manifest.json").is_file():
        require_same_storage(read_manifest(folder), params.ingest, "never")
    else:
        notes.append(
            f"no data set {params.training.dataset} in {workspace}: the first run ingests {params.ingest.source}"
        )
    if (run / "final.safetensors").is_file():
        notes.append(f"runs train in {run}: what is there is discarded if it was trained with other inputs")
    return notes
