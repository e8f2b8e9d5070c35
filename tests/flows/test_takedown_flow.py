"""Takedown as a whole: what was made from the images is named and marked, and copies of them are cleared."""

import json
import shutil
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.checkpoints import save_tensors
from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import prepare
from diffusion.data.ingest.ingest import encodings_folder, ingest
from diffusion.data.manifest import Manifest, read_manifest, work_folder
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from flows.datasets.checkout import checkout
from flows.datasets.dvc import record_data
from flows.datasets.purge import purge_dvc, purge_files, purge_samples
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import (
    EVALUATED_ON,
    DerivedArtifacts,
    clear_images,
    describe_takedowns,
    find_derived,
    join_takedown_names,
    mark,
)
from flows.storage.s3 import Store
from tests.builders.catalogs import FOLDER, Place
from tests.builders.champion_settings import QUICK
from tests.builders.ingested import files_of
from tests.builders.removals import REMOVAL
from tests.builders.shapes import disc
from tests.builders.small_autoencoders import VAE
from tests.builders.small_models import header
from tests.builders.workspace import PARAMS, Workspace, objects, running


@pytest.fixture
def mlflow(no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An MLflow of the test's own, without a server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return MlflowClient()


def remote_keys(place: Place) -> set[str]:
    """The objects on DVC's remote, by MD5."""
    keys = Store().list_keys(place.bucket, "dvc/files/md5/")
    return {"".join(key.split("/")[-2:]) for key in keys}


def md5s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: md5(data).hexdigest() for name, data in files.items()}


def cached() -> set[str]:
    """The objects in DVC's cache, by MD5."""
    return {path.parent.name + path.name for path in Path(".dvc/cache/files/md5").glob("??/*")}


def take_down(place: Place) -> tuple[Manifest, Manifest, Manifest, dict[str, str]]:
    """A first version, one with an image that goes, one without it; and what the second one consisted of."""
    first, second = place.version(), place.version(*range(100, 104))
    consisted = md5s(files_of(FOLDER))
    remove(FOLDER, Selection(sources=["odd/100.png"]), "consent withdrawn")
    place.publish()
    return first, second, read_manifest(FOLDER), consisted


def test_purge_clears_what_only_affected_versions_need(place: Place) -> None:
    first, second, third, consisted = take_down(place)
    third_files = files_of(FOLDER)
    going = {consisted[second.shards[1].name], consisted[second.parts[1].records.name]}
    assert going <= remote_keys(place) & cached()
    deleted = set(purge_dvc([second], [first, third], place.source))
    assert going == {name for name in deleted if not name.endswith(".dir")}
    assert not deleted & (remote_keys(place) | cached())

    with pytest.raises(UserError, match=r"neither in .* nor in DVC's cache"):
        checkout(FOLDER, second.digest, place.reach, with_removed=True)
    place.forget()
    checkout(FOLDER, first.digest, place.reach)
    checkout(FOLDER, third.digest, place.reach)
    assert files_of(FOLDER) == third_files
    assert set(place.catalog.versions()) == {first.digest, second.digest, third.digest}


def test_purge_leaves_what_another_data_set_needs(place: Place) -> None:
    first, second, third, consisted = take_down(place)
    other = FOLDER.with_name("other")
    config = IngestConfig(source=str(place.images), size=8, held_out=0.33)
    shutil.move(place.images / "odd" / "103.png", "103.png")
    for number in range(100, 103):
        shutil.move(place.images / "odd" / f"{number}.png", f"{number}.png")
    ingest(other, config)
    for number in range(100, 104):
        shutil.move(f"{number}.png", place.images / "odd" / f"{number}.png")
    ingest(other, config)
    record_data(other, place.source)
    shared = consisted[second.shards[1].name]
    assert shared in md5s(files_of(other)).values()
    purge_dvc([second], [first, third], place.source)
    assert shared in remote_keys(place) & cached()


@pytest.mark.slow
def test_purge_that_was_cut_off_ends_the_same(place: Place) -> None:
    first, second, third, consisted = take_down(place)
    half = consisted[second.shards[1].name]
    Store().delete_many(place.bucket, [f"dvc/files/md5/{half[:2]}/{half[2:]}"])
    purge_dvc([second], [first, third], place.source)
    remaining_keys = remote_keys(place), cached()
    assert consisted[second.parts[1].records.name] not in remaining_keys[0] | remaining_keys[1]
    assert purge_dvc([second], [first, third], place.source) == []
    assert (remote_keys(place), cached()) == remaining_keys


