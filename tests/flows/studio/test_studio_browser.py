"""The studio in a browser: a person logs in, generates, paints a hole and fills it, and votes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from diffusion.families.config import ModelConfig
from diffusion.process.samplers import sampling_config
from flows.local_stack.server_process import choose_ports
from flows.registry.model_versions import Version
from tests.builders.browser import chromium, log_in, look
from tests.builders.captioned import needs_encoder
from tests.builders.http_server import QuietHandler, serving
from tests.builders.reverse_proxy import proxying
from tests.builders.shapes import blob
from tests.builders.small_models import CONFIG, write_model
from tests.builders.studio_client import PASSWORD, with_header

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
import gradio as gr

from flows.studio.app import build, launch
from flows.studio.generate import StudioSource
from flows.studio.votes import VOTES, load_version

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)


def look_at_both_widths(page: Page, shot: Path) -> None:
    """Look at a page on a screen and a phone, with every image inside of both."""
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(1500)
        look(page, shot.with_name(f"{shot.name}-{width}.png"))
        for each in page.locator("img:visible").all():
            box = each.bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width


def paint(page: Page) -> None:
    """Draw a stroke across the middle of the image in the editor."""
    canvas = page.locator("canvas:visible").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(3000)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.wait_for_timeout(300)
    page.mouse.down()
    for step in range(20):
        page.mouse.move(x - 40 + 4 * step, y + step)
        page.wait_for_timeout(30)
    page.mouse.up()
    page.wait_for_timeout(500)


def fill_the_hole(page: Page, filled: Locator) -> None:
    """Paint and fill a hole until the images are ``filled``."""
    unpainted = page.get_by_text(re.compile("the mask keeps all|there is no image"))
    # The editor is slow to take the brush on a busy machine, and then nothing is painted.
    for _ in range(5):
        paint(page)
        press(page, "Inpaint")
        expect(filled.or_(unpainted).first).to_be_visible(timeout=60_000)
        if filled.is_visible():
            break
        expect(unpainted).to_have_count(0, timeout=30_000)


def images(page: Page) -> Locator:
    """The images of the batch that is shown."""
    return page.locator(".images:visible .grid-container button")


def option(page: Page, label: str) -> Locator:
    """The number field of a slider, or another input, of the open tab."""
    return (
        page.get_by_label(label, exact=True)
        .or_(page.get_by_label(f"number input for {label}", exact=True))
        .locator("visible=true")
        .first
    )


def press(page: Page, name: str) -> None:
    """Press a button of the open tab."""
    page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()


def choose(page: Page, label: str, name: str) -> None:
    """Choose from the list of a drop-down, which must not be empty."""
    option(page, label).click()
    page.get_by_role("option", name=name, exact=True).click()


@contextmanager
def visited(studio: gr.Blocks, width: int = 1280) -> Iterator[Page]:
    """The page of a studio in a browser, after the login."""
    address = launch(studio, PASSWORD)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        log_in(page, address)
        yield page
    studio.close(verbose=False)


@pytest.fixture
def studio(tmp_path: Path) -> gr.Blocks:
    """The studio of a small model of two classes."""
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16, classes={"even": 3, "odd": 1})
    return build(StudioSource.from_file(weights, SAMPLING))


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.long), 390])
def test_a_person_generates_and_inpaints(studio: gr.Blocks, width: int, tmp_path: Path) -> None:
    address = launch(studio, PASSWORD)
    hosts = set[str]()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: hosts.add(request.url.partition("//")[2].partition("/")[0]))
        log_in(page, address)
        # Options that were looked at and left alone are as configured.
        for label, value in (("Steps", "2"), ("Guidance", "1"), ("Images", "8")):
            expect(option(page, label)).to_have_value(value)
        press(page, "Generate")
        expect(page.get_by_text("8 images of seed 0 by blobs")).to_be_visible(timeout=60_000)
        expect(images(page)).to_have_count(8)
        page.wait_for_timeout(1000)
        look(page, tmp_path / f"generated-{width}.png")
        for each in images(page).all():
            box = each.bounding_box()
            assert box["x"] + box["width"] <= width
        images(page).nth(1).click()
        press(page, "Inpaint this image")
        filled = page.get_by_text("8 images of seed 0").locator("visible=true")
        fill_the_hole(page, filled)
        expect(filled).to_be_visible()
        page.wait_for_timeout(1000)
        look(page, tmp_path / f"inpainted-{width}.png")
    studio.close(verbose=False)
    # Fonts, scripts and counters of others: nothing is fetched from anywhere else.
    assert hosts == {address.partition("//")[2].rstrip("/")}


@pytest.mark.slow
@needs_encoder
def test_every_control_of_a_model_is_set_and_used(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"text": True})
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16, config=config, classes={"even": 3, "odd": 1})
    blob(1, 16).save(tmp_path / "image.png")
    shared = {"Images": "3", "Steps": "4", "Guidance": "2", "Seed": "5"}
    with visited(build(with_header(weights, SAMPLING, shapes={(16, 16): 4, (12, 20): 2}, guidance=3.0))) as page:
        for title, options in {
            "Generate": {},
            "Interpolate": {"To seed": "6"},
            "Img2img": {"Strength (near 0: keep)": "0.9"},
            "Inpaint": {"Strength (1: replace all)": "0.9"},
        }.items():
            if title != "Generate":
                page.get_by_role("tab", name="Edit").click()
            page.get_by_role("tab", name=title).click()
            option(page, "Prompt").fill("a disc")
            choose(page, "Class", "odd")
            press(page, "New seed")
            for label in ("Seed", *({"To seed"} & options.keys())):
                expect(option(page, label)).not_to_have_value(re.compile("^[01]$"))
            option(page, "Negative prompt").fill("a square")
            choose(page, "Sampler", "heun")
            if title in ("Img2img", "Inpaint"):
                press(page, title)
                expect(page.get_by_text("there is no image").first).to_be_visible(timeout=60_000)
                choose(page, "Size", "16x16")
                inputs = page.get_by_role("tabpanel").last.locator("input[type=file]")
                inputs.first.set_input_files(tmp_path / "image.png")
                page.wait_for_timeout(2000)
            else:
                choose(page, "Size", "20x12")
            for label, value in (shared | options).items():
                option(page, label).fill(value)
                option(page, label).press("Tab")
            made = page.get_by_text("3 images of seed 5 by blobs").locator("visible=true")
            if title == "Inpaint":
                page.get_by_text("guided, 2.5 times").click()
                fill_the_hole(page, made)
            else:
                press(page, title)
            expect(made).to_be_visible(timeout=60_000)
            expect(images(page)).to_have_count(3)
            look(page, tmp_path / f"{title}.png")
        use_the_images(page, tmp_path)


def use_the_images(page: Page, folder: Path) -> None:
    """Download an image of *Generate* with what made it, and vary it."""
    page.get_by_role("tab", name="Generate").click()
    images(page).nth(2).click()
    with page.expect_download() as download:
        page.get_by_label("Download").locator("visible=true").first.click()
    download.value.save_as(folder / "download.png")
    assert download.value.suggested_filename == "blobs-seed5-2.png"
    png = Image.open(folder / "download.png")
    made = {"seed": "5", "index": "2", "label": "odd", "prompt": "a disc"}
    assert {name: png.info[f"darkroom:{name}"] for name in made} == made
    press(page, "Vary this image")
    option(page, "Seed").fill("7")
    expect(option(page, "Prompt")).to_have_value("a disc")
    option(page, "Prompt").press("Enter")
    expect(page.get_by_text("3 images of seed 7").locator("visible=true")).to_be_visible(timeout=60_000)


@pytest.mark.slow
def test_a_person_upscales_an_image(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"low_resolution": 4, "conditional": False})
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, config=config)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "image.png")
    with visited(build(StudioSource.from_file(weights, SAMPLING))) as page:
        page.locator("input[type=file]").last.set_input_files(tmp_path / "image.png")
        page.wait_for_timeout(2000)
        press(page, "Upscale")
        expect(page.get_by_text("1 image of seed 0 by blobs")).to_be_visible(timeout=60_000)
        expect(images(page)).to_have_count(1)


@pytest.mark.slow
def test_progress_has_step_rate_and_time_and_a_person_stops(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16)
    studio = build(StudioSource.from_file(weights, sampling_config(sampler="dpmpp_2m", steps=10_000, compute_batch=64)))
    with visited(studio, 390) as page:
        press(page, "Generate")
        running = page.get_by_text(re.compile(r"[1-9]\d* of 10000 steps, [\d.,]+/s, [\d:]+ left"))
        expect(running.first).to_be_visible(timeout=90_000)
        page.screenshot(path=tmp_path / "running.png")
        press(page, "Stop")
        option(page, "Steps").fill("2")
        option(page, "Steps").press("Tab")
        press(page, "Generate")
        expect(page.get_by_text("8 images of seed 0")).to_be_visible(timeout=90_000)


ATTACK = """
<form id="form" method="post" target="frame"></form>
<iframe name="frame"></iframe>
<script>
const studio = "STUDIO", results = {};
const join = {fn_index: 0, data: [], session_hash: "guessed"};
const form = new FormData();
form.append("files", new Blob(["x"]), "x.png");
const image = path => new Promise(done => {
  const element = new Image();
  element.onload = () => done("loaded");
  element.onerror = () => done("failed");
  element.src = studio + path;
});
const frame = () => new Promise(done => {
  const element = document.querySelector("iframe");
  element.onload = () => { try { done(element.contentDocument ? "readable" : "closed"); } catch { done("closed"); } };
  document.querySelector("form").action = studio + "gradio_api/queue/join";
  document.querySelector("form").submit();
  setTimeout(() => done("closed"), 3000);
});
const stream = () => new Promise(done => {
  const source = new EventSource(studio + "gradio_api/heartbeat/x", {withCredentials: true});
  source.onmessage = () => done("opened");
  source.onerror = () => done("failed");
});
const socket = () => new Promise(done => {
  const socket = new WebSocket(studio.replace("http", "ws") + "gradio_api/queue/join");
  socket.onopen = () => done("opened");
  socket.onerror = () => done("failed");
});
const ask = (path, options = {}) => fetch(studio + path, {credentials: "include", ...options})
  .then(answer => "read " + answer.status, () => "failed");
