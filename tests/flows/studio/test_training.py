"""Training from the browser: which images may be chosen, what is started by whom, and what is seen of it."""

import shutil
import stat
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import expect

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.sources.survey import survey
from flows.config import Params
from flows.deployment.retrainings import Retraining, RetrainingStep, base_of
from flows.local_stack.server_process import choose_ports
from tests.builders.browser import chromium, log_in, look
from tests.builders.studio_client import PASSWORD, logged_in, trigger, upload
from tests.builders.waiting import wait_until_served
from tests.builders.workspace import PARAMS, Workspace, running

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio import image_sources, training
from flows.studio.app import launch
from flows.studio.image_sources import check_zip, choose_folder, keep_zip, list_folders
from flows.studio.training import TrainingProgress, describe, make_params


@pytest.fixture
def workspace(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``images`` in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pack(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def test_only_visible_folders_of_the_workspace_can_be_chosen(
    workspace: Path, images: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    for folder in (outside, workspace / ".hidden", workspace / "data" / "blobs", workspace / "reports"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_bytes(next(images.rglob("*.png")).read_bytes())
    (workspace / "link").symlink_to(outside)
    (workspace / "empty").mkdir()
    hostile = [
        "",
        " ",
        ".",
        "..",
        "../..",
        "/",
        "/etc",
        str(outside),
        "link",
        f"images/../../{outside.name}",
        "images/..",
    ]
    hostile += [".hidden", "data/blobs", "reports", "empty", "missing", "a\0b", "x" * 5000, "~nobody-here/x", "~"]
    for text in hostile:
        with pytest.raises(UserError):
            choose_folder(text)
    for text in ("images", "./images/", "images/even/..", str(images), " images "):
        assert choose_folder(text) == images.resolve()
    assert list_folders()[0] == "images"
    assert all((workspace / name).resolve().is_relative_to(images.resolve()) for name in list_folders())
    monkeypatch.setenv("DARKROOM_UI_IMAGES", str(outside.parent))
    assert choose_folder(str(outside)) == outside.resolve()
    assert str(outside) in list_folders()
    # Also if that holds the workspace.
    for text in (".", ".hidden", "data/blobs", str(outside.parent.parent)):
        with pytest.raises(UserError):
            choose_folder(text)


def write_zip(path: Path, name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system, info.compress_type = mode << 16, 3, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "mode"),
    [
        ("/etc/a.png", b"x", stat.S_IFREG),
        ("../a.png", b"x", stat.S_IFREG),
        ("a/../../b.png", b"x", stat.S_IFREG),
        ("..\\b.png", b"x", stat.S_IFREG),
        ("C:\\a.png", b"x", stat.S_IFREG),
        ("a.png", b"/etc/passwd", stat.S_IFLNK),
        ("a.png", b"", stat.S_IFIFO),
        ("a.bmp", bytes(10**7), stat.S_IFREG),
    ],
)
def test_a_hostile_zip_is_refused_before_it_is_read(tmp_path: Path, name: str, data: bytes, mode: int) -> None:
    with pytest.raises(UserError):
        check_zip(write_zip(tmp_path / "a.zip", name, data, mode | 0o644))


def test_a_zip_of_images_passes_within_limits(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(images, tmp_path / "a.zip")
    check_zip(path)
    for limit, value in (("MAX_ZIP_MEMBERS", 47), ("MAX_UNPACKED_BYTES", 1000), ("MAX_ZIP_BYTES", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(image_sources, limit, value)
            with pytest.raises(UserError):
                check_zip(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError):
        check_zip(path)


def test_a_kept_zip_is_there_once_and_whole(images: Path, workspace: Path) -> None:
    path = pack(images, workspace / "a.zip")
    kept = keep_zip(path, "blobs")
    assert kept.parent == workspace / "uploads"
    assert kept.read_bytes() == path.read_bytes()
    assert keep_zip(path, "blobs") == kept
    assert [*kept.parent.iterdir()] == [kept]


def test_folder_and_zip_are_seen_as_init_sees_them(workspace: Path, images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    for number in range(3):
        (images / "odd" / f"copy{number}.png").write_bytes(files[number].read_bytes())
    seen = training.look("images", None)
    assert (seen.survey.images, seen.survey.duplicates, seen.survey.classes) == (51, 3, {"even": 24, "odd": 27})
    assert seen.survey == survey(IngestConfig(source=str(images.resolve())), tmp_path)
    assert 0 < len(seen.thumbnails) <= training.MAX_SHOWN
    zipped = training.look("", str(pack(images, tmp_path / "a.zip")))
    places = {"source", "captions_found"}  # the latter names the first image without a caption
    assert zipped.survey.model_dump(exclude=places) == seen.survey.model_dump(exclude=places)
    assert "duplicates" in training.describe_found(zipped)
    assert str(tmp_path) not in training.describe_found(zipped)


def test_another_data_set_keeps_how_models_are_judged(workspace: Path, images: Path) -> None:
    deployed = Params.model_validate(
        {
            "training": {"dataset": "faces", "images": 7000, "seed": 3},
            "gate": {"delta": 0.2},
            "registry": {"approval": True, "model": "portraits"},
        }
    )
    for number in range(3):
        shutil.copytree(images / "odd", images / f"odd{number}")
    found, sections = training.look("images", None), deployed.model_dump(mode="json")
    own = make_params(base_of(sections, "faces"), found, "faces", 8, 0.5)
    assert (own.training.minutes, own.training.images, own.training.seed) == (0.5, None, 3)
    assert (own.ingest.source, own.ingest.size) == (str(images.resolve()), 8)
    assert own.registry == deployed.registry
    other = make_params(base_of(sections, "blobs"), found, " blobs ", 8, 0.5)
    assert (other.model_name, other.registry.approval, other.gate) == ("blobs", True, deployed.gate)
    assert other.training.seed == 0


@pytest.mark.parametrize(
    ("name", "size", "minutes"),
    [("", 8, 1), ("../a", 8, 1), (".a", 8, 1), ("a/b", 8, 1), ("a", 0, 1), ("a", 8, 0), ("a", 8, -1), ("a", 8, 1e9)],
)
def test_an_impossible_training_is_refused(workspace: Path, name: str, size: int, minutes: float) -> None:
    with pytest.raises(UserError):
        make_params({}, training.look("images", None), name, size, minutes)


def test_too_few_images_to_judge_a_model_are_refused(workspace: Path, images: Path) -> None:
    for file in sorted(images.rglob("*.png"))[:20]:
        file.unlink()
    with pytest.raises(UserError, match="too few"):
        make_params({}, training.look("images", None), "blobs", 8, 1)


NOW = datetime.now(UTC)


def write_run(folder: Path) -> None:
    (folder / "samples").mkdir(parents=True)
    for images in (64, 128):
        (folder / "samples" / f"{images:010d}.png").write_bytes(b"x")
    (folder / "preflight.json").write_text('{"images": 1000}')
    rows = "".join(f"{images},{1 / images},0,0,50,0,0\n" for images in (64, 128, 192))
    (folder / "history.csv").write_text(
        f"images,loss,gradient_norm,learning_rate,images_per_second,data_wait,skipped\n{rows}256,0.0"
    )
    (folder / "losses.csv").write_text(
        "images,train_loss,train_loss_ema,held_out_loss,held_out_loss_ema\n64,1,0.5,1,nan\n128,1,0.25,1,0.75\n"
    )


def test_progress_is_that_of_complete_rows(tmp_path: Path) -> None:
    write_run(tmp_path)
    progress = TrainingProgress.read(tmp_path, NOW - timedelta(minutes=1), None)
    assert (progress.images, progress.total, progress.rate) == (192, 1000, 50)
    assert progress.words() == "192 of 1,000 images, 50 a second, 0:16 left"
    assert [path.stem for path in progress.grids] == ["0000000128", "0000000064"]
    table = progress.table()
    assert len(table) == 3 + 2 + 1
    assert table[table.curve == "training"].loss.tolist() == [1 / 64, 1 / 128, 1 / 192]


def test_a_run_of_another_retraining_is_not_shown(tmp_path: Path) -> None:
    assert TrainingProgress.read(tmp_path, NOW, None) is None
    write_run(tmp_path)
    for begun, ended in ((None, None), (NOW + timedelta(hours=1), None), (NOW - timedelta(2), NOW - timedelta(1))):
        assert TrainingProgress.read(tmp_path, begun, ended) is None


def test_an_empty_list_is_hidden_and_a_start_is_shown(workspace: Path) -> None:
    config = training.page("photos").config
    names = [(each["id"], each["props"].get("label") or each["props"].get("value")) for each in config["components"]]
    ids = {name: number for number, name in names if isinstance(name, str)}
    visible = {each["id"]: each["props"].get("visible") for each in config["components"]}
    assert not visible[ids["Trainings"]]
    [start] = [
        each for each in config["dependencies"] if (ids["Start training"], "click") in map(tuple, each["targets"])
    ]
    assert start["show_progress"] == "full"
    assert start["show_progress_on"]


def test_texts_of_a_run_are_no_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    run = Retraining(uuid4(), Params(), hostile, hostile, True, NOW, NOW, f"'{hostile}")
    html = describe(run, [RetrainingStep("train", hostile, 3, f"'{hostile}")], hostile, None)
    assert "<img" not in html
    assert "href=''" not in html


@pytest.mark.parametrize(("minutes", "words"), [(1, ", at most 1 minute of"), (2.5, ", at most 2.5 minutes of")])
def test_the_time_budget_is_in_words(minutes: float, words: str) -> None:
    params = Params.model_validate({"training": {"minutes": minutes}})
    run = Retraining(uuid4(), params, "Running", "", False, NOW, None, "http://prefect/run")
    assert words in describe(run, [], "", None)


def test_a_step_that_waits_for_approval_leads_to_its_page() -> None:
    run = Retraining(uuid4(), Params(), "Running", "", False, NOW, None, "http://prefect/run")
    html = describe(run, [RetrainingStep("promote", "Paused", 65, "http://prefect/promote")], "", None)
    assert "waits for approval, <a href='http://prefect/promote'" in html


@pytest.fixture
def studio(workspace: Path) -> Iterator[httpx.Client]:
    page = training.page("blobs")
    with logged_in(launch(page, PASSWORD)) as client:
        yield client
    page.close(verbose=False)


def event_of(client: httpx.Client, title: str) -> Any:
    """Choose the first event of a button."""
    config = client.get("config").json()
    [button] = [each["id"] for each in config["components"] if each["props"].get("value") == title]
    first = next(each for each in config["dependencies"] if [button, "click"] in map(list, each["targets"]))
    return lambda event: event["id"] == first["id"]


def test_a_start_needs_its_token_and_a_worker(studio: httpx.Client) -> None:
    session, begin = uuid4().hex, event_of(studio, "Start training")
    blind = {"Name of the data set and model": "blobs", "Size in pixels": 8, "textbox": "guessed"}
    assert "ask again" in trigger(studio, begin, blind, session)["error"]
    examined = trigger(studio, event_of(studio, "Look at the images"), {"Folder on the server": "images"}, session)
    token = examined["data"][-1]
    assert "ask again" in trigger(studio, begin, blind, session)["error"]
    assert "ask again" in trigger(studio, begin, blind | {"textbox": token}, uuid4().hex)["error"]
    # In one line, what is to be started.
    assert "run `darkroom up`" in trigger(studio, begin, blind | {"textbox": token}, session)["error"]


def test_an_uploaded_zip_is_examined(studio: httpx.Client, images: Path, tmp_path: Path) -> None:
    examine = event_of(studio, "Look at the images")
    good = upload(studio, pack(images, tmp_path / "a.zip").read_bytes(), "faces.zip")
    data = trigger(studio, examine, {"file": good, "Or a zip of images": good})["data"]
    assert "<td>48: square, 12 pixels" in data[1]
    assert data[3] == "faces"
    link = write_zip(tmp_path / "link.zip", "a.png", b"/etc/passwd", stat.S_IFLNK | 0o777).read_bytes()
    bad = upload(studio, link, "link.zip")
    assert "not a plain file" in trigger(studio, examine, {"Or a zip of images": bad})["error"]
    elsewhere = {"path": "/etc/hosts", "orig_name": "a.zip", "meta": {"_type": "gradio.FileData"}}
    assert "error" in trigger(studio, examine, {"Or a zip of images": elsewhere})


def test_a_report_runs_no_scripts_and_needs_a_login(studio: httpx.Client, workspace: Path) -> None:
    report = workspace / "reports" / "blobs" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<title>Report</title>")
    answer = studio.get("reports/blobs")
    assert (answer.status_code, answer.text) == (200, "<title>Report</title>")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert {"sandbox", "default-src 'none'", "frame-ancestors 'none'"} <= {*policy}
    for name in ("missing", ".hidden", "a%2f..%2fb", "a%5cb", "%00"):
        assert studio.get(f"reports/{name}").status_code == 404
    with httpx.Client(base_url=studio.base_url) as stranger:
        assert stranger.get("reports/blobs").status_code == 401
    assert studio.get("reports/blobs", headers={"Origin": "http://127.0.0.1:9999"}).status_code == 403


QUICK = {"evaluation": {"samples": 16, "extractor_size": 32}}


def serve(space: Workspace) -> tuple[Any, str]:
    """Begin the studio as a user does; returns its process and address."""
    [port] = choose_ports(1)
    process, address = space.start("ui", "--port", str(port), "--no-browser"), f"http://127.0.0.1:{port}/"
    wait_until_served(address, process)
    return process, address


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_person_trains_from_a_zip_to_the_report(tmp_path: Path) -> None:
    (folder := tmp_path / "workspace").mkdir()
    with running(folder, PARAMS | QUICK, 120) as space:
        space.variables["DARKROOM_UI_PASSWORD"] = PASSWORD
        archive = pack(space.folder / "images", tmp_path / "discs.zip")
        process, address = serve(space)
        try:
            with chromium() as browser:
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.set_default_timeout(120_000)
                expect.set_options(timeout=120_000)
                log_in(page, address)
                expect(page.get_by_text("run `darkroom deploy` there").first).to_be_visible()
                space.json("deploy", "--cron", "0 0 1 1 *", "--monitor-cron", "0 0 1 1 *")
                page.locator("input[type=file]").set_input_files(archive)
                expect(page.get_by_text("discs.zip")).to_be_visible()
                page.get_by_role("button", name="Look at the images").click()
                expect(page.get_by_text("odd 60")).to_be_visible()
                page.get_by_label("Name of the data set and model").fill("blobs")
                page.get_by_label("Minutes of training").fill("1")
                look(page, tmp_path / "plan.png")
                page.get_by_role("button", name="Start training").click()
                expect(page.get_by_text("a second").first).to_be_visible(timeout=600_000)
                # The flow run goes on without the page, which finds it again.
                page.reload()
                expect(page.locator("progress")).to_be_visible()
                expect(page.locator("li.completed", has_text="ingest")).to_be_visible()
                for width in (390, 1280):
                    page.set_viewport_size({"width": width, "height": 900})
                    page.wait_for_timeout(1500)
                    page.screenshot(path=tmp_path / f"running-{width}.png", full_page=True)
                expect(page.get_by_text("models:/blobs/1 is champion")).to_be_visible(timeout=900_000)
                expect(page.get_by_role("button", name="Thumbnail").first).to_be_visible()
                look(page, tmp_path / "ended.png")
                with page.expect_popup() as popup:
                    page.get_by_role("link", name="Report").click()
                expect(popup.value.get_by_text("blobs").first).to_be_visible()
                look(popup.value, tmp_path / "report.png")
        finally:
            process.kill()
            process.wait()
        assert len([*(space.folder / "uploads").iterdir()]) == 1
        [entry] = space.json("model", "history")["entries"]
        assert entry["what"] == "promote"
