"""The studio in a browser: a person logs in, generates, paints a hole and fills it, votes, and rolls back."""

import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from playwright.sync_api import Page, expect

from diffusion.process.samplers import sampling_config
from flows.local_stack.server_process import choose_ports
from flows.registry.model_versions import Version
from flows.sampling import generate_batch
from flows.storage.s3 import Location, Store
from tests.builders.browser import chromium, look
from tests.builders.http_server import serving
from tests.builders.reverse_proxy import proxying
from tests.builders.sampling_batches import batch
from tests.builders.small_models import write_model

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import USER, build, launch
from flows.studio.comparison import VOTES, load_version
from flows.studio.generation import Source
from flows.studio.ledger import read_history

PASSWORD = "test-secret"


def look_at_both_widths(page: Page, shot: Path) -> None:
    """Look at a page on a screen and a phone, with every image inside of both."""
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(1500)
        look(page, shot.with_name(f"{shot.name}-{width}.png"))
        for each in page.locator("img:visible").all():
            box = each.bounding_box()
            assert box is not None
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width


def paint(page: Page) -> None:
    """Draw a stroke across the middle of the image in the editor."""
    canvas = page.locator("canvas:visible").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(3000)
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.wait_for_timeout(300)
    page.mouse.down()
    for step in range(20):
        page.mouse.move(x - 40 + 4 * step, y + step)
        page.wait_for_timeout(30)
    page.mouse.up()
    page.wait_for_timeout(500)


def log_in(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_label("username").fill(USER)
    page.get_by_label("password").fill(PASSWORD)
    page.get_by_role("button", name="Login").click()


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.long), 390])
def test_a_person_generates_and_inpaints(width: int, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16, classes={"even": 3, "odd": 1})
    studio = build(Source.from_file(weights, sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)))
    address = launch(studio, PASSWORD)
    hosts = set[str]()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: hosts.add(request.url.partition("//")[2].partition("/")[0]))
        log_in(page, address)
        # Options that were looked at and left alone are as configured.
        page.get_by_role("button", name="Sampler").locator("visible=true").click()
        for label in ("Steps", "Guidance (1: none)"):
            expect(page.get_by_label(label).locator("visible=true")).to_have_value("")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.get_by_text("8 images of seed 0")).to_be_visible(timeout=60_000)
        thumbnails = page.locator(".grid-container:visible button")
        expect(thumbnails).to_have_count(8)
        page.wait_for_timeout(1000)
        look(page, tmp_path / f"generated-{width}.png")
        for each in thumbnails.all():
            box = each.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= width
        thumbnails.nth(1).click()
        page.get_by_role("button", name="Send to Inpaint").locator("visible=true").click()
        filled = page.get_by_text("8 images of seed 0").locator("visible=true")
        unpainted = page.get_by_text(re.compile("the mask keeps all|inpaint needs"))
        # The editor is slow to take the brush on a busy machine, and then nothing is painted.
        for _ in range(5):
            paint(page)
            page.get_by_role("button", name="Inpaint", exact=True).click()
            expect(filled.or_(unpainted).first).to_be_visible(timeout=60_000)
            if filled.is_visible():
                break
            expect(unpainted).to_have_count(0, timeout=30_000)
        expect(filled).to_be_visible()
        page.wait_for_timeout(1000)
        look(page, tmp_path / f"inpainted-{width}.png")
    studio.close(verbose=False)
    # Fonts, scripts and counters of others: nothing is fetched from anywhere else.
    assert hosts == {address.partition("//")[2].rstrip("/")}


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
def test_a_page_of_another_port_reads_and_changes_nothing(name: str, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16, classes={"even": 3, "odd": 1})
    studio = build(Source.from_file(weights, sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)))
    address = launch(studio, PASSWORD)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.replace("STUDIO", address).encode())

        def log_message(self, *arguments: object) -> None:
            pass

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
def test_a_person_generates_behind_a_reverse_proxy(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, size=16, classes={"even": 3, "odd": 1})
    studio = build(Source.from_file(weights, sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)))
    [port] = choose_ports(1)
    url = f"http://127.0.0.1:{port}/darkroom"
    launch(studio, PASSWORD, url=url)
    with chromium() as browser, proxying(port, "/darkroom", studio.local_url):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        log_in(page, f"{url}/")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.get_by_text("8 images of seed 0")).to_be_visible(timeout=60_000)
        expect(page.locator(".grid-container:visible button")).to_have_count(8)
        page.wait_for_timeout(1000)
        look(page, tmp_path / "proxied.png")
    studio.close(verbose=False)


