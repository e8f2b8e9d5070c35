"""Captions by a command or an endpoint of the user's: called once per image, whatever happens meanwhile."""

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

import diffusion
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from diffusion.data.dataset import Dataset, open_webdataset
from diffusion.data.ingest.config import CaptionerConfig, IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from diffusion.data.manifest import read_manifest, versions
from diffusion.data.tables import content_digest
from diffusion.data.versions.difference import diff
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from tests.builders import ROOT
from tests.builders.http_server import Serve, dripped, listening, request_of, response, serving
from tests.builders.ingested import files_of, records
from tests.builders.shapes import blob


class Endpoint:
    """Captions an image by its digest, counts its requests, and misbehaves to order."""

    def __init__(self) -> None:
        self.requests = Counter[str]()
        self.headers: list[dict[str, str]] = []
        self.seconds = 0.0
        self.status: dict[str, list[int]] = {}
        """Statuses of the first answers by image; "" is for all images."""
        self.bodies: dict[str, bytes] = {}
        self.at_once = self.most_at_once = 0

    @contextmanager
    def running(self) -> Iterator[str]:
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                image = self.rfile.read(int(self.headers["Content-Length"]))
                name = sha256_bytes(image)
                with lock:
                    endpoint.requests[name] += 1
                    endpoint.headers.append(dict(self.headers))
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                    left = endpoint.status.get(name) or endpoint.status.get("", [])
                    status = left.pop(0) if left else 200
                time.sleep(endpoint.seconds)
                body = endpoint.bodies.get(
                    name, endpoint.bodies.get("", json.dumps({"caption": caption(image)}).encode())
                )
                with lock:
                    endpoint.at_once -= 1
                with suppress(BrokenPipeError, ConnectionResetError):  # the client is gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        with serving(Handler) as address:
            yield f"{address}/caption"


def caption(image: bytes) -> str:
    return f"image {sha256_bytes(image)[:8]}"


def pngs(folder: Path) -> dict[str, bytes]:
    """The stored images by key, by stock offsets."""
    contents = {}
    for part in read_manifest(folder).parts:
        if part.shard is not None:
            shard = (folder / part.shard.name).read_bytes()
            rows = [row for row in records(folder) if row["outcome"] == "kept"]
            contents |= {str(row["key"]): shard[row["offset"] : row["offset"] + row["size"]] for row in rows}  # type: ignore
    return contents