(async () => {
  results.config = await ask("config");
  results.upload = await ask("gradio_api/upload", {method: "POST", body: form});
  results.join = await ask("gradio_api/queue/join", {method: "POST", body: JSON.stringify(join)});
  results.json = await ask("gradio_api/queue/join",
    {method: "POST", body: JSON.stringify(join), headers: {"Content-Type": "application/json"}});
  results.opaque = (await fetch(studio + "gradio_api/upload",
    {method: "POST", mode: "no-cors", credentials: "include", body: form})).type;
  results.form = await frame();
  results.logout = await image("logout");
  results.favicon = await image("favicon.ico");
  results.stream = await stream();
  results.socket = await socket();
  document.title = JSON.stringify(results);
})();
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_of_another_port_reads_and_changes_nothing(studio: gr.Blocks, name: str) -> None:
    address = launch(studio, PASSWORD)

    class Page(QuietHandler):
        def do_GET(self) -> None:
            self.answer(ATTACK.replace("STUDIO", address).encode())

    with chromium() as browser, serving(Page) as foreign:
        own = browser.new_context().new_page()
        log_in(own, address)
        generate = own.get_by_role("button", name="Generate", exact=True)
        expect(generate).to_be_visible(timeout=60_000)
        before = {*studio.upload_file_set}
        page = own.context.new_page()
        answers = dict[str, list[int]]()
        page.on("response", lambda answer: answers.setdefault(answer.url, []).append(answer.status))
        page.goto(foreign.replace("127.0.0.1", name))
        page.wait_for_function("document.title.startsWith('{')", timeout=60_000)
        results = page.evaluate("JSON.parse(document.title)")
        assert results == {
            **dict.fromkeys(("config", "upload", "join", "json", "logout", "favicon", "stream", "socket"), "failed"),
            "opaque": "opaque",  # sent, and refused
            "form": "closed",
        }
        asked = {url: statuses for url, statuses in answers.items() if url.startswith(address)}
        # The browser shows none of those that it keeps from the page.
        assert {address + "gradio_api/upload", address + "logout"} <= asked.keys()
        assert {status for statuses in asked.values() for status in statuses} == {403}
        assert {*studio.upload_file_set} == before
        # A link opens the studio, but no frame shows it.
        page.evaluate("document.querySelector('iframe').src = '" + address + "'")
        page.wait_for_timeout(2000)
        assert "Generate" not in "".join(frame.content() for frame in page.frames[1:])
        own.reload()
        generate.click()
        expect(own.get_by_text("8 images of seed 0")).to_be_visible(timeout=60_000)
        page.evaluate("location.href = '" + address + "'")
        expect(
            page.get_by_role("button", name="Generate", exact=True).or_(page.get_by_label("password"))
        ).to_be_visible()
    studio.close(verbose=False)


