"""What is checked with the servers before a flow run exists: passwords, versions, aliases, labels."""

from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, get_args

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.generation.config import Conditions, read_request
from flows.checks import CHECKS, Request, Verb, check, images
from flows.checks.images import (
    deployment_notes,
    require_conditions_in_source,
    require_enough_images,
    require_ingestable,
    require_network,
    require_usable,
)
from flows.checks.models import registered_models, require_model, require_models, require_version
from flows.config import Params
from flows.local_stack.http_api import require
from tests.builders.command_line import CommandLine
from tests.builders.http_server import serving
from tests.builders.model_versions import add_version
from tests.builders.shapes import disc
from tests.builders.small_models import write_model


def test_every_verb_has_checks() -> None:
    assert CHECKS.keys() == {*get_args(Verb)}


@pytest.mark.parametrize(
    ("server", "variable", "secret"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"),
        ("prefect", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"),
    ],
)
def test_a_wrong_password_is_an_error_at_once(
    no_servers: None, monkeypatch: pytest.MonkeyPatch, server: str, variable: str, secret: str
) -> None:
    paths = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(401)

        def do_POST(self) -> None:
            self.do_GET()

    with serving(Refusing) as url:
        monkeypatch.setenv(variable, url)
        monkeypatch.setenv(secret, "someone:test-secret")
        with pytest.raises(UserError, match=f"wrong user or password.*{secret}") as error:
            require(server)  # type: ignore[arg-type]
    assert len(paths) == 1
    assert "test-secret" not in str(error.value)


def test_registry_that_fails_briefly_is_queried_again(no_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [503, 200, 401]

    class Recovering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0))
            self.end_headers()
            self.wfile.write(b'{"registered_models": [{"name": "faces"}]}')

    with serving(Recovering) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert registered_models().keys() == {"faces"}
        with pytest.raises(UserError):
            registered_models()
    assert not answers


def test_labels_are_sought_in_cyclic_links_until_found(
    no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").touch()
        for link in ("a", "b"):
            (tmp_path / "pets" / name / link).symlink_to(tmp_path / "pets")
    params = Params.model_validate({"ingest": {"source": str(tmp_path / "pets")}})
    require_conditions_in_source(params, Conditions(labels=("cat", "dog")))
    with pytest.raises(UserError, match="there is cat, dog"):
        require_conditions_in_source(params, Conditions(labels=("bird",)))

    def files(_: Path) -> Iterator[str]:
        yield from ("cat/1.png", "dog/1.png")
        raise AssertionError("all labels were found")

    monkeypatch.setattr(images, "visible_files", files)
    require_conditions_in_source(params, Conditions(labels=("cat", "dog")))


@pytest.mark.parametrize(
    ("model", "sampling", "conditions"),
    [
        ({"text": True}, {}, {}),
        ({}, {}, {"prompts": ("a cat",)}),
        ({}, {}, {"labels": ("cat",)}),
        ({}, {"guidance": 3}, {}),
    ],
    ids=["captions", "prompt", "one class", "guidance"],
)
def test_conditions_unknown_to_a_model_are_found_before_ingest(
    no_servers: None, tmp_path: Path, model: dict[str, bool], sampling: dict[str, int], conditions: dict[str, Any]
) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "1.png").touch()
    params = Params.model_validate({"ingest": {"source": "pets"}, "model": model, "sampling": sampling})
    with pytest.raises(UserError):
        require_conditions_in_source(params, Conditions(**conditions))


@pytest.mark.parametrize(("count", "held_out"), [(60, 0.05), (60, 0.95), (1001, 0.002)])
def test_too_few_images_to_evaluate_are_found_before_their_ingest(
    no_servers: None, tmp_path: Path, count: int, held_out: float
) -> None:
    Path("discs").mkdir()
    for number in range(count):
        disc(number).save(Path("discs", f"{number}.png"))
    ingest = {"source": "discs", "size": 8, "held_out": held_out}
    with pytest.raises(UserError, match="evaluation needs 10"):
        require_enough_images(Params.model_validate({"ingest": ingest}), None)
    require_enough_images(Params.model_validate({"ingest": ingest | {"held_out": 0.5}}), None)
    assert [path.name for path in tmp_path.iterdir()] == ["discs"]


def test_the_check_of_a_small_source_asks_no_captioner(no_servers: None) -> None:
    Path("discs").mkdir()
    for number in range(40):
        disc(number).save(f"discs/{number}.png")
    captioner = {"command": ["sh", "-c", "touch asked; echo a disc"], "version": "1"}
    ingest = {"source": "discs", "size": 8, "held_out": 0.5, "captioner": captioner}
    require_enough_images(Params.model_validate({"ingest": ingest}), None)
    assert not Path("asked").exists()


