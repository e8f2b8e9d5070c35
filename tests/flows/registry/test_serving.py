"""A served model over HTTP: MLflow's protocol, and what a client that means harm cannot do to it."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
import pytest
from PIL import Image

from diffusion.checkpoints import load_model
from diffusion.common.image_grids import to_pil_image
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from flows.local_stack.server_process import choose_ports
from flows.registry.pyfunc_model import MAX_TABLE_IMAGES, ServedModel
from flows.registry.serving import ScoringApp
from tests.builders.small_models import write_model
from tests.builders.waiting import wait_until_served

SAMPLING = sampling_config(steps=3, compute_batch=4)
JSON = {"Content-Type": "application/json"}
LONG = {"count": 384, "steps": 10_000}
"""Minutes of work for a small model, and just within the limit."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.safetensors", seed=0, images=0, classes={"cat": 1, "dog": 1})


@pytest.fixture
def served(weights: Path) -> ServedModel:
    model = ServedModel()
    model.use(load_model(weights), SAMPLING)
    return model


Post = Callable[..., httpx.Response]


@pytest.fixture
def post(served: ServedModel) -> Post:
    """Post a body to the application in this process."""
    transport = httpx.ASGITransport(ScoringApp(served))

    async def send(content: Any, headers: Mapping[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/invocations", content=content, headers=headers)

    def run(body: Any, headers: Mapping[str, str] = JSON) -> httpx.Response:
        content = json.dumps(body) if isinstance(body, dict | list) else body
        return asyncio.run(send(content, headers))

    return run


def test_every_form_of_a_table_has_the_same_answer(post: Post, weights: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"dataframe_records": [{"seed": 5, "index": 2}, {"seed": 5, "label": "cat"}]},
        {"instances": [{"seed": 5, "index": 2}, {"seed": 5, "label": "cat"}]},
        {"dataframe_split": {"columns": ["seed", "index", "label"], "data": [[5, 2, None], [5, None, "cat"]]}},
        {"inputs": {"seed": [5, 5], "index": [2, None], "label": [None, "cat"]}},
        {"dataframe_records": [{"index": 2}, {"label": "cat"}], "params": {"seed": 5}},
    ]
    answers = [post(form).json() for form in forms]
    assert all(answer == answers[0] for answer in answers)
    rows = answers[0]["predictions"]
    assert [(row["request"], row["index"]) for row in rows] == [(0, 2), (1, 0)]
    image = Image.open(io.BytesIO(base64.b64decode(rows[0]["png"], validate=True)))
    [expected] = sample(load_model(weights), [2], 5, SAMPLING)
    assert image.tobytes() == to_pil_image(expected).tobytes()


@pytest.mark.parametrize("header", [{"Host": "rebound.example"}, {"Origin": "http://localhost:9999"}])
def test_on_loopback_pages_of_browsers_are_refused(served: ServedModel, post: Post, header: dict[str, str]) -> None:
    body = {"dataframe_records": [{"seed": 1}]}
    answer = post(body, JSON | header)
    assert (answer.status_code, answer.json()["error_code"]) == (403, "INVALID_PARAMETER_VALUE")
    assert post(body).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"dataframe_records": []}, "prompt"),
        ({"dataframe_records": [{}]}, "prompt"),
        ({"dataframe_records": [{"seed": None}]}, "prompt"),
        ({"dataframe_records": [{"seed": 1}, {}]}, "row 1"),
        ({"dataframe_records": [{"prompts": "a cat", "stepz": 3}]}, "prompts, stepz"),
        ({"dataframe_records": [{"seed": 1, "stepz": 3}]}, "stepz"),
        ({"dataframe_records": [{"seed": 1}], "params": {"stepz": 3}}, "stepz"),
        ({"dataframe_records": [{"seed": 1}], "parms": {"count": 3}}, "parms"),
        ({"dataframe_records": [{"seed": 1}], "instances": [{"seed": 1}]}, "one of"),
        ({"dataframe_records": [{"task": ["sample"]}]}, "task"),
        ({"dataframe_records": [{"sampler": "x" * 1000}]}, "sampler"),
        ({"dataframe_records": [{"prompt": "x" * 10_001}]}, "prompt"),
        ({"dataframe_records": [{"prompt": ["x"] * 1025}]}, "prompt"),
        ({"dataframe_records": [{"task": "img2img", "image": "x"}]}, "image"),
        ({"dataframe_records": [{"count": 10**30}]}, "images"),
        ({"dataframe_records": [{"seed": 1}] * (MAX_TABLE_IMAGES + 1)}, "dataframe_records"),
        ({"dataframe_records": "all"}, "dataframe_records"),
        ({"dataframe_split": {"columns": ["seed"], "data": [[1, 2]]}}, "table"),
        ({"inputs": {"seed": [1], "index": [1, 2]}}, "table"),
        ({"count": 1}, "count"),
        ([], "table"),
        ("", "JSON"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        (b'{"dataframe_records": [{"seed": 1}]}\xff', "JSON"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(post: Post, body: Any, named: str) -> None:
    response = post(body)
    assert response.status_code == 400
    assert named in response.json()["message"]
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b'{"dataframe_records": [' + b",".join([b"{}"] * 500_000) + b"]}",
        b'{"dataframe_records": [' + b"{},\n" * 70_000 + b"{}]}",
        b'{"dataframe_records": [{"prompt": "' + b"a" * 2**25 + b'"}]}',
    ],
    ids=["rows", "lines", "prompt"],
)
def test_large_bodies_are_refused_unparsed(post: Post, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object) -> None:
        pytest.fail("it was parsed")

    async def drip() -> AsyncIterator[bytes]:  # without Content-Length
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    monkeypatch.setattr("flows.registry.serving.ScoringRequest.model_validate_json", parse)
    assert post(body).status_code == post(drip()).status_code == 413


