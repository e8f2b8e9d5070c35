"""Model bundle: a registered version with its run and artifacts in a folder, for transfer to another registry.

Run as ``python -m flows.registry.bundle URI FOLDER`` in the environment of the source registry: MLflow's client knows
one set of keys per process.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities import Metric, Run

from diffusion.common.child_processes import end_with_parent
from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.common.files import sha256_file, write_json
from flows.local_stack.stack import join_servers
from flows.registry import model_versions
from flows.registry.aliases import verified
from flows.registry.ledger import Ledger
from flows.registry.ledger_entries import Evidence
from flows.registry.model_versions import digest_code
from flows.tracking.runs import MANIFEST_ARTIFACT

ABOUT = "parcel.json"
MODEL, RUN = "model", "run"
"""Folders with the artifacts of the version and of its run."""
CARRIED = ("evaluation", "history", "params.json", MANIFEST_ARTIFACT)
"""Artifacts of a run in the bundle: its configuration, evaluation and data set manifest."""


class BundledFile(Config):
    """A file of the bundle."""

    path: str
    sha256: str


class BundledInput(Config):
    """Data set input of a run in MLflow."""

    name: str
    digest: str
    source_type: str
    source: str
    tags: dict[str, str]


class BundledRun(Config):
    """Training run of the version."""

    run_id: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]
    """Points as name, value, time in milliseconds and step."""
    inputs: list[BundledInput]


class ModelBundle(Config):
    """Content of the bundle's folder, and the version's state in the source registry."""

    format_version: Literal[1] = 1
    model: str
    number: int
    weights_sha256: str
    tags: dict[str, str]
    description: str
    champion: bool
    """Whether it was champion when it was packed."""
    evidence: Evidence | None
    """Verdict of the source registry's gate."""
    entry: str | None
    """SHA-256 of the newest entry about it in the source ledger."""
    run: BundledRun
    files: list[BundledFile]

    @property
    def uri(self) -> str:
        """URI of the version in the source registry."""
        return f"models:/{self.model}/{self.number}"


def pack(uri: str, folder: Path) -> ModelBundle:
    """Fetch the version that ``uri`` names, and its run, into ``folder``; the description is written last.

    Raises UserError if there is no such version, or its weights or code differ from those that were registered.
    """
    client = MlflowClient()
    version = model_versions.resolve(client, uri)
    history = verified(client, Ledger.of(version.model))
    entry = history.about(version.number)
    _fetch(version.uri, folder / MODEL)
    for name in CARRIED:
        if _is_there(client, version.run_id, name):
            _fetch(f"runs:/{version.run_id}/{name}", folder / RUN / name)
    if sha256_file(folder / MODEL / "artifacts" / "weights.safetensors") != version.weights_sha256:
        raise UserError(f"the weights of {version.uri} do not match their digest: register the model again")
    if version.code_sha256 is not None and digest_code(folder / MODEL) != version.code_sha256:
        raise UserError(f"the code of {version.uri} was altered after it was registered: find out who did")
    bundle = ModelBundle(
        model=version.model,
        number=version.number,
        weights_sha256=version.weights_sha256,
        tags=version.tags,
        description=client.get_model_version(version.model, str(version.number)).description or "",
        champion=history.standing.champion == version.number,
        evidence=entry and entry.evidence,
        entry=entry and entry.digest,
        run=_run(client, client.get_run(version.run_id)),
        files=list(_files(folder)),
    )
    write_json(folder / ABOUT, bundle.model_dump(mode="json"))
    return bundle


def unpack(folder: Path) -> ModelBundle:
    """Read and verify the bundle in ``folder``; raises UserError if a file is damaged."""
    bundle = ModelBundle.model_validate_json((folder / ABOUT).read_bytes())
    for file in bundle.files:
        if sha256_file(folder / file.path) != file.sha256:
            raise UserError(f"{file.path} of {bundle.uri} came damaged: give the command again")
    return bundle


def _run(client: MlflowClient, run: Run) -> BundledRun:
    run_id = run.info.run_id
    points: list[Metric] = [
        point for name in sorted(run.data.metrics) for point in client.get_metric_history(run_id, name)
    ]
    return BundledRun(
        run_id=run_id,
        name=run.info.run_name,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=[(point.key, point.value, point.timestamp, point.step) for point in points],
        inputs=[
            BundledInput(
                name=each.dataset.name,
                digest=each.dataset.digest,
                source_type=each.dataset.source_type,
                source=each.dataset.source,
                tags={tag.key: tag.value for tag in each.tags},
            )
            for each in (run.inputs.dataset_inputs if run.inputs else ())
        ],
    )


def _is_there(client: MlflowClient, run_id: str, path: str) -> bool:
    folder, _, _ = path.rpartition("/")
    return path in {item.path for item in client.list_artifacts(run_id, folder or None)}


def _fetch(uri: str, target: Path) -> None:
    """Fetch a file or folder to exactly ``target``, whatever path MLflow's store gives it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as scratch:
        Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).rename(target)


def _files(folder: Path) -> Iterator[BundledFile]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield BundledFile(path=path.relative_to(folder).as_posix(), sha256=sha256_file(path))


def main() -> None:
    """Pack the version URI into the folder of the arguments; the last line on standard error is the error, if any."""
    uri, folder = sys.argv[1:]
    end_with_parent()
    try:
        join_servers("mlflow", "s3")
        pack(uri, Path(folder))
    except DarkroomError as error:
        print(escape_controls(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
