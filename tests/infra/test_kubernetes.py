"""The Kubernetes manifests, as kustomize builds them: valid, closed, and fit for the work that Prefect gives them."""

import asyncio
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tests.builders.installation import INFRA, new_environment

KUBERNETES = INFRA / "kubernetes"
POOLS = ("cpu", "gpu")
Object = dict[str, Any]


@cache
def built(overlay: str) -> list[Object]:
    """All objects of an overlay."""
    if program := shutil.which("kustomize"):
        command = [program, "build"]
    elif program := shutil.which("kubectl"):
        command = [program, "kustomize"]
    else:
        pytest.skip("there is no kustomize: apt-get install kustomize")
    done = subprocess.run([*command, str(KUBERNETES / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kind(overlay: str, *names: str) -> list[Object]:
    return [each for each in built(overlay) if each["kind"] in names]


def named(overlay: str, kind_: str, name: str) -> Object:
    (found,) = [each for each in kind(overlay, kind_) if each["metadata"]["name"] == name]
    return found


def pods(overlay: str) -> dict[str, Object]:
    """The pods' templates by the name of what makes them."""
    makers = kind(overlay, "Deployment", "StatefulSet")
    return {each["metadata"]["name"]: each["spec"]["template"] for each in makers}


def job(pool: str, **variables: Any) -> Object:
    """The job that Prefect's worker makes of a flow run in ``pool``, by its own code."""
    template = json.loads((KUBERNETES / "base" / "pools" / f"darkroom-{pool}.json").read_text())
    with temporary_settings({PREFECT_API_URL: "http://prefect:4200/api"}):
        made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, variables))
        made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a-run"))
    found: Object = made.job_manifest
    return found


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_every_object_is_what_kubernetes_takes_it_for(overlay: str) -> None:
    for each in built(overlay):
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "darkroom", each["metadata"]["name"]


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_pods_run_unprivileged_read_only_and_with_limits(overlay: str) -> None:
    jobs = {f"job-{pool}": job(pool)["spec"]["template"] for pool in POOLS}
    for name, pod in {**pods(overlay), **jobs}.items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec.get("automountServiceAccountToken") is False or spec["serviceAccountName"] == "worker", name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True), name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}, name
            if name not in jobs:
                assert "livenessProbe" in container, name


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_kubernetes_secrets_are_generated_and_not_in_git(overlay: str, tmp_path: Path) -> None:
    made = new_environment(tmp_path / ".env").keys()
    assert not kind(overlay, "Secret")
    jobs = [job(pool)["spec"]["template"] for pool in POOLS]
    for pod in [*pods(overlay).values(), *jobs]:
        for variable in (each for container in pod["spec"]["containers"] for each in container.get("env", [])):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            if secret is not None:
                assert (secret["name"], secret["key"] in made) == ("darkroom", True), secret
            elif not variable["name"].endswith("_AUTH_STRING_SECRET_KEY"):  # which names the key of a Secret
                assert not re.search(r"(PASSWORD|SECRET_KEY|ACCESS_KEY(_ID)?|AUTH_STRING)$", variable["name"])


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_network_policies_deny_by_default(overlay: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets anybody in"
        for rule in policy.get("egress", []):
            assert rule.get("ports") or rule.get("to"), f"{name} lets out to anywhere"
    for server, port in (("mlflow", 5000), ("prefect", 4200)):
        assert reach(policies, server, port) == [{"darkroom/reaches-servers": "true"}]


def reach(policies: dict[str, Object], server: str, port: int) -> list[Object]:
    """Labels of the pods that may come to ``server``, on that port alone."""
    rules = [
        rule
        for policy in policies.values()
        if policy["podSelector"].get("matchLabels") == {"app.kubernetes.io/name": server}
        for rule in policy.get("ingress", [])
    ]
    assert [each["port"] for rule in rules for each in rule["ports"]] == [port]
    return [each["podSelector"]["matchLabels"] for rule in rules for each in rule["from"]]


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_probes_use_client_credentials_before_traffic(overlay: str) -> None:
    for server in ("mlflow", "prefect"):
        (container,) = pods(overlay)[server]["spec"]["containers"]
        assert container["readinessProbe"]["exec"]["command"] == ["darkroom", "server", "health", server]
        # A restart mends no database: what asks it must not lead to one.
        assert "exec" not in container["livenessProbe"]


def test_servers_run_the_commands_of_compose() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for name in ("mlflow", "prefect", "metrics"):
        (container,) = pods("prod")[name]["spec"]["containers"]
        command = " ".join(services[name]["command"]).replace("${DARKROOM_BUCKET:-darkroom}", "$(DARKROOM_BUCKET)")
        assert " ".join(container["args"]) == command
    for name in ("store", "s3"):
        (container,) = pods("dev")[name]["spec"]["containers"]
        wanted = {word.split("=")[0] for word in services[name]["command"]}
        assert {word.split("=")[0] for word in container["args"]} == wanted
    assert (KUBERNETES / "dev" / "databases.sql").read_bytes() == (INFRA / "docker" / "databases.sql").read_bytes()


@pytest.mark.parametrize("pool", POOLS)
def test_a_flow_run_becomes_a_job_that_kubernetes_takes_and_that_finds_its_servers(pool: str) -> None:
    made = job(pool)
    variables = {each["name"]: each.get("value") for each in made["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert variables["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert variables.keys() >= {"MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    kubernetes_validate.validate(made, kubernetes_validate.latest_version(), strict=True)
    template = made["spec"]["template"]
    assert template["metadata"]["labels"]["darkroom/reaches-servers"] == "true"
    assert template["spec"]["serviceAccountName"] == "job"
    for each in template["spec"]["containers"][0]["envFrom"]:
        assert named("dev", "ConfigMap", each["configMapRef"]["name"])["data"]
        assert named("prod", "ConfigMap", each["configMapRef"]["name"])["data"]
    claims = [each.get("persistentVolumeClaim", {}).get("claimName") for each in template["spec"]["volumes"]]
    assert [claim for claim in claims if claim] == [named("prod", "PersistentVolumeClaim", "work")["metadata"]["name"]]


def test_gpus_are_requested_only_in_the_gpu_pool() -> None:
    def limits(made: Object) -> Object:
        found: Object = made["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return found

    assert "nvidia.com/gpu" not in limits(job("cpu"))
    assert limits(job("gpu"))["nvidia.com/gpu"] == 1
    assert limits(job("gpu", gpus=4))["nvidia.com/gpu"] == 4


def test_a_worker_may_make_jobs_in_its_namespace_and_nothing_else() -> None:
    assert not kind("prod", "ClusterRole", "ClusterRoleBinding")
    (role,) = kind("prod", "Role")
    may = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {resource for resource, verb in may if verb not in ("get", "list", "watch")} == {"jobs"}
    assert not {resource for resource, _ in may} & {"secrets", "*"}
    for pool in POOLS:
        (container,) = pods("prod")[f"worker-{pool}"]["spec"]["containers"]
        path = f"--base-job-template=/etc/pools/darkroom-{pool}.json"
        assert {f"--pool=darkroom-{pool}", path} <= set(container["args"])
        assert json.loads(named("prod", "ConfigMap", "pools")["data"][f"darkroom-{pool}.json"])


def test_a_node_can_be_emptied_without_all_of_a_kind_going_at_once() -> None:
    budgets = {each["metadata"]["name"]: each["spec"]["maxUnavailable"] for each in kind("prod", "PodDisruptionBudget")}
    assert budgets == {"mlflow": 1, "worker-cpu": 1, "worker-gpu": 1}
    assert named("prod", "Deployment", "mlflow")["spec"]["replicas"] == 2