@pytest.mark.slow
def test_a_person_generates_behind_a_reverse_proxy(studio: gr.Blocks, tmp_path: Path) -> None:
    [port] = choose_ports(1)
    url = f"http://127.0.0.1:{port}/darkroom"
    launch(studio, PASSWORD, url=url)
    with chromium() as browser, proxying(port, "/darkroom", studio.local_url):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        log_in(page, f"{url}/")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.get_by_text("8 images of seed 0")).to_be_visible(timeout=60_000)
        expect(images(page)).to_have_count(8)
        page.wait_for_timeout(1000)
        look(page, tmp_path / "proxied.png")
    studio.close(verbose=False)


@pytest.mark.slow
def test_a_person_votes(
    versions: list[Version], mlflow_client: MlflowClient, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://user:test-secret@127.0.0.1:4200/api")
    with visited(build(load_version(versions[1].uri, SAMPLING), versions[1])) as page:
        expect(page.get_by_role("link", name="Prefect")).to_have_attribute("href", "http://127.0.0.1:4200")
        link = page.get_by_role("link", name="MLflow")
        expect(link).to_have_attribute("href", re.compile(f"/models/{bucket}/versions/2"))
        expect(page.get_by_role("tab")).to_have_text(["Generate", "Edit", "Vote"])
        page.get_by_role("tab", name="Vote").click()
        expect(page.get_by_label("Champion")).to_have_value("2 (champion)", timeout=30_000)
        expect(page.get_by_label("Candidate")).to_have_value("1 (previous)")
        choose(page, "Class", "odd")
        option(page, "Seed").fill("4")
        option(page, "Images").fill("8")
        option(page, "Images").press("Tab")
        press(page, "Vote blind")
        expect(page.locator(".pair img:visible")).to_have_count(2, timeout=30_000)
        look_at_both_widths(page, tmp_path / "voting")
        for pair in range(1, 9):
            expect(page.get_by_text(f"Pair {pair} of 8")).to_be_visible(timeout=30_000)
            press(page, ("No difference", "Left", "Right")[pair % 3])
        expect(page.get_by_text("Recorded as its tag darkroom.votes")).to_be_visible(timeout=30_000)
        page.screenshot(path=tmp_path / "voted.png", full_page=True)
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES].endswith("no difference 2")
