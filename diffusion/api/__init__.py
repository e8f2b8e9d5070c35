"""Python API, for notebooks and scripts: load a model and generate images, or ingest, curate, train, distil, evaluate.

Data sets, runs and reports lie where the command line has them, below the working folder: ``data/NAME``, ``runs/NAME``
and ``reports/NAME``. What one begins the other goes on with (``darkroom train --local`` and so on).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.api import engine
from diffusion.api.config import ExperimentConfig, complete_sampling
from diffusion.api.generator import ImageGenerator, load
from diffusion.common.config import dataset_folder
from diffusion.common.errors import UserError
from diffusion.common.progress import Progress, ignore_progress
from diffusion.families.config import sampling_conflict
from diffusion.presets import PresetName

if TYPE_CHECKING:
    from diffusion.curation.curate import CurationResult
    from diffusion.data.ingest.ingest import IngestResult, Rebuild
    from diffusion.evaluation.results import Evaluation
    from diffusion.training.train import TrainResult

__all__ = ["ImageGenerator", "curate", "distill", "evaluate", "ingest", "load", "train"]


def ingest(
    source: str | Path,
    dataset: str,
    *,
    rebuild: Rebuild = "never",
    requeue: bool = False,
    curation: Mapping[str, Any] | None = None,
    progress: Progress = ignore_progress,
    **config: Any,
) -> IngestResult:
    """Add the new images of a folder, tar, zip or Parquet file to the data set in ``data/DATASET``.

    Args:
        source: Where the images lie. Labels come from sub-folders, captions from files beside the images, and both from
            metadata.csv.
        dataset: Name of the data set.
        rebuild: Whether to build the data set from this source alone; ``if_different``: if it stores images otherwise.
        requeue: Whether to read sources again that were quarantined.
        curation: Fields of the section ``curation``, the rules that drop images.
        progress: Called with what is done, how much, of how much, and a note.
        **config: Fields of the section ``ingest``: ``size=32``, ``fit="pad"``, ``held_out=0.2``.

    Raises:
        UserError: The source cannot be understood, no image can be used, or a field is not valid.

    Example:
        >>> ingest("images/faces", "faces", size=32).kept
        387
    """
    # Not every source is a path: s3://bucket/prefix.
    place = str(Path(source).expanduser()) if str(source).startswith("~") else str(source)
    sections = _sections(dataset, ingest=config | {"source": place}, curation=curation)
    return engine.ingest(ExperimentConfig.parse(sections), rebuild=rebuild, requeue=requeue, progress=progress)


def curate(
    dataset: str, *, dry_run: bool = False, progress: Progress = ignore_progress, **curation: Any
) -> CurationResult:
    """Apply rules of curation to the data set ``data/DATASET``: drop images, and bring others back.

    Args:
        dataset: Name of the data set.
        dry_run: Whether to say only what the rules would drop.
        progress: Called with what is done, how much, of how much, and a note.
        **curation: Fields of the section ``curation``.

    Raises:
        UserError: There is no such data set, a field is not valid, or too many images would be dropped.

    Example:
        >>> curate("faces", near_duplicates=10).dropped
        12
    """
    config = ExperimentConfig.parse(_sections(dataset, curation=curation))
    return engine.curate(config, dry_run=dry_run, progress=progress)


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
    sections = _sections(dataset, training=training, model=model, sampling=sampling)
    config = ExperimentConfig.parse(sections | {"preset": preset})
    return engine.train(config, restart="always" if restart else "never", progress=progress)


def distill(
    dataset: str,
    teacher: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress = ignore_progress,
    **distillation: Any,
) -> TrainResult:
    """Train a student of ``teacher`` that generates in few evaluations, into ``runs/DATASET-student``.

    Args:
        dataset: Name of the data set.
        teacher: File of the model to distil.
        training: Fields of the section ``training``.
        sampling: Fields of the section ``sampling``: how the teacher is guided.
        restart: Whether to discard a student of other settings or of another teacher.
        progress: Called with what is done, how much, of how much, and a note.
        **distillation: Fields of the section ``distillation``: ``steps=1``, ``images=200_000``.

    Returns:
        The result, whose ``final`` is the file to ``load``.

    Raises:
        UserError: As for ``train``, or the teacher is not the file of a model that can be distilled.

    Example:
        >>> student = distill("faces", "runs/faces/final.safetensors", steps=2)
    """
    from diffusion.checkpoints import read_model_header

    sections = _sections(dataset, training=training, distillation=distillation | {"teacher": str(teacher)})
    model = read_model_header(Path(teacher)).model
    config = ExperimentConfig.parse(sections | {"model": model.model_dump(), "sampling": dict(sampling or {})})
    student = engine.distillation_config(config)
    return engine.train(student, restart="if_different" if restart else "never", progress=progress)


def evaluate(
    dataset: str,
    run: str | Path | None = None,
    *,
    output: str | Path | None = None,
    sampling: Mapping[str, Any] | None = None,
    progress: Progress = ignore_progress,
    **evaluation: Any,
) -> Evaluation:
    """Evaluate the checkpoints of a run, or a single model, against the held-out images of a data set.

    Writes the report to ``report.html``, with metrics, their intervals and sample grids.

    Args:
        dataset: Name of the data set.
        run: Folder of the run, by default ``runs/DATASET``, or the file of a model.
        output: Folder of the report; by default the one of the command line: ``reports/DATASET``, with the family as
            suffix unless it is ddpm, and below it ``runs/NAME`` for a run in a folder of another name, and
            ``models/DIGEST`` for the file of a model.
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
    from diffusion.checkpoints import read_model_header
    from diffusion.training.checkpointing import Checkpoints

    engine.require_evaluation_libraries()
    config = ExperimentConfig.parse(_sections(dataset, evaluation=evaluation))
    source = Path(run) if run is not None else config.run_folder
    checkpoints = [source] if source.is_file() else Checkpoints(source / "checkpoints").paths()
    if not checkpoints:
        raise UserError(f"there is no checkpoint in {source}: train first, or name the run's folder")
    header = read_model_header(checkpoints[-1])
    if source.is_file():
        config = config.adapt_to_model(header.model)
    options = complete_sampling(header.model, dict(sampling or {}))
    if words := sampling_conflict(header.model, options):
        raise UserError(words)
    training = config.training.model_copy(update={"student": header.training.get("student")})
    config = config.model_copy(update={"model": header.model, "sampling": options, "training": training})
    return engine.evaluate(config, source, output=output if output is None else Path(output), progress=progress)


def _sections(dataset: str, **sections: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sections of a configuration for the data set ``dataset``; raises UserError for a name that it cannot have."""
    dataset_folder(dataset)
    given = {name: dict(fields) for name, fields in sections.items() if fields is not None}
    return given | {"training": given.get("training", {}) | {"dataset": dataset}}
