"""OpenLineage events of flow runs, by Prefect's hooks, if the environment names where to send them (OPENLINEAGE_*).

A run of Prefect is the run of OpenLineage with the same ID. Data sets, models and sampling batches are its datasets,
with their versions.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow, FlowStateHook

from diffusion.common.errors import DarkroomError, UserError, install_hint
from diffusion.data.manifest import read_manifest
from flows.config import Params
from flows.environment import settings

logger = logging.getLogger(__name__)

Named = tuple[str, str, str | None]
"""A dataset of OpenLineage: namespace, name and version."""
VARIABLES = re.compile(r"OPENLINEAGE_(URL|CONFIG|_TRANSPORT__.+)")
"""Variables of OpenLineage's client that name a destination."""
JOB_NAMESPACE = "darkroom"  # unless OPENLINEAGE_NAMESPACE is another
PRODUCER = "https://pypi.org/project/darkroom-diffusion"


class Hooks(TypedDict, total=False):
    """Options of a flow that call hooks."""

    on_running: list[FlowStateHook[..., Any]]
    on_completion: list[FlowStateHook[..., Any]]
    on_failure: list[FlowStateHook[..., Any]]
    on_crashed: list[FlowStateHook[..., Any]]


def lineage_hooks() -> Hooks:
    """Hooks of a flow; none unless the environment names a destination, since Prefect logs each call of one."""
    if not any(map(VARIABLES.fullmatch, os.environ)):
        return {}
    hooks: list[FlowStateHook[..., Any]] = [emit_lineage]
    return {"on_running": hooks, "on_completion": hooks, "on_failure": hooks, "on_crashed": hooks}


def emit_lineage(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Send the event of a flow run's ``state``; one that cannot be sent is a warning."""
    try:
        _emit(flow.name, flow_run, state)
    except Exception as error:  # noqa: BLE001 (of the network, of a configuration file, of plugins)
        logger.warning("no lineage of %s: %s", flow_run.name, " ".join(str(error).split())[:300])


def _emit(name: str, flow_run: FlowRun, state: State[Any]) -> None:
    try:
        from openlineage.client import OpenLineageClient
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run, job_type_job
    except ModuleNotFoundError as error:
        raise UserError(
            f"OPENLINEAGE_* is set, and {error.name} is not installed: {install_hint('lineage')}"
        ) from error
    kinds = {"RUNNING": RunState.START, "COMPLETED": RunState.COMPLETE, "CRASHED": RunState.ABORT}
    kind = kinds.get(state.type.value, RunState.FAIL)
    result = state.result(raise_on_failure=False) if kind == RunState.COMPLETE else None
    params = Params.model_validate(flow_run.parameters["params"])
    inputs, outputs = DATASETS[name](params, flow_run.parameters, result)
    facets: dict[str, Any] = {}
    if kind in (RunState.FAIL, RunState.ABORT):
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet((state.message or "")[:1000], "PYTHON")
    job_type = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="DARKROOM", jobType="FLOW")
    namespace, subject = os.environ.get("OPENLINEAGE_NAMESPACE", JOB_NAMESPACE), params.training.dataset
    event = RunEvent(
        eventType=kind,
        eventTime=datetime.now(UTC).isoformat(),
        run=Run(str(flow_run.id), facets),
        job=Job(namespace, f"{name}/{subject}", {"jobType": job_type}),
        producer=PRODUCER,
        inputs=[InputDataset(place, name, facets=_facets(version)) for place, name, version in inputs],
        outputs=[OutputDataset(place, name, facets=_facets(version)) for place, name, version in outputs],
    )
    with closing(OpenLineageClient()) as client:
        client.emit(event)


def _facets(version: str | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset

    return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(version)} if version else {}


def _source(source: str | None) -> list[Named]:
    if source is None:
        return []
    scheme, separator, rest = source.partition("://")
    if not separator:
        return [("file", str(Path(source).absolute()), None)]
    place, _, name = rest.partition("/")
    return [(f"{scheme}://{place}", name or "/", None)]


def _data(params: Params, version: str | None = None) -> list[Named]:
    try:
        version = version or read_manifest(params.dataset_folder).digest
    except DarkroomError:  # it is not here yet
        version = None
    return [(f"s3://{settings().bucket}", f"datasets/{params.training.dataset}", version)]


def _registry(place: str, version: str | None = None) -> list[Named]:
    import mlflow  # slow, and an ingest needs none

    # Without credentials, which an address may hold.
    return [(re.sub(r"//[^/]*@", "//", mlflow.get_tracking_uri()), place, version)]


def _model(uri: str) -> list[Named]:
    name, _, version = uri.removeprefix("models:/").replace("@", "/").partition("/")
    return _registry(f"models/{name}", version or None)


Datasets = Callable[[Params, Mapping[str, Any], Any], tuple[list[Named], list[Named]]]
DATASETS: Mapping[str, Datasets] = {
    "ingest": lambda params, _, result: (
        _source(params.ingest.source),
        _data(params, result.result.digest if result else None),
    ),
    "train": lambda params, _, result: (_data(params), _registry(f"runs/{result.run_id}") if result else []),
    "evaluate": lambda params, fields, result: (
        _data(params) + (_model(fields["model"]) if fields.get("model") else []),
        _registry(f"evaluations/{params.training.dataset}", result.eval_key) if result else [],
    ),
    "promote": lambda params, fields, result: (
        _data(params) + (_registry(f"runs/{result.version.run_id}") if result else []),
        _model(result.version.uri) if result else [],
    ),
    "sample": lambda params, fields, result: (
        _model(result.model if result else fields["model"]),
        _source(result.uri.rstrip("/")) if result else [],
    ),
}
"""Inputs and outputs of each flow, by its name: of its parameters, and of its result once there is one."""
