"""Release: a version of the staging registry is registered here and becomes champion.

It is fetched from the servers that ``DARKROOM_STAGING_*`` name, with everything that belongs to it: weights and code,
tags, card, the gate's evidence, its run with metrics and evaluation, and its data set manifest. It is registered once,
however often the command is given, and the ledger records who released it and why. Needs no Prefect. Killed at any
moment and given again, it ends the same.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, Held, UserError
from flows.environment import settings, staging
from flows.registry import champion, model_versions
from flows.registry.aliases import COPY, adopted
from flows.registry.bundle import MODEL, RUN, ModelBundle, unpack
from flows.registry.ledger import Ledger
from flows.registry.ledger_entries import LedgerEntry
from flows.registry.model_versions import WEIGHTS, Version
from flows.tracking.runs import RELEASED_FROM, one_run

RELEASED_RUN = "darkroom.released_run"
"""Tag of a copied run: the ID of the original run."""
AT_ONCE = 100
"""Parameters, tags or metrics sent to MLflow in one request."""


class Released(Config):
    """Released version, which is champion here now."""

    version: Version
    source: str
    entry: LedgerEntry
    already: bool
    """Whether it was champion before, so that nothing was added to the ledger."""


def release(uri: str, reason: str | None = None) -> Released:
    """Make the version that ``uri`` names in staging champion here.

    Raises UserError if it is not champion there and no ``reason`` is given; Held if a manual override decided against
    it here, or another process changes the champion meanwhile.
    """
    settings().folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(dir=settings().folder) as scratch:
        folder = Path(scratch)
        source = fetch(uri, folder)
        bundle = unpack(folder)
        where = f"{bundle.uri} in {source}"
        if not bundle.champion and reason is None:
            raise UserError(f"{where} is not champion there: say with --reason why it is to be champion here")
        version = register(bundle, folder, where)
    withheld = adopted(MlflowClient(), Ledger.of(version.model)).withheld(version.number)
    if withheld is not None and reason is None:
        raise Held(
            f"a person decided against {version.uri}, which is {where}: {withheld}; say with --reason why it is to be "
            "champion all the same"
        )
    why = f"released from {where}" + (", champion there" if bundle.champion else "") + (f": {reason}" if reason else "")
    done = champion.promote(version.model, version.number, why, evidence=bundle.evidence)
    return Released(version=done.version, source=source, entry=done.entry, already=done.already)


def fetch(uri: str, folder: Path) -> str:
    """Pack ``uri`` into ``folder`` in a process that has only staging's servers; returns the name of staging."""
    servers = staging()
    command = [sys.executable, "-m", "flows.registry.bundle", uri, str(folder)]
    done = subprocess.run(command, env=servers.variables(), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        error = UserError if done.returncode == UserError.exit_code else DarkroomError
        raise error(f"staging ({servers.called}): {last or f'ended with {done.returncode}'}")
    return servers.called


def register(bundle: ModelBundle, folder: Path, where: str) -> Version:
    """Register the bundle in ``folder`` as a version here, or return the version with its weights."""
    client = MlflowClient()
    # Other processes on this machine that release the same version use other folders.
    with FileLock(settings().folder / "release.lock"):
        version = model_versions.find(client, bundle.model, bundle.weights_sha256)
        if version is None:
            run = _run(client, bundle, folder, where)
            model_uri = _logged_model(client, bundle, folder, run)
            tags = {name: value for name, value in bundle.tags.items() if not name.startswith(COPY)}
            tags |= {RELEASED_FROM: where}
            version = model_versions.register_once(client, model_uri, bundle.model, bundle.weights_sha256, tags)
    if not client.get_model_version(version.model, str(version.number)).description:
        card = f"{bundle.description}\n\nReleased from {where}: numbers and runs in this card are those of there."
        client.update_model_version(version.model, str(version.number), description=card)
    return version


def _run(client: MlflowClient, bundle: ModelBundle, folder: Path, where: str) -> MlflowRun:
    """Copy the version's run; the copy is complete once it is marked as finished."""
    packed = bundle.run
    run = one_run(client, bundle.model, RELEASED_RUN, packed.run_id, packed.name)
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        return run
    tags = {name: text for name, text in packed.tags.items() if not name.startswith("mlflow.") or ".git." in name}
    entities = [RunTag(name, text) for name, text in (tags | {RELEASED_FROM: where}).items()]
    params = [Param(name, text) for name, text in packed.params.items()]
    points = [Metric(*point) for point in packed.metrics]
    for first in range(0, max(len(entities), len(params), len(points)), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        client.log_batch(run_id, metrics=points[some], params=params[some], tags=entities[some])
    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(each.name, each.digest, each.source_type, each.source),
                [InputTag(name, text) for name, text in each.tags.items()],
            )
            for each in packed.inputs
        ],
    )
    if (folder / RUN).is_dir():
        client.log_artifacts(run_id, str(folder / RUN))
    client.set_terminated(run_id)
    return run


def _logged_model(client: MlflowClient, bundle: ModelBundle, folder: Path, run: MlflowRun) -> str:
    """Log the version's files as a model of its run, continuing one that a killed release left."""
    run_id, experiment = run.info.run_id, run.info.experiment_id
    found = client.search_logged_models([experiment], f"tags.`{WEIGHTS}` = '{bundle.weights_sha256}'")
    model = next((each for each in found if each.source_run_id == run_id), None)
    if model is None:
        model = client.create_logged_model(experiment, "released", run_id, {WEIGHTS: bundle.weights_sha256})
    if model.status != LoggedModelStatus.READY:
        client.log_model_artifacts(model.model_id, str(folder / MODEL))
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_uri)
