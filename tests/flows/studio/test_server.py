"""The studio's server: it answers its own pages and programs, and logs what it refuses in one line."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.process.samplers import sampling_config
from flows.environment import settings
from flows.local_stack import http_protocol
from flows.local_stack.server_process import choose_ports
from flows.registry.model_versions import Version
from tests.builders.command_line import darkroom_command, without_servers
from tests.builders.small_models import write_model
from tests.builders.studio_client import PASSWORD, USER, logged_in, trigger
from tests.builders.waiting import wait_until_served

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import build, launch
from flows.studio.generate import StudioSource
from flows.studio.votes import VOTES, load_version

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)
PUBLIC = "https://studio.example.org/darkroom"
FOREIGN: list[Mapping[str, str]] = [
    {"Origin": "http://127.0.0.1:9999", "Sec-Fetch-Site": "same-site"},
    {"Origin": "http://127.0.0.1:9999"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    {"Referer": "http://127.0.0.1:9999/page.html"},
    {"Host": "evil.example:7860"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StudioSource:
    weights = write_model(tmp_path_factory.mktemp("model") / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    return StudioSource.from_file(weights, SAMPLING)


@pytest.fixture(scope="module")
def address(source: StudioSource) -> Iterator[str]:
    page = build(source)
    yield launch(page, PASSWORD)
    page.close(verbose=False)


def test_a_connection_without_a_request_is_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0), timeout=60) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_every_route_is_closed_to_other_pages(address: str, headers: Mapping[str, str]) -> None:
    with logged_in(address) as client:
        requests = [
            *[("GET", path) for path in ("config", "logout", "gradio_api/info", "gradio_api/token", "nothing-here")],
            *[("GET", path) for path in ("gradio_api/queue/data?session_hash=x", "gradio_api/heartbeat/x")],
            *[("GET", path) for path in ("gradio_api/file=/etc/hosts", "theme.css", "favicon.ico")],
            *[("POST", path) for path in ("login", "gradio_api/upload", "gradio_api/queue/join", "gradio_api/cancel")],
            *[("POST", path) for path in ("gradio_api/run/sample", "gradio_api/component_server", "")],
            ("OPTIONS", "config"),
            ("OPTIONS", "gradio_api/queue/join"),
            ("DELETE", "config"),
        ]
        for method, path in requests:
            preflight = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
            response = client.request(method, path, headers={**headers, **preflight})
            assert response.status_code == 403, (method, path)
            assert not [name for name in response.headers if name.startswith("access-control-")]
        # Nothing has logged the person out.
        assert client.get("config").status_code == 200


HOSTILE = "\x1b[31mred\n\r\u202eTraceback (most recent call last):\n\x07"


@pytest.mark.slow
def test_a_refused_request_is_one_escaped_line_of_the_log(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    [port] = choose_ports(1)
    command = darkroom_command("ui", "--model", str(weights), "--no-browser", "--port", str(port))
    variables = without_servers(DARKROOM_UI_PASSWORD=PASSWORD, TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    file = {"path": HOSTILE, "meta": {"_type": "gradio.FileData"}}
    names = ("queue/join", "run/sample", "run/%1b%0a", "call/sample", "upload", "component_server", "cancel")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log)
        try:
            wait_until_served(f"http://127.0.0.1:{port}/", server)
            with logged_in(f"http://127.0.0.1:{port}/") as client:
                trees: list[Any] = [
                    HOSTILE,
                    [HOSTILE],
                    {"data": HOSTILE},
                    {"data": [HOSTILE] * 6},
                    {"data": [file] * 6},
                ]
                trees += [{"data": [], "fn_index": 10**9, "session_hash": HOSTILE}]
                for name in names:
                    for body in (b"{", b"\xff", *(json.dumps(tree).encode() for tree in trees)):
                        for kind in ("application/json", "multipart/form-data; boundary=x", "text/plain"):
                            client.post(f"gradio_api/{name}", content=body, headers={"Content-Type": kind})
                    with suppress(httpx.RemoteProtocolError):  # an answer that ends early
                        client.get(f"gradio_api/{name}/%1b%0a%07")
                client.post("gradio_api/upload", files={"files": (HOSTILE, b"x")})
                for each in client.get("config").json()["dependencies"]:
                    trigger(
                        client,
                        lambda event, each=each: event["id"] == each["id"],
                        {"dropdown": HOSTILE, "Class": HOSTILE},
                    )
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(f"GET / HTTP/1.1\r\nHost: {HOSTILE}\r\n\r\n".encode())
                    assert connection.recv(12) == b"HTTP/1.1 400"
                assert client.get("config", headers={"Host": "evil.example"}).status_code == 403
                assert client.get("config").status_code == 200
        finally:
            server.terminate()
            assert server.wait(30) == 0
    text = (tmp_path / "log").read_bytes().decode()
    assert re.search(r"a request failed: .*\\u001b\[31mred\\u000a", text)
    assert "a request was refused: this server is not at the host name" in text
    assert [line for line in text.split("\n") if line.startswith(("Traceback", "  ", "    ~"))] == []
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text) == []


def test_cookies_are_strict_and_answers_stay_with_the_page(address: str) -> None:
    own = {"Origin": address.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    with httpx.Client(base_url=address, headers=own) as client:
        login = client.post("login", data={"username": USER, "password": PASSWORD})
        assert login.status_code == 200
        cookies = [cookie.split("; ")[1:] for cookie in login.headers.get_list("set-cookie")]
        assert len(cookies) == 2
        for attributes in cookies:
            assert {"HttpOnly", "SameSite=Strict"} <= {*attributes}
            assert len([each for each in attributes if each.lower().startswith("samesite")]) == 1
        page = client.get("")
        assert page.headers["X-Frame-Options"] == "DENY"
        assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert page.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in page.headers if name.startswith("access-control-")]


def test_a_reverse_proxy_is_answered_at_its_address_only(source: StudioSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_UI_URL", PUBLIC)
    page = build(source)
    assert launch(page, PASSWORD, url=settings().ui_url) == PUBLIC
    with httpx.Client(base_url=f"http://127.0.0.1:{page.server_port}/") as client:
        login = {"username": USER, "password": PASSWORD}
        for host in ("studio.example.org", f"127.0.0.1:{page.server_port}"):
            headers = {"Host": host, "Origin": "https://studio.example.org"}
            assert client.post("login", data=login, headers=headers).status_code == 200
            assert client.get("config", headers=headers).json()["root"] == PUBLIC
        for headers in ({"Host": "www.example.org"}, {"Host": "studio.example.org", "Origin": "https://evil.example"}):
            assert client.post("login", data=login, headers=headers).status_code == 403
    page.close(verbose=False)


@pytest.mark.parametrize("url", ["studio.example.org", "ftp://studio.example.org", "https://user@h", "https://h/?a"])
def test_an_address_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_UI_URL", url)
    with pytest.raises(UserError):
        settings()


@pytest.fixture
def studio(versions: list[Version], bucket: str) -> Iterator[httpx.Client]:
    """A person who is logged in to the studio of a model named as the bucket, whose champion is version 2."""
    page = build(load_version(versions[1].uri, SAMPLING), versions[1])
    with logged_in(launch(page, PASSWORD)) as client:
        yield client
    page.close(verbose=False)


def event_of(title: str, config: Mapping[str, Any], kind: str = "click") -> Any:
    """Choose the event of a button or of a tab."""
    ids = {
        each["id"] for each in config["components"] if title in (each["props"].get(key) for key in ("value", "label"))
    }
    return lambda event: any(target[0] in ids and target[1] == kind for target in event["targets"])


def test_a_vote_is_cast_by_the_session_that_began_it(
    studio: httpx.Client, mlflow_client: MlflowClient, bucket: str
) -> None:
    config, session = studio.get("config").json(), uuid4().hex
    vote = event_of("No difference", config)
    assert "begin a vote" in trigger(studio, vote, {}, session)["error"]
    trigger(studio, event_of("Vote", config, "select"), {}, session)
    begin = {"Champion": 2, "Candidate": 1, "Images": 2, "Class": ""}
    assert "error" not in trigger(studio, event_of("Vote blind", config), begin, session)
    assert "begin a vote" in trigger(studio, vote, {}, uuid4().hex)["error"]
    assert VOTES not in mlflow_client.get_model_version(bucket, "1").tags
    for _ in range(2):
        assert "error" not in trigger(studio, vote, {}, session)
    assert "begin a vote" in trigger(studio, vote, {}, session)["error"]
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES].endswith("no difference 2")