def test_images_of_a_small_data_set_do_not_count_twice(no_servers: None, tmp_path: Path) -> None:
    for number in range(40):
        path = Path("first" if number < 20 else "second", f"{number}.png")
        path.parent.mkdir(exist_ok=True)
        disc(number).save(path)
    first = Params.model_validate({"ingest": {"source": "first", "size": 8, "held_out": 0.5}})
    ingest(first.dataset_folder, first.ingest)
    before = read_manifest(first.dataset_folder)
    assert min(before.counts.values()) < 10
    with pytest.raises(UserError, match="evaluation needs 10"):
        require_enough_images(first, before)
    second = Params.model_validate({"ingest": {"source": "second", "size": 8, "held_out": 0.5}})
    require_enough_images(second, before)
    assert read_manifest(first.dataset_folder) == before


@pytest.mark.parametrize(
    ("usable", "unusable", "ingest", "fails"),
    [
        (0, 4, {}, True),
        (3, 9, {}, True),
        (9, 3, {}, False),
        (12, 0, {}, False),
        (3, 9, {"max_quarantined": 0.9}, False),
        (0, 4, {"max_quarantined": 1}, True),
        (12, 0, {"size": 16}, True),
        (12, 0, {"size": 16, "enlarge": True}, False),
        (12, 0, {"size": 16, "fit": "bucket"}, False),
    ],
)
def test_folder_without_enough_usable_images_is_found_before_its_ingest(
    no_servers: None, usable: int, unusable: int, ingest: dict[str, Any], fails: bool
) -> None:
    Path("discs").mkdir()
    for number in range(usable + unusable):
        path = Path("discs", f"{number}.png")
        disc(number).save(path)
        if number >= usable:
            path.write_bytes(path.read_bytes()[:60])
    config = Params.model_validate({"ingest": {"source": "discs", "size": 8} | ingest}).ingest
    with (
        pytest.raises(UserError, match=r"discs cannot be used \(|no usable image in discs") if fails else nullcontext()
    ):
        require_usable(config)


def test_other_storage_is_found_before_a_flow_run(
    no_servers: None, s3_environment: dict[str, str], bucket: str
) -> None:
    Path("discs").mkdir()
    disc(1).save("discs/1.png")
    params = Params.model_validate({"ingest": {"source": "discs", "size": 8}})
    assert require_ingestable(params) is None
    ingest(params.dataset_folder, params.ingest)
    assert require_ingestable(params) == read_manifest(params.dataset_folder)
    other = Params.model_validate({"ingest": {"source": "discs", "size": 12}})
    with pytest.raises(UserError, match=r"ingest\.size=8"):
        require_ingestable(other)
    require_ingestable(other, "always")


def test_deployment_that_would_fail_or_discard_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("discs").mkdir()
    disc(1).save("discs/1.png")
    params = Params.model_validate({"ingest": {"source": "discs", "size": 8}})
    assert deployment_notes(params, tmp_path / "on-another-machine") == []
    [absent] = deployment_notes(params, tmp_path)
    assert "discs" in absent
    ingest(params.dataset_folder, params.ingest)
    assert deployment_notes(params, tmp_path) == []
    write_model(params.run_folder / "final.safetensors", seed=0, images=1)
    [finished] = deployment_notes(params, tmp_path)
    assert str(params.run_folder) in finished
    with pytest.raises(UserError, match=r"ingest\.size=8"):
        deployment_notes(Params.model_validate({"ingest": {"source": "discs", "size": 16}}), tmp_path)


@pytest.mark.slow
def test_impossible_batch_is_found_before_its_flow_run(
    mlflow_client: MlflowClient, bucket: str, tmp_path: Path
) -> None:
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    uri = add_version(mlflow_client, tmp_path, bucket, data=weights.read_bytes()).uri
    Path("requests.csv").write_text("name,prompt\n1,2\n")
    Path("labels.csv").write_text("label\ncat\n")
    Path("sizes.csv").write_text("label,size\ncat,8x8\n")

    def require(model: str = uri, *, steps: int | None = None, **request: Any) -> None:
        overrides = [] if steps is None else [f"sampling.steps={steps}"]
        params = Params.model_validate({"sampling": {} if steps is None else {"steps": steps}})
        check("sample", params, Request(model=model, overrides=overrides, **request), connected=True)

    require(count=4, to=f"s3://{bucket}")
    require(requests="labels.csv")
    require(steps=32, count=4)
    write_model(student := tmp_path / "student.safetensors", seed=1, images=1, training={"student": {"steps": 2}})
    student_uri = add_version(mlflow_client, tmp_path, bucket, data=student.read_bytes()).uri
    with pytest.raises(UserError):
        require(student_uri, steps=32, count=4)
    for request in (
        {"to": "http://example.org"},
        {"to": "s3://no-such-bucket-here"},
        {"conditions": Conditions(negative_prompt="ugly")},
        {"requests": "requests.csv"},
        {"conditions": Conditions(sizes=((8, 8),)), "requests": "sizes.csv"},
        {"requests": f"s3://{bucket}/none.csv"},
    ):
        with pytest.raises(UserError):
            require(**request)