@pytest.mark.slow
def test_purged_files_can_be_pushed_again(place: Place) -> None:
    first, second, third, _ = take_down(place)
    backup = Path("kept")
    checkout(FOLDER, second.digest, place.reach, with_removed=True)
    shutil.copytree(FOLDER, backup)
    checkout(FOLDER, third.digest, place.reach)
    purge_dvc([second], [first, third], place.source)
    shutil.rmtree(FOLDER)
    shutil.copytree(backup, FOLDER)
    record_data(FOLDER, place.source)
    place.forget()
    checkout(FOLDER, second.digest, place.reach, with_removed=True)
    assert files_of(FOLDER) == files_of(backup)


def test_purge_clears_local_files_of_affected_versions_alone(dataset: Path, tmp_path: Path) -> None:
    before = read_manifest(dataset)
    remove(dataset, Selection(sources=["odd/01.png"]), "consent withdrawn")
    after = read_manifest(dataset)
    reports = tmp_path / "reports"
    old, new = (tmp_path / "data" / ".shards" / f"{each.shards[0].sha256}.tar" for each in (before, after))
    pages = [reports / "dataset" / f"{each.digest[:16]}.html" for each in (before, after)]
    half = old.with_suffix(".4096.partial")  # as a training leaves it that was killed
    for path in (
        old,
        half,
        new,
        *pages,
        reports / "evaluations" / "x.safetensors",
        work_folder(dataset) / "chunks" / "0.tar",
        encodings_folder(dataset) / "x.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    cleared = purge_files(dataset, [before], [after], reports)
    assert not any(
        path.exists() for path in (old, half, pages[0], reports / "evaluations", work_folder(dataset) / "chunks")
    )
    assert not encodings_folder(dataset).exists()
    assert new.exists()
    assert pages[1].exists()
    assert str(work_folder(dataset) / "index.sqlite") in cleared
    assert purge_files(dataset, [before], [after], reports) == []
    assert read_manifest(dataset) == after


@pytest.mark.parametrize("left", ["trackers", "samples"])
def test_a_purge_of_grids_cut_off_in_between_ends_the_same(left: str, dataset: Path, tmp_path: Path) -> None:
    version, run = read_manifest(dataset), tmp_path / "run"
    about = header().model_copy(update={"model": VAE, "content_digest": version.content_digest})
    save_tensors(run / "final.safetensors", {}, {"model_header": about.model_dump(mode="json")})
    (run / left).mkdir()
    (run / left / "0000000320.png").write_bytes(b"")
    assert purge_samples(run, []) == []
    assert purge_samples(run, [version]) == [str(run / left)]
    assert [path.name for path in run.iterdir()] == ["final.safetensors"]


@pytest.mark.parametrize("name", ["evaluation.json", "comparison.json"])
def test_reports_of_other_darkroom_versions_are_deleted_too(name: str, dataset: Path, tmp_path: Path) -> None:
    page = tmp_path / "reports" / {"evaluation.json": "report.html", "comparison.json": "comparison.html"}[name]
    page.parent.mkdir()
    page.write_bytes(b"")
    page.with_name(name).write_text('{"of": "another version"}')
    assert str(page) in purge_files(dataset, [read_manifest(dataset)], [], page.parent)
    assert not page.exists()


def test_pages_of_sweeps_are_deleted_too(dataset: Path, tmp_path: Path) -> None:
    page = tmp_path / "reports" / "sweeps" / "0123.html"
    (page.parent / "width=8").mkdir(parents=True)
    page.write_bytes(b"")
    purge_files(dataset, [read_manifest(dataset)], [], page.parents[1])
    assert page.exists()
    (page.parent / "width=8" / "evaluation.json").write_text('{"of": "another version"}')
    assert purge_files(dataset, [read_manifest(dataset)], [], page.parents[1]) == [str(page)]
    assert not page.exists()


def run_on(mlflow: MlflowClient, digest: str, dataset: str = "blobs", experiment: str = "blobs") -> str:
    mlflow_experiment = mlflow.get_experiment_by_name(experiment)
    experiment_id = mlflow_experiment.experiment_id if mlflow_experiment else mlflow.create_experiment(experiment)
    tags = {"darkroom.content_digest": digest, "darkroom.dataset": dataset}
    return str(mlflow.create_run(experiment_id, tags=tags, run_name="train").info.run_id)


def version_of(mlflow: MlflowClient, name: str, run_id: str, digest: str | None) -> str:
    if not mlflow.search_registered_models(f"name = '{name}'"):
        mlflow.create_registered_model(name)
    tags = {"darkroom.content_digest": digest} if digest else {}
    return str(mlflow.create_model_version(name, "file:///nowhere", run_id, tags=tags).version)


def named(descendants: DerivedArtifacts) -> tuple[list[str], list[str]]:
    return [run.run_id for run in descendants.runs], [model.uri for model in descendants.models]


def test_derived_runs_versions_and_samples_are_found_by_content(
    bucket: str, mlflow: MlflowClient, s3_environment: dict[str, str]
) -> None:
    removed_content, clean = "a" * 64, "b" * 64
    runs = [
        run_on(mlflow, removed_content),
        run_on(mlflow, removed_content, "copy", "copy"),
        run_on(mlflow, clean),
        run_on(mlflow, "c" * 64),
    ]
    versions = [version_of(mlflow, "blobs", runs[0], removed_content), version_of(mlflow, "blobs", runs[2], clean)]
    version_of(mlflow, "copy", runs[1], None)
    mlflow.set_registered_model_alias("blobs", "champion", versions[0])
    store = Store()
    for key in ("blobs/1/one/batch.json", "blobs/1/one/00000000.png", "blobs/1/two/batch.json", "blobs/2/x/batch.json"):
        store.put_once(bucket, f"samples/{key}", b"")
    store.put_once(bucket, "samples/blobs/11/x/batch.json", b"")

    descendants = find_derived("blobs", {removed_content}, {removed_content, clean}, bucket)
    assert {run.run_id for run in descendants.runs} == set(runs[:2])
    assert [(model.uri, model.aliases) for model in descendants.models] == [
        ("models:/blobs/1", ["champion"]),
        ("models:/copy/1", []),
    ]
    assert descendants.samples == [f"s3://{bucket}/samples/blobs/1/one/", f"s3://{bucket}/samples/blobs/1/two/"]
    assert descendants.unclear_runs == [runs[3]]

    for _ in range(2):
        mark(*named(descendants), REMOVAL)
    mark(*named(descendants), REMOVAL.model_copy(update={"image_keys": ["5" * 64]}))
    names = {REMOVAL.name, REMOVAL.model_copy(update={"image_keys": ["5" * 64]}).name}
    tags = mlflow.get_run(runs[0]).data.tags
    assert set(tags["darkroom.takedown"].split(",")) == names
    assert tags["mlflow.note.content"].count(REMOVAL.name) == 1
    version = mlflow.get_model_version("blobs", "1")
    assert set(version.tags["darkroom.takedown"].split(",")) == names
    assert version.description.count(f"Takedown {REMOVAL.name}") == 1
    assert "consent withdrawn" in version.description
    assert "darkroom.takedown" not in mlflow.get_model_version("blobs", "2").tags
    assert "darkroom.takedown" not in mlflow.get_run(runs[2]).data.tags


def test_warm_started_descendants_are_derived_transitively(
    bucket: str, mlflow: MlflowClient, s3_environment: dict[str, str]
) -> None:
    removed_content, clean = "a" * 64, "b" * 64
    runs = [run_on(mlflow, removed_content), *(run_on(mlflow, clean) for _ in range(3))]
    for run in runs:
        version_of(mlflow, "blobs", run, None)
    for run, start in zip(runs[1:3], ("models:/blobs/1", "models:/blobs/2"), strict=True):
        mlflow.set_tag(run, "darkroom.start", start)
    # What it was made from is deleted, or in another registry.
    mlflow.set_model_version_tag("blobs", "4", "darkroom.ancestors", json.dumps([(removed_content, "blobs")]))
    descendants = find_derived("blobs", {removed_content}, {removed_content, clean}, bucket)
    assert {run.run_id for run in descendants.runs} == set(runs[:3])
    assert [model.uri for model in descendants.models] == [f"models:/blobs/{number}" for number in (1, 2, 3, 4)]


def test_takedown_keeps_run_notes_and_clears_real_images(
    bucket: str, mlflow: MlflowClient, s3_environment: dict[str, str]
) -> None:
    run = run_on(mlflow, "a" * 64)
    mlflow.set_tag(run, "mlflow.note.content", "our best")
    files = ["dataset/manifest.json", "evaluation/evaluation.json", "evaluation/grids/0000000016-ab.png", "params.json"]
    image_files = [
        "dataset/page.html",
        "evaluation/report.html",
        "evaluation/grids/held_out.png",
        "explain/forward.png",
    ]
    for path in (*files, *image_files):
        mlflow.log_text(run, "x", path)
    descendants = find_derived("blobs", {"a" * 64}, {"a" * 64}, bucket)
    mark(*named(descendants), REMOVAL)
    assert mlflow.get_run(run).data.tags["mlflow.note.content"].startswith("our best\n\nTakedown")
    assert sorted(clear_images(descendants)) == [f"runs:/{run}/{path}" for path in sorted(image_files)]
    folders = ("", "dataset", "evaluation", "evaluation/grids", "explain")
    paths = {item.path for folder in folders for item in mlflow.list_artifacts(run, folder) if not item.is_dir}
    assert paths == set(files)
    assert clear_images(descendants) == []


def test_held_out_images_are_cleared_from_evaluations_of_others(
    bucket: str, mlflow: MlflowClient, s3_environment: dict[str, str]
) -> None:
    run = run_on(mlflow, "b" * 64)
    mlflow.set_tag(run, EVALUATED_ON, join_takedown_names("c" * 64, "a" * 64))
    pages = ("evaluation/report.html", "evaluation/grids/held_out.png", "sweep.html")
    for path in ("dataset/page.html", *pages):
        mlflow.log_text(run, "x", path)
    descendants = find_derived("blobs", {"a" * 64}, {"a" * 64, "b" * 64}, bucket)
    assert (descendants.runs, descendants.evaluated) == ([], [run])
    assert set(clear_images(descendants)) == {f"runs:/{run}/{path}" for path in pages}
    assert [item.path for item in mlflow.list_artifacts(run, "dataset")] == ["dataset/page.html"]


def test_version_under_takedown_gives_a_warning() -> None:
    version = Version(model="blobs", number=3, run_id="r", weights_sha256="d" * 64, tags={})
    assert describe_takedowns(version) is None
    records = describe_takedowns(version.model_copy(update={"tags": {"darkroom.takedown": "0123abcd"}}))
    assert records is not None
    assert "models:/blobs/3" in records
    assert "0123abcd" in records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack whose models are trained, registered and printed in no time."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        yield space


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_takedown_tags_run_version_and_samples_and_retraining_is_clean(
    workspace: Workspace, server: MlflowClient
) -> None:
    retraining = workspace.json("retrain", "images", "--count", "8")
    before = retraining["data"]["result"]
    result = workspace.json("data", "remove", "odd/00*.png", "--reason", "consent withdrawn", "--yes")
    assert result["removal"]["images"] == 5
    assert result["held"] == [before["digest"]]
    derived = result["derived"]
    assert [run["run_id"] for run in derived["runs"]] == [retraining["run_id"]]
    assert [(model["uri"], model["aliases"]) for model in derived["models"]] == [("models:/blobs/1", ["champion"])]
    assert derived["samples"] == [retraining["samples"]["uri"]]
    assert server.get_run(retraining["run_id"]).data.tags["darkroom.takedown"] == result["name"]
    assert server.get_model_version("blobs", "1").tags["darkroom.takedown"] == result["name"]
    assert objects(workspace, retraining["samples"]["uri"])

    again = workspace.json("data", "remove", "odd/00*.png", "--reason", "consent withdrawn", "--yes")
    assert again["removal"] == result["removal"] | {"already": True}
    assert again["derived"] == derived

    anew = workspace.json("ingest", "images")
    assert anew["content_digest"] == result["removal"]["content_digest"]
    for path in (workspace.folder / "images" / "odd").glob("00*.png"):
        path.unlink()
    never = workspace.json("ingest", "images", "--dataset", "never")
    assert never["content_digest"] == anew["content_digest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_purged_images_are_gone_from_objects_and_volumes(workspace: Workspace) -> None:
    images = workspace.folder / "more"
    shutil.copytree(workspace.folder / "images", images)
    for number in range(200, 220):
        disc(number).save(images / "odd" / f"{number}.png")
    png, volumes = stored_png(images / "odd" / "200.png"), workspace.folder / ".darkroom" / "s3"
    workspace.run("ingest", "more", "--dataset", "purged")
    assert any(png in content for _, content in objects(workspace, "s3://darkroom/dvc/files/md5/").values())
    assert any(png in path.read_bytes() for path in volumes.rglob("*.dat"))
    workspace.run("data", "remove", "odd/2*.png", "--dataset", "purged", "--reason", "asked to", "--purge", "--yes")
    assert not any(png in content for _, content in objects(workspace, "s3://darkroom/dvc/files/md5/").values())
    # Nor in what the server itself keeps of them.
    assert not any(png in path.read_bytes() for path in volumes.rglob("*.dat"))


def stored_png(path: Path) -> bytes:
    """The image's bytes as a shard holds them."""
    return prepare(path.read_bytes(), IngestConfig(source="x", **PARAMS["ingest"])).png
