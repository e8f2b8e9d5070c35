"""``darkroom deploy``: applies ``prefect.yaml``, with ``prefect deploy`` and what that does not support; idempotent."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker
from pydantic import BaseModel, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError, describe_validation_error
from diffusion.common.parsing import read_yaml
from flows.config import Params
from flows.deployment.tasks import MIN_LEASE_SECONDS, heartbeat_timeout

PACKAGED = Path(__file__).with_name("prefect.yaml")
PLACEHOLDER = re.compile(r"\{\{ \$(\w+) \}\}")


class NamedPool(BaseModel):
    """Work pool in ``prefect.yaml``."""

    name: str
    type: str


class NamedLimit(BaseModel):
    """Concurrency limit in ``prefect.yaml``."""

    name: str
    limit: int


class Definitions(BaseModel, extra="allow"):
    """What ``deploy`` itself reads of ``prefect.yaml``; Prefect checks the rest."""

    name: str
    pull: Any
    work_pools: list[NamedPool]
    concurrency_limits: list[NamedLimit]
    deployments: list[dict[str, Any]]
    automations: list[dict[str, Any]]


class DeployResult(Config):
    """Result of ``deploy``."""

    definitions: Path
    deployments: list[str]
    work_pools: list[str]
    concurrency_limits: dict[str, int]
    automations: list[str]


def deploy(
    params: Params, workspace: Path, pool: str, training_pool: str, cron: str, monitor_cron: str
) -> DeployResult:
    """Apply the ``prefect.yaml`` of the working folder, or the packaged one; raises UserError for invalid settings.

    ``workspace`` is the folder of data, runs and reports on the workers' machines.
    """
    for schedule in (cron, monitor_cron):
        try:
            CronSchedule(cron=schedule)
        except ValidationError as error:
            message = f"{schedule!r} is not a cron schedule: write it like '0 2 * * *', every night at two (UTC)"
            raise UserError(message) from error
    definitions = path if (path := Path("prefect.yaml")).is_file() else PACKAGED
    values: dict[str, Any] = {
        "DATASET": params.training.dataset,
        "MODEL": params.model_name,
        "PARAMS": params.model_dump(mode="json"),
        "SAMPLING": params.sampling.model_dump(mode="json"),
        "SAMPLING_BATCH": params.sampling_batch.model_dump(mode="json"),
        "WORKSPACE": str(workspace),
        "POOL": pool,
        "TRAINING_POOL": training_pool,
        "CRON": cron,
        "MONITOR_CRON": monitor_cron,
        "HEARTBEAT": str(get_current_settings().flows.heartbeat_frequency or MIN_LEASE_SECONDS),
        "SILENCE": heartbeat_timeout(),
    }
    declarations = read_definitions(definitions, values)
    with get_client(sync_client=True) as client:
        for item in declarations["work_pools"]:
            _ensure_pool(client, item["name"], item["type"])
        for item in declarations["concurrency_limits"]:
            client.upsert_global_concurrency_limit_by_name(item["name"], item["limit"])
        deployments = _prefect_deploy(declarations)
        for item in declarations["automations"]:
            _ensure_automation(client, item)
    return DeployResult(
        definitions=definitions,
        deployments=deployments,
        work_pools=sorted({item["name"] for item in declarations["work_pools"]}),
        concurrency_limits={item["name"]: item["limit"] for item in declarations["concurrency_limits"]},
        automations=[item["name"] for item in declarations["automations"]],
    )


def read_definitions(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the file ``path`` with its placeholders replaced by ``values``.

    Raises UserError for what is invalid, missing or unknown.
    """
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): begin with a copy of {PACKAGED}") from error
    except ValueError as error:
        raise UserError(f"{path} is not plain YAML ({error}): mend it, or begin with a copy of {PACKAGED}") from error
    declarations: dict[str, Any] = fill_placeholders(tree, values, path)
    try:
        Definitions.model_validate(declarations)
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(f"{path}: {words}: begin with a copy of {PACKAGED}") from error
    return declarations


def fill_placeholders(node: Any, values: Mapping[str, Any], path: Path) -> Any:
    """``node`` with ``values`` for ``{{ $NAME }}``: as they are where one stands alone, else as text."""
    if isinstance(node, dict):
        return {name: fill_placeholders(value, values, path) for name, value in node.items()}
    if isinstance(node, list):
        return [fill_placeholders(value, values, path) for value in node]
    if not isinstance(node, str):
        return node
    if unknown_names := [name for name in PLACEHOLDER.findall(node) if name not in values]:
        raise UserError(f"{path}: nothing is called ${unknown_names[0]}; there is {', '.join(sorted(values))}")
    if match := PLACEHOLDER.fullmatch(node):
        return values[match[1]]
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]), node)


def _ensure_pool(client: SyncPrefectClient, name: str, kind: str) -> None:
    try:
        client.read_work_pool(name)
    except ObjectNotFound as error:
        if kind != ProcessWorker.type:
            raise UserError(
                f"there is no work pool {name}, and one of type {kind} needs a job template of yours: make it with "
                f"`prefect work-pool create {name} --type {kind}`"
            ) from error
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))


def _prefect_deploy(declarations: Mapping[str, Any]) -> list[str]:
    with TemporaryDirectory() as scratch:
        path = Path(scratch, "prefect.yaml")
        path.write_text(yaml.safe_dump({name: declarations[name] for name in ("name", "pull", "deployments")}))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        # Wide enough to keep the output for each deployment on one line.
        environment = os.environ | {"COLUMNS": "1000"}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise DarkroomError(f"`prefect deploy` failed: {(process.stderr or process.stdout)[-500:]}")
    return re.findall(r"Deployment '([^']+)' successfully", " ".join(process.stdout.split()))


def _ensure_automation(client: SyncPrefectClient, declaration: Mapping[str, Any]) -> None:
    """Create or update the automation; one that is as ``declaration`` keeps the heartbeats of runs that it tracks."""
    try:
        automation = AutomationCore.model_validate(declaration)
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(f"the automation {declaration.get('name')!r} cannot be: {words}") from error
    automations = client.read_automations_by_name(automation.name)
    # Without the fields that the server adds.
    fields = [
        AutomationCore.model_validate(entry.model_dump(mode="json")).model_dump()
        for entry in (automation, *automations)
    ]
    if not automations:
        client.create_automation(automation)
    elif fields[0] != fields[1]:
        client.update_automation(automations[0].id, automation)
