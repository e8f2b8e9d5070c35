"""Models from elsewhere on real servers: imported, evaluated, fine-tuned, sampled to S3, traced and reproduced."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.checkpoints import read_model_header
from diffusion.common.files import sha256_file
from tests.builders.pipelines import stable_diffusion
from tests.builders.shapes import disc
from tests.builders.small_models import write_model
from tests.builders.training_runs import MODEL
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LICENCE = ("--licence", "CC-BY-4.0")
LORA = (
    *("--set", "training.adapter={rank: 2, alpha: 4}", "--set", "training.init_from=models:/bases/1"),
    *("--set", "training.images=480", "--set", "training.checkpoints=2"),
)
ADAPTER = {
    "model": {"family": "diffusers"},
    "training": {
        "dataset": "captioned",
        "images": 64,
        "batch_size": 8,
        "checkpoints": 2,
        "warmup_images": 0,
        "learning_rate": 0.01,
        "weighting": "plain",
        "timestep_sampling": "scheduler",
        "precision": "fp32",
        "init_from": "models:/painter/1",
        "adapter": {"rank": 2, "alpha": 4},
    },
    "sampling": PARAMS["sampling"],
    "evaluation": PARAMS["evaluation"],
    "gate": PARAMS["gate"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with running(tmp_path_factory.mktemp("workspace"), PARAMS, 240) as space:
        space.json("ingest", "images")
        yield space


def traced_and_reproduced(workspace: Workspace, uri: str) -> list[dict[str, object]]:
    """The origins of a batch's images, which are generated again to the same bits."""
    lineage = workspace.json("trace", f"{uri}00000001.png")
    assert lineage["broken"] == []
    result = workspace.json("reproduce", uri)
    assert (result["exact"], result["code"], result["images"]) == (result["images"], "shipped", 4)
    origins: list[dict[str, object]] = lineage["origins"]
    return origins


@pytest.mark.long
def test_a_model_from_elsewhere_is_promoted_and_fine_tuned(workspace: Workspace, server: MlflowClient) -> None:
    classes = {"even": 80, "odd": 80}
    model_file = write_model(workspace.folder / "elsewhere.safetensors", 0, images=9, config=MODEL, classes=classes)
    command = ("model", "import", str(model_file), "--name", "bases", *LICENCE)
    result = workspace.json(*command)
    assert result["version"]["number"] == 1
    assert workspace.json(*command)["version"] == result["version"]
    assert len(server.search_model_versions("name='bases'")) == 1
    experiment = server.get_experiment_by_name("bases")
    assert experiment is not None
    assert len(server.search_runs([experiment.experiment_id])) == 1
    assert len(server.search_logged_models([experiment.experiment_id])) == 1

    workspace.json("evaluate", "--model", "models:/bases/1")
    verdict = workspace.json("promote", "--model", "models:/bases/1")
    assert (verdict["promoted"], verdict["version"]["model"]) == (True, "bases")
    run = server.get_run(result["version"]["run_id"])
    assert run.data.metrics["eval/kid_efflite0"] > 0
    assert "darkroom.evaluated_on" in run.data.tags
    card = server.get_model_version("bases", "1").description or ""
    assert "was evaluated on the data set **blobs**" in card
    assert "CC-BY-4.0" in card
    batch = workspace.json("sample", "--model", "models:/bases@champion", "--count", "4")
    [origin] = traced_and_reproduced(workspace, batch["uri"])
    assert origin["files"] == {model_file.name: sha256_file(model_file)}

    workspace.json("train", *LORA)
    workspace.json("evaluate", *LORA)
    workspace.run("promote", *LORA, "--json", code=(0, 3))
    [tuned_version] = server.search_model_versions("name='blobs'")
    assert tuned_version.tags["darkroom.start"] == "models:/bases/1"
    assert tuned_version.tags["darkroom.bases"] == sha256_file(model_file)
    assert tuned_version.tags["darkroom.base_licence"] == "CC-BY-4.0"
    header = read_model_header(workspace.folder / "runs" / "blobs" / "weights.safetensors")
    assert header.base is not None
    assert header.base.version == "models:/bases/1"
    # On a machine that has none of it.
    for path in Path(workspace.folder, ".darkroom", "models").glob("*.safetensors"):
        path.unlink()
    batch = workspace.json("sample", "--model", "models:/blobs/1", "--count", "4")
    [origin] = traced_and_reproduced(workspace, batch["uri"])
    assert origin["uri"] == "models:/bases/1"


@pytest.mark.long
def test_stable_diffusion_goes_through_the_same_gate(workspace: Workspace, server: MlflowClient) -> None:
    stable_diffusion(workspace.folder / "painter")
    captions = workspace.folder / "captioned"
    captions.mkdir()
    lines = ["file_name,text"]
    for number in range(120):
        colour = ("red", "blue", "green")[number % 3]
        image = Image.new("RGB", (16, 16), colour)
        image.paste(disc(number).resize((16, 16)).convert("RGB"), (0, number % 8))
        image.save(captions / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,a {colour} circle")
    (captions / "metadata.csv").write_text("\n".join(lines))
    where = ("--dataset", "captioned")
    workspace.json("ingest", str(captions), *where, "--set", "ingest.size=16")
    command = ("model", "import", "painter", "--name", "painter")
    result = workspace.json(*command)
    uri = result["version"]["model"]
    assert (uri, result["family"], result["origin"]["licence"]) == ("painter", "diffusers", "openrail")
    [version] = server.search_model_versions("name='painter'")
    experiment = server.get_experiment_by_name("painter")
    assert experiment is not None
    assert len(server.search_logged_models([experiment.experiment_id])) == 1

    error = workspace.run("evaluate", "--dataset", "blobs", "--model", "models:/painter/1", code=2)
    assert "ingest.size=16" in error
    workspace.json("evaluate", *where, "--model", "models:/painter/1")
    verdict = workspace.json("promote", *where, "--model", "models:/painter/1")
    assert verdict["promoted"]
    card = server.get_model_version("painter", "1").description or ""
    assert "unknown, as it was not trained here" in card
    assert "openrail" in card
    options = ("--prompt", "a red circle", "--prompt", "a blue square")
    batch = workspace.json("sample", "--model", "models:/painter@champion", "--count", "4", *options)
    [origin] = traced_and_reproduced(workspace, batch["uri"])
    assert origin["files"]["unet/diffusion_pytorch_model.safetensors"] == sha256_file(
        workspace.folder / "painter" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert version.tags["darkroom.weights_sha256"] == result["sha256"]

    (workspace.folder / "adapter.yaml").write_text(yaml.safe_dump(ADAPTER))
    for verb in ("train", "evaluate"):
        workspace.json(verb, "--params", "adapter.yaml")
    workspace.run("promote", "--params", "adapter.yaml", code=(0, 3))
    [tuned_version] = server.search_model_versions("name='captioned-diffusers'")
    assert tuned_version.tags["darkroom.start"] == "models:/painter/1"
    assert tuned_version.tags["darkroom.bases"] == result["sha256"]
    assert tuned_version.tags["darkroom.base_licence"] == "openrail"
    for path in Path(workspace.folder, ".darkroom", "models").glob("*.safetensors"):
        path.unlink()
    batch = workspace.json("sample", "--model", "models:/captioned-diffusers/1", "--count", "4", *options)
    [origin] = traced_and_reproduced(workspace, batch["uri"])
    assert (origin["uri"], origin["licence"]) == ("models:/painter/1", "openrail")
