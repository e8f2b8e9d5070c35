"""Release: a version of the staging registry is registered here and becomes champion.

It is fetched from the servers that ``DARKROOM_STAGING_*`` name, as a bundle with its code, card, evidence, run and data
set manifest, and registered once, however often the command is given; the ledger records who released it and why.

MLflow's client knows one set of keys per process, so ``python -m flows.registry.release URI FOLDER`` packs the bundle
in the environment of the source registry.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from diffusion.common.child_processes import end_with_parent
from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.common.files import sha256_file, write_json
from flows.environment import read_staging_servers, settings
from flows.local_stack.stack import join_servers
from flows.registry import champion, model_versions
from flows.registry.aliases import COPY, read_verified_history
from flows.registry.champion import ChampionChange
from flows.registry.ledger import Evidence, Ledger
from flows.registry.model_versions import LOGGED_TAGS, Version, digest_code
from flows.registry.takedown_marks import ANCESTORS, ancestors_tag
from flows.storage.tags import parse_tags
from flows.tracking.runs import (
    AUTOENCODER,
    MANIFEST_ARTIFACT,
    ORIGIN_ARTIFACT,
    RELEASED_FROM,
    START,
    find_or_create_run,
)

AT_ONCE = 100  # parameters, tags or metrics sent to MLflow in one request
MODEL, RUN = "model", "run"  # folders of the bundle with the artifacts of the version and of its run
BASES_FOLDER = "bases"  # folder of the bundle with a bundle for each version it is based on, named by its weights
CARRIED = ("evaluation", "history", "params.json", MANIFEST_ARTIFACT, ORIGIN_ARTIFACT)
"""Artifacts of a run in the bundle: its configuration, evaluation, data set manifest or origin."""


class ModelBundle(Config):
    """Description of the bundle: the version's state in the source registry, and its training run."""

    version: Version
    description: str
    champion: bool
    evidence: Evidence | None
    run_name: str
    run_tags: dict[str, str]
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]
    """Points as name, value, time in milliseconds and step."""
    inputs: list[dict[str, Any]]


class ReleaseResult(ChampionChange):
    """Released version, which is champion here now."""

    source: str


def release(uri: str, reason: str | None = None) -> ReleaseResult:
    """Make the version that ``uri`` names in staging champion here.

    Raises UserError if it is not champion there and no ``reason`` is given; ConflictError if a manual override decided
    against it here, or another process changes the champion meanwhile.
    """
    settings().folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(dir=settings().folder) as scratch:
        folder = Path(scratch)
        source = fetch(uri, folder)
        bundle = unpack(folder)
        origin = f"{bundle.version.uri} in {source}"
        if not bundle.champion and reason is None:
            raise UserError(f"{origin} is not champion there: say with --reason why it is to be champion here")
        bases: dict[str, str] = {}
        # The farthest first, as each needs the ones after it.
        for sha256 in reversed(parse_tags(bundle.version.tags, origin).base_digests):
            base = unpack(folder / BASES_FOLDER / sha256)
            base_version = register(
                _renumber(base, bases), folder / BASES_FOLDER / sha256, f"{base.version.uri} in {source}"
            )
            bases[base.version.uri] = base_version.uri
        version = register(_renumber(bundle, bases), folder, origin)
    demotion = read_verified_history(MlflowClient(), Ledger.of(version.model)).manual_demotion(version.number)
    if demotion is not None and reason is None:
        raise ConflictError(
            f"a person decided against {version.uri}, which is {origin}: {demotion}; say with --reason why it is to be "
            "champion all the same"
        )
    reason_text = (
        f"released from {origin}" + (", champion there" if bundle.champion else "") + (f": {reason}" if reason else "")
    )
    change = champion.promote(version.model, version.number, reason_text, evidence=bundle.evidence)
    return ReleaseResult(source=source, **dict(change))


def _renumber(bundle: ModelBundle, local_uris: Mapping[str, str]) -> ModelBundle:
    """Replace the versions that one was made from by what they became here, by ``local_uris``.

    Leaves out others: their numbers name other versions here. The tag of ancestors says what those learned from.
    """

    def renumber(tags: dict[str, str]) -> dict[str, str]:
        parents = {name: local_uris.get(tags.get(name, "")) for name in (START, AUTOENCODER)}
        rest = {name: value for name, value in tags.items() if name not in parents}
        return rest | {name: uri for name, uri in parents.items() if uri is not None}

    version = bundle.version.model_copy(update={"tags": renumber(bundle.version.tags)})
    return bundle.model_copy(update={"version": version, "run_tags": renumber(bundle.run_tags)})


def fetch(uri: str, folder: Path) -> str:
    """Pack ``uri`` into ``folder`` in a process that has only staging's servers; returns the name of staging."""
    name, variables = read_staging_servers()
    command = [sys.executable, "-m", "flows.registry.release", uri, str(folder)]
    process = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        message = "".join(process.stderr.strip().splitlines()[-1:])
        error = UserError if process.returncode == UserError.exit_code else DarkroomError
        raise error(f"staging ({name}): {message or f'ended with {process.returncode}'}")
    return name


def pack(uri: str, folder: Path) -> None:
    """Fetch the version that ``uri`` names, its run, and the versions it is based on into ``folder``."""
    client = MlflowClient()
    version = model_versions.resolve(client, uri)
    for sha256 in parse_tags(version.tags, version.uri).base_digests:
        if (base := model_versions.find_version_with_weights(sha256)) is None:
            raise UserError(
                f"{version.uri} is based on the model with SHA-256 {sha256}, which is not a version any more: "
                "register it again, with `darkroom model import`"
            )
        _pack(client, model_versions.resolve(client, base), folder / BASES_FOLDER / sha256)
    _pack(client, version, folder)