def test_impossible_edit_is_found_before_its_flow_run(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    image, small = tmp_path / "image.png", tmp_path / "small.png"
    disc(1).save(image)
    disc(1).resize((4, 4)).save(small)

    def require(task: str, *files: Path) -> None:
        generation = read_request({"task": task}, *files)
        check("edit", Params(), Request(model=str(weights), generation=generation, overrides=["sampling.steps=null"]))

    require("img2img", image)
    with pytest.raises(UserError):
        require("inpaint", image, small)
    with pytest.raises(UserError):
        require("upscale", image)


def test_files_that_a_training_begins_with_are_sought_before_it(no_servers: None) -> None:
    for section, name in (("training", "init_from"), ("model", "autoencoder")):
        with pytest.raises(UserError):
            require_models(Params.model_validate({section: {name: "nowhere.safetensors"}}))


def test_a_network_that_does_not_fit_the_images_is_found(no_servers: None) -> None:
    require_network(Params())
    with pytest.raises(UserError, match="channel_mult"):
        require_network(Params.model_validate({"ingest": {"size": 8}, "model": {"channel_mult": [1, 1, 1, 1, 1]}}))


def test_wrong_s3_keys_are_an_error_before_a_flow_run(
    s3_environment: dict[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("s3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        require("s3")


def test_an_unknown_version_alias_or_model_lists_those_there_are(
    mlflow_client: MlflowClient, bucket: str, tmp_path: Path
) -> None:
    for _ in range(2):
        add_version(mlflow_client, tmp_path, "checked")
    mlflow_client.set_registered_model_alias("checked", "best", "2")
    for uri in ("models:/checked/1", "models:/checked@best"):
        require_version(uri)
    for uri in ("models:/checked/7", "models:/checked@worst", "models:/checked@champion"):
        with pytest.raises(UserError, match=r"versions 1, 2 and aliases @best \(2\)"):
            require_version(uri)
    with pytest.raises(UserError, match=r"no model chekced .*there is .*checked"):
        require_version("models:/chekced@champion")
    with pytest.raises(UserError, match=r"no model or data set nope.*checked"):
        require_model(Params.model_validate({"training": {"dataset": "nope"}}))
    require_model(Params.model_validate({"training": {"dataset": "checked"}}))


def test_unknown_label_is_found_without_loading_the_model(
    mlflow_client: MlflowClient, bucket: str, tmp_path: Path
) -> None:
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    version = add_version(mlflow_client, tmp_path, "labelled", data=weights.read_bytes())
    params = Params()
    cached = Path(".darkroom/models", f"{sha256_file(weights)}.safetensors")
    cached.parent.mkdir(parents=True)
    weights.rename(cached)
    require_version(version.uri, params, Conditions(labels=("cat",)))
    with pytest.raises(UserError, match="no class 'bird': use one of cat, dog"):
        require_version(version.uri, params, Conditions(labels=("bird",)))


def test_a_tag_with_a_path_is_rejected(mlflow_client: MlflowClient, bucket: str, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    version = add_version(mlflow_client, tmp_path, "forged", data=weights.read_bytes())
    mlflow_client.set_model_version_tag("forged", str(version.number), "darkroom.weights_sha256", "../../m")
    Path(".darkroom/models").mkdir(parents=True)
    try:
        with pytest.raises(UserError, match=r"darkroom\.weights_sha256"):
            require_version(version.uri, Params(), Conditions(labels=("cat",)))
    finally:  # other tests of the session go through the tags of every version
        mlflow_client.delete_registered_model("forged")


@pytest.mark.parametrize("words", [["--dataset", "nobodys"], ["nobodys"], ["nobodys", "--dataset", "nobodys"]])
def test_history_of_an_unknown_data_set_is_an_error(
    mlflow_client: MlflowClient, bucket: str, command_line: CommandLine, words: list[str]
) -> None:
    answer = command_line.answer("model", "history", *words)
    assert (answer.code, "no model or data set nobodys" in answer.err) == (2, True), answer.err
