"""The Kubernetes manifests, as kustomize builds them: valid, closed, and fit for the work that Prefect gives them."""

import asyncio
import json
import os
import re
import shutil
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from torch.distributed.run import get_args_parser
from typer.main import get_command

from flows.cli import app
from tests.builders.command_line import output_of
from tests.builders.installation import INFRA, new_environment

KUBERNETES = INFRA / "kubernetes"
POOLS = ("cpu", "gpu")
COMPONENTS = ("ray", "training", "kueue", "internet")
OVERLAYS = ("dev", "prod", "prod with components")
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
    with TemporaryDirectory() as scratch:
        name, _, has_components = overlay.partition(" with ")
        folder = KUBERNETES / name
        if has_components:
            # kustomize takes relative paths alone.
            overlays = [os.path.relpath(KUBERNETES / each, Path(scratch).resolve()) for each in (name, "components")]
            document = {"resources": overlays[:1], "components": [f"{overlays[1]}/{each}" for each in COMPONENTS]}
            # What is commented out in the overlay itself, which alone says which images there are.
            text = (folder / "kustomization.yaml").read_text()
            assert "# components: [../components/ray, ../components/training]" in text
            document |= {each: yaml.safe_load(text)[each] for each in ("namespace", "images", "generatorOptions")}
            folder = Path(scratch)
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
        return list(yaml.safe_load_all(output_of([*command, folder])))


def kind(overlay: str, *names: str) -> list[Object]:
    return [each for each in built(overlay) if each["kind"] in names]


def named(overlay: str, kind_: str, name: str) -> Object:
    (manifest,) = [each for each in kind(overlay, kind_) if each["metadata"]["name"] == name]
    return manifest


def pods(overlay: str) -> dict[str, Object]:
    """The pods' templates by the name of what makes them."""
    makers = kind(overlay, "Deployment", "StatefulSet")
    templates = {each["metadata"]["name"]: each["spec"]["template"] for each in makers}
    for jobs in kind(overlay, "JobSet"):
        templates |= {each["name"]: each["template"]["spec"]["template"] for each in jobs["spec"]["replicatedJobs"]}
    for cluster in kind(overlay, "RayCluster"):
        templates["ray-head"] = cluster["spec"]["headGroupSpec"]["template"]
        templates |= {f"ray-{each['groupName']}": each["template"] for each in cluster["spec"]["workerGroupSpecs"]}
    return templates