def _pack(client: MlflowClient, version: Version, folder: Path) -> None:
    """Fetch ``version`` and its run into ``folder``; the description is written last."""
    history = read_verified_history(client, Ledger.of(version.model))
    entry = history.find_newest_entry(version.number)
    _download(version.uri, folder / MODEL)
    for name in CARRIED:
        if name in {item.path for item in client.list_artifacts(version.run_id, name.rpartition("/")[0] or None)}:
            _download(f"runs:/{version.run_id}/{name}", folder / RUN / name)
    run = client.get_run(version.run_id)
    points = [point for name in sorted(run.data.metrics) for point in client.get_metric_history(version.run_id, name)]
    tags = dict(version.tags)
    if START in tags or AUTOENCODER in tags:
        # Versions of before this tag do not have it.
        tags |= {ANCESTORS: ancestors_tag(client, [version.uri]) or "[]"}
    bundle = ModelBundle(
        version=version.model_copy(update={"tags": tags}),
        description=client.get_model_version(version.model, str(version.number)).description or "",
        champion=history.alias_numbers.champion == version.number,
        evidence=entry and entry.evidence,
        run_name=run.info.run_name,
        run_tags=run.data.tags,
        params=run.data.params,
        metrics=[(point.key, point.value, point.timestamp, point.step) for point in points],
        inputs=[dataset_input.to_dictionary() for dataset_input in (run.inputs.dataset_inputs if run.inputs else ())],
    )
    write_json(folder / "bundle.json", bundle.model_dump(mode="json"))


def _download(uri: str, target: Path) -> None:
    """Fetch a file or folder to exactly ``target``, whatever path MLflow's store gives it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as scratch:
        Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).rename(target)


def unpack(folder: Path) -> ModelBundle:
    """Read the bundle in ``folder``; raises UserError if its weights or code are not those that were registered."""
    bundle = ModelBundle.model_validate_json((folder / "bundle.json").read_bytes())
    version = bundle.version
    if sha256_file(folder / MODEL / "artifacts" / "weights.safetensors") != version.weights_sha256:
        raise UserError(f"the weights of {version.uri} do not match their digest: register the model again")
    if version.code_sha256 is not None and digest_code(folder / MODEL) != version.code_sha256:
        raise UserError(f"the code of {version.uri} was altered after it was registered: find out who did")
    return bundle


def register(bundle: ModelBundle, folder: Path, origin: str) -> Version:
    """Register the bundle in ``folder`` as a version here, or return the version with its weights."""
    client, model, digest = MlflowClient(), bundle.version.model, bundle.version.weights_sha256
    # Other processes on this machine that release the same version use other folders.
    with FileLock(settings().folder / "release.lock"):
        if (version := model_versions.find(client, model, digest)) is None:
            model_uri = _log_model(client, bundle.version, folder, _copy_run(client, bundle, folder, origin))
            tags = {name: value for name, value in bundle.version.tags.items() if not name.startswith(COPY)}
            version = model_versions.register_once(client, model_uri, model, digest, tags | {RELEASED_FROM: origin})
    if not client.get_model_version(model, str(version.number)).description:
        card = f"{bundle.description}\n\nReleased from {origin}: numbers and runs in this card are from there."
        client.update_model_version(model, str(version.number), description=card)
    return version


def _copy_run(client: MlflowClient, bundle: ModelBundle, folder: Path, origin: str) -> MlflowRun:
    """Copy the version's run; the copy is complete once it is marked as finished."""
    run = find_or_create_run(
        client, bundle.version.model, "darkroom.released_run", bundle.version.run_id, bundle.run_name
    )
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        return run
    tags = {name: text for name, text in bundle.run_tags.items() if not name.startswith("mlflow.") or ".git." in name}
    entities = [RunTag(name, text) for name, text in (tags | {RELEASED_FROM: origin}).items()]
    params = [Param(name, text) for name, text in bundle.params.items()]
    points = [Metric(*point) for point in bundle.metrics]
    for start in range(0, max(len(entities), len(params), len(points)), AT_ONCE):
        span = slice(start, start + AT_ONCE)
        client.log_batch(run_id, metrics=points[span], params=params[span], tags=entities[span])
    inputs = [
        DatasetInput(Dataset(**dataset_input["dataset"]), [InputTag(*tag) for tag in dataset_input["tags"].items()])
        for dataset_input in bundle.inputs
    ]
    client.log_inputs(run_id, inputs)
    if (folder / RUN).is_dir():
        client.log_artifacts(run_id, str(folder / RUN))
    client.set_terminated(run_id)
    return run


def _log_model(client: MlflowClient, version: Version, folder: Path, run: MlflowRun) -> str:
    """Log the version's files as a model of its run, continuing one that a killed release left."""
    run_id, tags = run.info.run_id, {tag: version.tags[tag] for tag in LOGGED_TAGS if tag in version.tags}
    if (model := next(iter(model_versions.logged_models(client, run_id, version.weights_sha256)), None)) is None:
        model = client.create_logged_model(run.info.experiment_id, "released", run_id, tags)
    if model.status != LoggedModelStatus.READY:
        client.log_model_artifacts(model.model_id, str(folder / MODEL))
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_uri)


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