def test_only_json_is_read(post: Post) -> None:
    for kind in ("text/csv", "application/vnd.apache.parquet", ""):
        assert post("seed\n1\n", {"Content-Type": kind}).status_code == 415
    assert post('{"inputs": {"seed": [1]}}', {"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_a_slow_request_is_dropped(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.registry.serving.TRANSFER_SECONDS", 0.2)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    assert post(drip()).status_code == 408


async def drip_spaces() -> AsyncIterator[bytes]:
    while True:
        yield b" " * 100
        await asyncio.sleep(0.01)


def send_beside(app: ScoringApp, slow: int, beside: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> int:
    """Status of a request that is sent while ``slow`` others send their bodies without end."""

    async def run() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            senders = [
                asyncio.create_task(client.post("/invocations", content=drip_spaces(), headers=JSON))
                for _ in range(slow)
            ]
            await asyncio.sleep(0.2)
            try:
                return (await beside(client)).status_code
            finally:
                for sender in senders:
                    sender.cancel()

    return asyncio.run(run())


def test_bodies_that_do_not_arrive_take_no_place(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_WAITING_REQUESTS", "1")
    model = ServedModel()
    model.use(load_model(weights), SAMPLING)
    row = {"dataframe_records": [{"seed": 1}]}
    assert send_beside(ScoringApp(model), 5, lambda client: client.post("/invocations", json=row)) == 200


def test_bodies_that_arrive_at_once_have_a_limit_of_bytes(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_WAITING_REQUESTS", "1")
    monkeypatch.setenv("DARKROOM_MAX_REQUEST_BYTES", "1024")
    model = ServedModel()
    model.use(load_model(weights), SAMPLING)

    async def body(seconds: float) -> AsyncIterator[bytes]:
        yield b" " * 900
        await asyncio.sleep(seconds)  # that each is answered before the next one may wait for its turn

    async def run() -> list[int]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(ScoringApp(model)), base_url="http://localhost"
        ) as client:
            posts = [client.post("/invocations", content=body(0.5 + number), headers=JSON) for number in range(3)]
            return sorted(answer.status_code for answer in await asyncio.gather(*posts))

    assert asyncio.run(run()) == [400, 400, 429]


def test_an_ending_server_answers_during_a_decode(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    app, begun = ScoringApp(served), threading.Event()

    def decode(*_: object) -> NoReturn:
        begun.set()
        time.sleep(5)
        raise AssertionError

    monkeypatch.setattr(served, "answer", decode)

    async def beside(client: httpx.AsyncClient) -> httpx.Response:
        answer = asyncio.create_task(client.post("/invocations", json={"dataframe_records": [{"seed": 1}]}))
        await asyncio.to_thread(begun.wait)
        app.ending.set()
        async with asyncio.timeout(3):
            return await answer

    assert send_beside(app, 0, beside) == 503


@contextmanager
def serving(weights: Path, **variables: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server process for a model file, and its address."""
    [port] = choose_ports(1)
    program = "from flows.cli import main; main()"
    command = [sys.executable, "-c", program, "model", "serve", "--model", str(weights), "--port", str(port)]
    process = psutil.Popen(command, cwd=weights.parent, env=os.environ | variables, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_served(f"{url}/ping", process)
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def begin(url: str, row: dict[str, Any]) -> socket.socket:
    """Send a request and leave it open."""
    body = json.dumps({"dataframe_records": [row]}).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    lines = (
        "POST /invocations HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def ask(url: str, row: dict[str, Any], timeout: float = 60) -> httpx.Response:
    return httpx.post(f"{url}/invocations", json={"dataframe_records": [row]}, timeout=timeout)


@pytest.mark.slow
def test_a_short_request_cannot_capture_the_server(weights: Path) -> None:
    with serving(weights) as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/version").text.count(".") == 2
        assert httpx.get(f"{url}/").status_code == 404
        begun = time.monotonic()
        response = ask(url, {"count": 4096, "steps": 10_000})
        assert (response.status_code, "DARKROOM_MAX_REQUEST_MEGAPIXELS" in response.text) == (400, True)
        with begin(url, LONG):
            time.sleep(2)
            assert process.cpu_percent(1) > 10
        # The client left, so that the next one need not wait.
        assert ask(url, {"seed": 1}).status_code == 200
        assert time.monotonic() < begun + 30
        with begin(url, LONG) as connection:
            time.sleep(2)
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            assert time.monotonic() < begun + 3
            assert connection.recv(12) == b"HTTP/1.1 503"


@pytest.mark.slow
def test_a_deadline_and_a_full_queue_are_told_apart(weights: Path) -> None:
    with serving(weights, DARKROOM_MAX_REQUEST_SECONDS="4", DARKROOM_MAX_WAITING_REQUESTS="1") as (_, url):
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(ask(url, LONG).status_code)) for _ in range(3)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        assert httpx.get(f"{url}/ping").status_code == 200
        for thread in threads:
            thread.join()
        assert time.monotonic() < begun + 15
        assert sorted(statuses) == [429, 504, 504]
        assert ask(url, {"seed": 1}).status_code == 200


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed(weights: Path) -> None:
    with (
        serving(weights) as (_, url),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as connection,
    ):
        assert connection.recv(1) == b""


@pytest.mark.slow
def test_large_bodies_take_no_memory(weights: Path) -> None:
    with serving(weights) as (process, url):
        assert ask(url, {"seed": 1}).status_code == 200
        before, peaks, ended = process.memory_info().rss, [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                peaks.append(process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for body in (
            b'{"dataframe_records": [{"prompt": "' + b"a" * 120_000_000 + b'"}]}',
            b'{"dataframe_records": [' + b",".join([b"{}"] * 500_000) + b"]}",
        ):
            try:
                status = httpx.post(f"{url}/invocations", content=body, headers=JSON, timeout=60).status_code
            except httpx.TransportError:  # it may close the connection before all is sent
                status = 413
            assert status == 413
        ended.set()
        watcher.join()
        assert max(peaks) < before + 40e6
        assert ask(url, {"seed": 1}).status_code == 200