def job(pool: str, **variables: Any) -> Object:
    """The job that Prefect's worker makes of a flow run in ``pool``, by its own code."""
    template = json.loads((KUBERNETES / "base" / "pools" / f"darkroom-{pool}.json").read_text())
    with temporary_settings({PREFECT_API_URL: "http://prefect:4200/api"}):
        job_configuration = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, variables))
        job_configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a-run"))
    manifest: Object = job_configuration.job_manifest
    return manifest


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_what_kubernetes_takes_it_for(overlay: str) -> None:
    for each in built(overlay):
        if each["kind"] not in ("JobSet", "RayCluster"):
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "darkroom", each["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
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
            if name not in jobs and name != "node":
                assert "livenessProbe" in container, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_secrets_are_generated_and_not_in_git(overlay: str, tmp_path: Path) -> None:
    names = new_environment(tmp_path / ".env").keys()
    assert not kind(overlay, "Secret")
    jobs = [job(pool)["spec"]["template"] for pool in POOLS]
    for pod in [*pods(overlay).values(), *jobs]:
        for variable in (each for container in pod["spec"]["containers"] for each in container.get("env", [])):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            if secret is not None:
                assert (secret["name"], secret["key"] in names) == ("darkroom", True), secret
            elif not variable["name"].endswith("_AUTH_STRING_SECRET_KEY"):  # which names the key of a Secret
                assert not re.search(r"(PASSWORD|SECRET_KEY|ACCESS_KEY(_ID)?|AUTH_STRING)$", variable["name"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_deny_by_default(overlay: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets anybody in"
        for rule in policy.get("egress", []):
            assert rule.get("to"), f"{name} lets out to anywhere"
            blocks = [each["ipBlock"]["cidr"] for each in rule["to"] if "ipBlock" in each]
            if name != "internet":
                assert all(ip_network(block).prefixlen >= 12 for block in blocks), f"{name} lets out to {blocks}"
    for server, port in (("mlflow", 5000), ("prefect", 4200)):
        assert reach(policies, server, port) == [{"darkroom/reaches-servers": "true"}]


INSIDE = ("10.1.2.3", "172.17.0.1", "192.168.1.1", "169.254.169.254", "127.0.0.1", "100.64.0.1", "fd00::1", "fe80::1")
"""Addresses of a cluster, its nodes, and of a cloud's metadata."""


def test_a_component_opens_the_internet_for_pods_that_ask() -> None:
    for overlay in ("dev", "prod"):
        assert "internet" not in [each["metadata"]["name"] for each in kind(overlay, "NetworkPolicy")]
    spec = named("prod with components", "NetworkPolicy", "internet")["spec"]
    label = spec["podSelector"]["matchLabels"]
    for name, template in pods("prod with components").items():
        assert not label.items() <= template["metadata"]["labels"].items(), name
    for variables, expected in (({}, False), ({"internet": "true"}, True)):
        labels = job("cpu", **variables)["spec"]["template"]["metadata"]["labels"]
        assert (label.items() <= labels.items()) is expected
    (rule,) = spec["egress"]
    assert {each["port"] for each in rule["ports"]} == {80, 443}

    def is_open(address: str) -> bool:
        ip = ip_address(address)
        return any(
            ip in ip_network(block["cidr"]) and not any(ip in ip_network(each) for each in block.get("except", ()))
            for block in (each["ipBlock"] for each in rule["to"])
        )

    assert not any(map(is_open, INSIDE))
    assert is_open("1.1.1.1")
    assert is_open("2606:4700::1111")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_workers_reach_the_api_server(overlay: str) -> None:
    policy = named(overlay, "NetworkPolicy", "kubernetes")["spec"]
    label = policy["podSelector"]["matchLabels"].items()
    names = {name for name, template in pods(overlay).items() if label <= template["metadata"]["labels"].items()}
    assert names <= {"worker-cpu", "worker-gpu"}
    assert names
    assert {each["port"] for rule in policy["egress"] for each in rule["ports"]} == {443, 6443}


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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_use_client_credentials_before_traffic(overlay: str) -> None:
    for server in ("mlflow", "prefect"):
        (container,) = pods(overlay)[server]["spec"]["containers"]
        assert container["readinessProbe"]["exec"]["command"] == ["darkroom", "server", "health", server]
        # A restart mends no database: what asks it must not lead to one.
        assert "exec" not in container["livenessProbe"]


def test_servers_run_the_commands_of_compose() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for name in ("mlflow", "prefect"):
        (container,) = pods("prod")[name]["spec"]["containers"]
        command = " ".join(services[name]["command"]).replace("${DARKROOM_BUCKET:-darkroom}", "$(DARKROOM_BUCKET)")
        assert " ".join(container["args"]) == command
    for name in ("store", "s3"):
        (container,) = pods("dev")[name]["spec"]["containers"]
        words = {word.split("=")[0] for word in services[name]["command"]}
        assert {word.split("=")[0] for word in container["args"]} == words
    assert (KUBERNETES / "dev" / "databases.sql").read_bytes() == (INFRA / "docker" / "databases.sql").read_bytes()


@pytest.mark.parametrize("pool", POOLS)
def test_a_flow_run_becomes_a_valid_job_with_servers(pool: str) -> None:
    manifest = job(pool)
    variables = {
        each["name"]: each.get("value") for each in manifest["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert variables["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert variables.keys() >= {"MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    template = manifest["spec"]["template"]
    assert template["metadata"]["labels"]["darkroom/reaches-servers"] == "true"
    assert template["spec"]["serviceAccountName"] == "job"
    for each in template["spec"]["containers"][0]["envFrom"]:
        assert named("dev", "ConfigMap", each["configMapRef"]["name"])["data"]
        assert named("prod", "ConfigMap", each["configMapRef"]["name"])["data"]
    claims = [each.get("persistentVolumeClaim", {}).get("claimName") for each in template["spec"]["volumes"]]
    assert [claim for claim in claims if claim] == [named("prod", "PersistentVolumeClaim", "work")["metadata"]["name"]]


def test_gpus_are_requested_only_in_the_gpu_pool() -> None:
    def limits(manifest: Object) -> Object:
        resources: Object = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return resources

    assert "nvidia.com/gpu" not in limits(job("cpu"))
    assert limits(job("gpu"))["nvidia.com/gpu"] == 1
    assert limits(job("gpu", gpus=4))["nvidia.com/gpu"] == 4


def test_a_worker_may_only_make_jobs_in_its_namespace() -> None:
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


def test_emptying_a_node_leaves_some_of_each_kind() -> None:
    budgets = {each["metadata"]["name"]: each["spec"]["maxUnavailable"] for each in kind("prod", "PodDisruptionBudget")}
    assert budgets == {"mlflow": 1, "worker-cpu": 1, "worker-gpu": 1}
    assert named("prod", "Deployment", "mlflow")["spec"]["replicas"] == 2


def require_pod(template: Object) -> None:
    """Whether Kubernetes takes it for a pod's template."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", **template["metadata"]},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_job_set_and_its_job_are_valid() -> None:
    (manifest,) = kind("prod with components", "JobSet")
    # What the models do not know they leave out.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    (node,) = manifest["spec"]["replicatedJobs"]
    job_ = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train-node-0"}, **node["template"]}
    kubernetes_validate.validate(job_, kubernetes_validate.latest_version(), strict=True)


def test_a_lost_node_restarts_training_without_a_failure() -> None:
    spec = named("prod with components", "JobSet", "train")["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    # The reason with which Kubernetes fails a job by its podFailurePolicy.
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (node,) = spec["replicatedJobs"]
    job_ = node["template"]["spec"]
    assert [each["action"] for each in job_["podFailurePolicy"]["rules"]] == ["FailJob"]
    assert job_["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    # Kubernetes refuses a podFailurePolicy with another.
    assert job_["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > job_["backoffLimit"] == 0
    assert spec["suspend"] is True


def test_torchrun_and_darkroom_take_the_job_set_command() -> None:
    job_ = named("prod with components", "JobSet", "train")["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job_["template"]["spec"]
    (container,) = pod["containers"]
    program, *arguments = container["args"]
    assert program == "torchrun"
    options = get_args_parser().parse_args(arguments)
    assert options.nnodes == str(job_["completions"]) == str(job_["parallelism"])
    # A headless service has the name of the set; its pods are named after set, job, index of the job and of the pod.
    host, port = options.rdzv_endpoint.split(":")
    assert host == "train-node-0-0.train"
    assert int(port) in [each["containerPort"] for each in container["ports"]]
    # torchrun kills its ranks before the pod is killed.
    assert 30 < options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert options.training_script == "darkroom"
    command = get_command(app)
    with command.make_context("darkroom", list(options.training_script_args), resilient_parsing=True) as context:
        name, train, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    assert name == "train"
    assert train.make_context("train", rest, parent=context).params["settings"] == ["training.device=cuda"]


def test_training_waits_in_a_queue_of_kueue() -> None:
    training = named("prod with components", "JobSet", "train")
    assert training["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "darkroom"
    assert training["spec"]["suspend"] is True


def test_ray_reads_the_cluster_with_its_resources() -> None:
    reader = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    (manifest,) = kind("prod with components", "RayCluster")
    assert (manifest["apiVersion"], set(manifest["spec"])) == ("ray.io/v1", {"headGroupSpec", "workerGroupSpecs"})
    node_types = reader._derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    assert {name: (each["resources"]["CPU"], each["resources"].get("GPU", 0)) for name, each in node_types.items()} == {
        "headgroup": (0, 0),  # so that no task is taken by it
        "cpu": (4, 0),
        "gpu": (8, 1),
    }
    assert all(each["min_workers"] <= each["max_workers"] for each in node_types.values())
    for name, template in pods("prod with components").items():
        if name.startswith("ray-"):
            require_pod(template)
    for group in manifest["spec"]["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert set(manifest["spec"]["headGroupSpec"]) == {"rayStartParams", "template"}


def test_jobs_are_ray_clients_and_nodes_are_not() -> None:
    overlay = "prod with components"
    address = named(overlay, "ConfigMap", "clients")["data"]["RAY_ADDRESS"]
    # The operator names the service of the head so.
    assert address == f"ray://{kind(overlay, 'RayCluster')[0]['metadata']['name']}-head-svc:10001"
    for pool in POOLS:
        (container,) = job(pool)["spec"]["template"]["spec"]["containers"]
        assert {"configMapRef": {"name": "clients"}} in container["envFrom"]
        assert "RAY_AUTH_TOKEN" in [each["name"] for each in container["env"]]
    for name, template in pods(overlay).items():
        if name.startswith("ray-"):
            (container,) = template["spec"]["containers"]
            own = {each["name"]: each.get("value") for each in container["env"]}
            assert own["RAY_AUTH_MODE"] == "token"
            assert own["RAY_ADDRESS"] == address.removeprefix("ray://").replace("10001", "6379")
    policies = {each["metadata"]["name"]: each["spec"] for each in kind(overlay, "NetworkPolicy")}
    job_labels = job("cpu")["spec"]["template"]["metadata"]["labels"]
    assert policies["ray-clients"]["podSelector"]["matchLabels"].items() <= job_labels.items()
    for name in ("ray-head", "ray-cpu", "ray-gpu"):
        labels = pods(overlay)[name]["metadata"]["labels"]
        assert policies["ray"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert (
        policies["train"]["podSelector"]["matchLabels"].items() <= pods(overlay)["node"]["metadata"]["labels"].items()
    )


def test_components_run_the_images_of_the_overlay() -> None:
    images = {
        container["image"] for pod in pods("prod with components").values() for container in pod["spec"]["containers"]
    }
    assert images == {"registry.example/darkroom:0.1.0-cpu", "registry.example/darkroom:0.1.0-cuda"}