@pytest.mark.slow
def test_a_person_votes_looks_at_batches_and_rolls_back_with_a_reason(
    versions: list[Version], mlflow_client: MlflowClient, store: Store, bucket: str, tmp_path: Path
) -> None:
    planned_batch = batch(20)
    place = Location(bucket, f"samples/blobs/3/{planned_batch.name}")
    generate_batch.begin(store, planned_batch, place, None)
    for chunk in range(2):
        generate_batch.generate_chunk(store, planned_batch, place, tmp_path / "1.safetensors", chunk, None, 1)
    generate_batch.finish(store, planned_batch, place)
    sampling = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)
    studio = build(load_version(versions[1].uri, sampling), bucket)
    address = launch(studio, PASSWORD)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        log_in(page, address)
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_label("Champion")).to_have_value("2 (champion)", timeout=30_000)
        expect(page.get_by_label("Candidate")).to_have_value("1 (previous)")
        page.get_by_role("button", name="Show both at the same seeds").click()
        expect(page.locator(".grid-container:visible button")).to_have_count(16, timeout=30_000)
        look_at_both_widths(page, tmp_path / "compared")
        page.get_by_role("button", name="Vote blind").click()
        expect(page.locator(".pair img:visible")).to_have_count(2, timeout=30_000)
        look_at_both_widths(page, tmp_path / "voting")
        for pair in range(1, 9):
            expect(page.get_by_text(f"Pair {pair} of 8")).to_be_visible(timeout=30_000)
            page.get_by_role("button", name="No difference").click()
        expect(page.get_by_text("Votes are evidence")).to_be_visible(timeout=30_000)
        page.screenshot(path=tmp_path / "voted.png", full_page=True)
        assert mlflow_client.get_model_version(bucket, "1").tags[VOTES].endswith("no difference 8")
        page.get_by_role("tab", name="Batches").click()
        thumbnails = page.locator("#batch-images .grid-container button")
        expect(thumbnails).to_have_count(20, timeout=30_000)
        thumbnails.nth(3).click()
        expect(page.get_by_text("models:/blobs/3 is not in the registry")).to_be_visible(timeout=30_000)
        expect(page.get_by_text("image 3 of seed 7, as generated")).to_be_visible()
        look_at_both_widths(page, tmp_path / "lineage")
        # Every tab once, however often they are opened.
        labels = ["Generate", "Inpaint", "Img2img", "Interpolate", "Compare", "Batches", "Ledger", "Train"]
        page.get_by_role("tab", name="Ledger").click()
        expect(page.get_by_role("tab")).to_have_text(labels)
        expect(page.get_by_text("2. promote")).to_be_visible(timeout=30_000)
        page.get_by_role("button", name="Roll back …").click()
        confirm = page.get_by_role("button", name="Roll back", exact=True)
        confirm.click()
        expect(page.get_by_text("give a reason")).to_be_visible(timeout=30_000)
        assert read_history(bucket).alias_numbers.champion == 2
        page.get_by_label("Reason").fill("draws three eyes")
        confirm.click()
        expect(page.get_by_text("3. rollback")).to_be_visible(timeout=30_000)
        page.screenshot(path=tmp_path / "rolled-back.png", full_page=True)
    studio.close(verbose=False)
    assert read_history(bucket).alias_numbers.champion == 1
    assert (read_history(bucket).entries[-1].reason or "").endswith("draws three eyes")