def captions(folder: Path) -> dict[str, Any]:
    return {str(row["key"]): row["caption"] for row in records(folder) if row["outcome"] == "kept"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data" / "blobs"


def run(images: Path, data: Path, captioner: dict[str, Any] | None, **fields: Any) -> IngestResult:
    captioner_options = captioner and {"version": "one", "tries": 2, "seconds": 5, **captioner}
    config = IngestConfig.model_validate({"source": str(images), "size": 8, "captioner": captioner_options})
    return ingest(data, config, **fields)


def test_images_are_captioned_once_and_records_decide(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    plain = run(images, data, None)
    shards = read_manifest(data).shards
    with endpoint.running() as url:
        result = run(images, data, {"url": url})
        assert result.captions is not None
        assert (result.captions.requests, result.captions.failed, result.changed) == (48, 0, True)
        assert captions(data) == {key: caption(png) for key, png in pngs(data).items()}
        assert set(endpoint.requests.values()) == {1}
        assert sum(endpoint.requests.values()) == 48
        assert {each["Content-Type"] for each in endpoint.headers} == {"image/png"}
        # Shards stay as they are; the content is another one, and only by its captions.
        now = read_manifest(data)
        assert now.shards == shards
        assert now.content_digest == content_digest(data, now.parts, now.storage) != plain.content_digest
        assert now.captioners == {result.captions.captioner: 48}
        again = run(images, data, {"url": url})
        assert (again.changed, again.digest) == (False, result.digest)
        assert sum(endpoint.requests.values()) == 48
        dataset = Dataset.open(data)
        assert set(dataset.captions(range(48))) == set(captions(data).values())
        by_key = {sample["key"]: sample["caption"] for sample in open_webdataset(data, "train")}
        assert by_key == {key: captions(data)[key] for key in by_key}
        # Another version of it captions all of them, and after a rebuild none.
        other = run(images, data, {"url": url, "version": "two"})
        assert set(endpoint.requests.values()) == {2}
        assert other.content_digest == result.content_digest
        rebuilt = run(images, data, {"url": url}, rebuild="always")
    assert rebuilt.captions is not None
    assert (rebuilt.captions.requests, rebuilt.captions.cached) == (0, 48)
    assert rebuilt.content_digest == result.content_digest


def test_buckets_keep_their_shapes(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(24):
        blob(number).resize(((24, 12), (12, 24), (16, 16))[number % 3]).save(folder / f"{number}.png")
    about = {"source": str(folder), "size": 12, "fit": "bucket", "enlarge": True, "buckets": ["8x18", "12x12", "18x8"]}
    ingest(data, IngestConfig.model_validate(about))
    before = read_manifest(data)
    with Endpoint().running() as url:
        captioner = {"url": url, "version": "one"}
        result = ingest(data, IngestConfig.model_validate(about | {"captioner": captioner}))
    after = read_manifest(data)
    assert result.captions is not None
    assert result.captions.requests == 24
    assert [(part.shape, part.shard, part.totals) for part in after.parts] == [
        (part.shape, part.shard, part.totals) for part in before.parts
    ]
    assert None not in captions(data).values()


def test_data_diff_shows_new_captions(images: Path, data: Path) -> None:
    run(images, data, None)
    before = read_manifest(data)
    tables = files_of(data / "records")
    with Endpoint().running() as url:
        run(images, data, {"url": url})
    for name, content in tables.items():
        (data / "records" / name).write_bytes(content)
    difference = diff(data, before, read_manifest(data))
    assert difference.changed is not None
    assert difference.changed.count == 48
    assert difference.changed.samples[0].before.caption is None
    assert difference.changed.samples[0].after.caption == captions(data)[difference.changed.samples[0].after.key]


def test_captions_of_the_source_stay_unless_configured_otherwise(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for number in range(20):
        blob(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png"} | ({"text": f"blob {number}"} if number % 2 else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    endpoint = Endpoint()
    with endpoint.running() as url:
        run(folder, data, {"url": url})
        assert sum(endpoint.requests.values()) == 10
        assert sum(text.startswith("blob") for text in captions(data).values()) == 10
        run(folder, data, {"url": url, "replace": True})
    assert set(endpoint.requests.values()) == {1}
    assert all(text.startswith("image") for text in captions(data).values())


def test_an_image_without_an_answer_is_counted_and_sent_again(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    run(images, data, None)
    first, second, third = (sha256_bytes(png) for png in list(pngs(data).values())[:3])
    endpoint.status = {first: [500, 503], second: [400], third: [500, 200]}
    with endpoint.running() as url:
        result = run(images, data, {"url": url})
        assert result.captions is not None
        assert (result.captions.requests, result.captions.failed) == (48, 2)
        assert (endpoint.requests[first], endpoint.requests[second], endpoint.requests[third]) == (2, 1, 2)
        assert sum(text is None for text in captions(data).values()) == 2
        again = run(images, data, {"url": url})
    assert again.captions is not None
    assert (again.captions.requests, again.captions.failed) == (2, 0)
    assert captions(data) == {key: caption(png) for key, png in pngs(data).items()}
    assert sum(endpoint.requests.values()) == 48 + 2 + 2


BODIES = (
    *(b"", b"[]", b'"text"', b'{"caption": []}', b'{"caption": ""}', b'{"caption": null}', b'{"caption": "\xff"}'),
    *(b"{" * 5000, b"[" * 100_000, json.dumps({"caption": "x" * 10_001}).encode(), b'{"caption": "' + b"x" * 2**18),
)


def test_too_many_unusable_answers_fail_the_ingest(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    before = run(images, data, None)
    endpoint.bodies = {sha256_bytes(png): body for png, body in zip(pngs(data).values(), BODIES, strict=False)}
    with endpoint.running() as url:
        with pytest.raises(UserError, match="11 of 48 images"):
            run(images, data, {"url": url, "max_failed": 0.2})
        assert read_manifest(data).digest == before.digest
        result = run(images, data, {"url": url, "max_failed": 0.25})
    assert result.captions is not None
    assert (result.captions.cached, result.captions.failed) == (37, 11)
    assert sum(text is None for text in captions(data).values()) == 11


def test_missing_captioners_are_sent_few_images(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    endpoint.status = {"": [401] * 100}
    with endpoint.running() as url, pytest.raises(UserError, match="401"):
        run(images, data, {"url": url, "workers": 2})
    assert 20 <= sum(endpoint.requests.values()) <= 24
    with pytest.raises(UserError, match="in CAPTIONER_TOKEN"):
        run(images, data, {"url": url, "token_env": "CAPTIONER_TOKEN"})


def test_slow_answers_time_out_and_workers_bound_concurrency(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    endpoint.seconds = 0.05
    with endpoint.running() as url:
        run(images, data, {"url": url, "workers": 3})
        assert endpoint.most_at_once == 3
        endpoint.seconds = 0.6
        with pytest.raises(UserError, match=r"within 0\.1 s"):
            run(
                images,
                data,
                {"url": url, "version": "slow", "seconds": 0.1, "tries": 1, "workers": 32, "max_failed": 0.1},
            )


def test_the_token_is_sent_and_written_nowhere(
    images: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CAPTIONER_TOKEN", "hush-4711")
    endpoint = Endpoint()
    endpoint.status = {"": [500] * 2}
    with caplog.at_level("DEBUG"), endpoint.running() as url:
        run(images, data, {"url": url, "token_env": "CAPTIONER_TOKEN", "workers": 1})
    assert {each["Authorization"] for each in endpoint.headers} == {"Bearer hush-4711"}
    assert "hush-4711" not in caplog.text
    assert not [path for path in data.parent.rglob("*") if path.is_file() and b"hush-4711" in path.read_bytes()]


SCRIPT = """
import hashlib, os, sys, time
image = open(sys.argv[2], "rb").read() if len(sys.argv) > 2 else sys.stdin.buffer.read()
mode = sys.argv[1]
if mode == "hang":
    time.sleep(60)
if mode == "secret":
    assert {"PATH", "LC_TIME", "MODEL_KEY"} <= os.environ.keys(), "too few"
    sys.exit(" ".join(name for name, value in os.environ.items() if value == "hush") or 0)
if mode == "flood":
    while True:
        os.write(1, b"x" * 65536)
if mode == "fail":
    sys.exit("no memory left")
if mode == "bytes":
    os.write(1, b"\\xff\\xfe")
elif mode != "nothing":
    print("image", hashlib.sha256(image).hexdigest()[:8])
"""


@pytest.mark.parametrize("more", [[], ["{image}"]])
def test_commands_get_images_on_standard_input_or_as_files(
    tmp_path: Path, images: Path, data: Path, more: list[str]
) -> None:
    command = [sys.executable, "-S", "-c", SCRIPT, "work; echo $HOME", *more]
    for path in sorted(images.glob("*/*"))[6:]:
        path.unlink()
    run(images, data, {"command": command})
    assert captions(data) == {key: caption(png) for key, png in pngs(data).items()}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("hang", "no answer within"),
        ("flood", "more than"),
        ("fail", "no memory left"),
        ("bytes", "UTF-8"),
        ("nothing", "no caption"),
    ],
)
def test_a_command_that_misbehaves_costs_its_own_image_only(images: Path, data: Path, mode: str, reason: str) -> None:
    for path in sorted(images.glob("*/*"))[2:]:
        path.unlink()
    start = time.monotonic()
    result = run(images, data, {"command": [sys.executable, "-S", "-c", SCRIPT, mode], "seconds": 1, "max_failed": 1})
    assert time.monotonic() - start < 20
    assert result.captions is not None
    assert result.captions.failed == 2
    assert reason in next(iter(result.captions.reasons))


def test_a_captioner_that_cannot_be_is_named_at_once(images: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no-such-program"):
        run(images, data, {"command": ["no-such-program"]})
    for wrong in (
        {},
        {"command": ["x"], "url": "http://x"},
        {"url": "ftp://x"},
        {"url": "http://me@x"},
        {"url": "http://x:port/"},
        {"url": "http://x:99999/"},
        {"url": "http://x y/"},
        {"url": "http://x/\n"},
        {"command": []},
        {"url": "http://x", "environment": ["PATH"]},
        {"command": ["x"], "environment": ["A=b"]},
    ):
        with pytest.raises(ValidationError):
            CaptionerConfig.model_validate({"version": "1", **wrong})


@pytest.mark.parametrize("head", ["", "#!/no/such/interpreter\n"], ids=["no interpreter", "a missing one"])
def test_a_script_that_cannot_be_started_is_named(tmp_path: Path, images: Path, data: Path, head: str) -> None:
    script = tmp_path / "caption.txt"
    script.write_text(f"{head}echo caption\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"ingest\.captioner\.command"):
        run(images, data, {"command": [str(script)]})


def test_nothing_that_a_command_starts_outlives_its_answer(tmp_path: Path, images: Path, data: Path) -> None:
    for path in sorted(images.glob("*/*"))[1:]:
        path.unlink()
    started = f"sleep 60 > /dev/null 2>&1 & echo $! > {tmp_path}/pid; echo caption"
    run(images, data, {"command": ["sh", "-c", started]})
    process = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 5
    while process.is_file() and process.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_gets_only_variables_that_are_harmless_or_named(
    images: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "CAPTIONER_TOKEN",
        "DATABASE_URL",
        "SSH_AUTH_SOCK",
        "HTTPS_PROXY",
    ):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("LC_TIME", "C")
    monkeypatch.setenv("MODEL_KEY", "needed")
    for path in sorted(images.glob("*/*"))[1:]:
        path.unlink()
    command = {"command": [sys.executable, "-S", "-c", SCRIPT, "secret"], "max_failed": 1}
    result = run(images, data, command | {"environment": ["MODEL_KEY"]})
    assert result.captions is not None
    assert list(result.captions.reasons) == ["it has no caption for it"]
    with pytest.raises(UserError, match="MODEL_KEI"):
        run(images, data, command | {"environment": ["MODEL_KEI"]})


@pytest.mark.parametrize("answer", ["echo caption", "printf caption; exec >/dev/null"], ids=["open", "closed"])
def test_an_answer_counts_though_a_child_holds_standard_output(images: Path, data: Path, answer: str) -> None:
    for path in sorted(images.glob("*/*"))[1:]:
        path.unlink()
    start = time.monotonic()
    run(images, data, {"command": ["sh", "-c", f"sleep 60 & {answer}"], "seconds": 30})
    assert set(captions(data).values()) == {"caption"}
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "serve",
    [
        dripped(b"", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000),
        dripped(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 1000),
    ],
    ids=["headers", "body"],
)
def test_an_endpoint_that_sends_byte_by_byte_ends_in_time(images: Path, data: Path, serve: Serve) -> None:
    start = time.monotonic()
    with listening(serve) as port, pytest.raises(UserError, match=r"within 0\.2 s"):
        run(images, data, {"url": f"http://127.0.0.1:{port}/", "seconds": 0.2, "tries": 1, "workers": 24})
    assert time.monotonic() - start < 10


def test_an_endpoint_that_redirects_is_not_followed(images: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_TOKEN", "hush")
    requests: list[bytes] = []
    with listening(lambda client: requests.append(request_of(client))) as other:

        def redirect(client: socket.socket) -> None:
            request_of(client)
            client.sendall(response(b"", f"Location: http://127.0.0.1:{other}/", status="302 Found"))

        with listening(redirect) as port, pytest.raises(UserError, match="302"):
            run(images, data, {"url": f"http://127.0.0.1:{port}/", "token_env": "CAPTIONER_TOKEN"})
    assert requests == []


def test_images_that_rules_drop_are_not_sent(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.new("L", (8, 8), 60 * number).save(images / f"flat-{number}.png")
    endpoint, data, rules = Endpoint(), tmp_path / "data" / "blobs", {"min_contrast": 1}
    with endpoint.running() as url:
        captioner = {"url": url, "version": "one"}

        def run(**captions: Any) -> IngestResult:
            return diffusion.ingest(images, "blobs", size=8, curation=rules, captioner=captioner | captions)

        first = run()
        assert first.captions is not None
        assert first.captions.requests == sum(endpoint.requests.values()) == first.kept == 48
        assert first.dropped == 3
        assert first.digest == read_manifest(data).digest
        assert set(captions(data).values()) == {caption(image) for image in pngs(data).values()}
        again = run()
        assert (again.changed, again.digest) == (False, first.digest)
        blob(100).save(images / "new.png")
        grown = run()
        assert grown.captions is not None
        assert (grown.kept, grown.captions.requests, sum(endpoint.requests.values())) == (49, 1, 49)
        blob(101).save(images / "newer.png")
        endpoint.status[""] = [400] * 9
        with pytest.raises(UserError):
            run(max_failed=0)
        endpoint.status[""] = []
        assert run().kept == 50
        assert sum(endpoint.requests.values()) == 51
    rows = [row for row in records(data) if row["outcome"] == "dropped"]
    assert len(rows) == 3
    assert not any(row["caption"] for row in rows)


def test_a_takedown_forgets_the_answers_about_its_images(images: Path, data: Path) -> None:
    endpoint = Endpoint()
    with endpoint.running() as url:
        run(images, data, {"url": url})
        key, text = next(iter(captions(data).items()))
        remove(data, Selection(prefixes=[key]), "asked for")
        assert text not in captions(data).values()
        paths_with_text = [
            path for path in data.parent.rglob("*") if path.is_file() and text.encode() in path.read_bytes()
        ]
        assert not [path for path in paths_with_text if "captions" in path.name or "records" in path.parts]
        after = run(images, data, {"url": url})
    assert after.captions is not None
    assert after.captions.requests == 0
    assert read_manifest(data).captioners == {after.captions.captioner: 47}


@pytest.mark.slow
@pytest.mark.drill
def test_killed_at_random_moments_no_image_with_a_stored_answer_is_asked_again(
    images: Path, data: Path, kills: int
) -> None:
    endpoint, chance, workers = Endpoint(), random.Random(0), 2
    endpoint.seconds = 0.02
    with endpoint.running() as url:
        settings = {"source": str(images), "size": 8, "captioner": {"url": url, "version": "one", "workers": workers}}
        script = (
            "import json, sys; from pathlib import Path; from diffusion.data.ingest.config import IngestConfig; "
            "from diffusion.data.ingest.ingest import ingest; print('begins', flush=True); "
            f"ingest(Path({str(data)!r}), IngestConfig.model_validate(json.loads({json.dumps(settings)!r})))"
        )
        survived = False
        for _ in range(kills):
            process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
            assert process.stdout
            process.stdout.readline()
            before = sum(endpoint.requests.values())
            while sum(endpoint.requests.values()) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
            survived |= process.wait() == 0
        result = ingest(data, IngestConfig.model_validate(settings))
    assert captions(data) == {key: caption(png) for key, png in pngs(data).items()}
    times_sent = Counter(endpoint.requests.values())
    assert sum(count * times for times, count in times_sent.items()) <= 48 + kills * workers
    assert times_sent[1] >= 48 - kills * workers
    assert len(list(versions(data))) == 1
    assert survived or (result.captions is not None and result.captions.cached + result.captions.requests == 48)


def test_a_trigger_is_no_caption_where_rules_come_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    endpoint = Endpoint()
    with endpoint.running() as url:
        captioner = {"url": url, "version": "one"}
        rules = {"min_contrast": 1}
        result = diffusion.ingest(images, "blobs", size=8, curation=rules, captioner=captioner, trigger="sks")
    assert result.captions is not None
    assert result.captions.requests == result.kept == 48
