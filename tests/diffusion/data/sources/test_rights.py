"""Wishes of rights holders: what they say in every way there is, and that nothing else is taken for one."""

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.robotparser import RobotFileParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from diffusion.data.manifest import read_manifest
from diffusion.data.sources.rights import PathRules, is_excluded, matches
from tests.builders.http_server import QuietHandler, serving
from tests.builders.ingested import records
from tests.builders.reading_sources import png
from tests.builders.url_tables import table

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:plus="http://ns.useplus.org/ldf/xmp/1.0/" '
    'plus:DataMining="http://ns.useplus.org/ldf/vocab/{}"/></rdf:RDF></x:xmpmeta>'
)


class Host:
    """A host of images 0.png, 1.png, … with files and headers to order."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, str]] = {}
        self.headers: dict[str, list[tuple[str, str]]] = {}
        self.redirects: dict[str, str] = {}
        self.asked: list[str] = []
        self.agents: set[str | None] = set()
        self.url = ""


def serve(host: Host) -> type[QuietHandler]:
    lock = threading.Lock()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            with lock:
                host.asked.append(self.path)
                host.agents.add(self.headers["User-Agent"])
            path = self.path.partition("?")[0]
            status, body = 404, b""
            if path in host.files:
                status, text = host.files[path]
                body = text.encode()
            elif path in host.redirects:
                status = 302
            elif path.endswith(".png"):
                status, body = 200, png(int(Path(path).stem))
            self.send_response(status)
            for name, value in host.headers.get(path, []):
                self.send_header(name, value)
            if status == 302:
                self.send_header("Location", host.redirects[path])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    with serving(serve(host)) as host.url:
        yield host


def run(tmp_path: Path, source: str, **fields: Any) -> IngestResult:
    settings = {
        "source": source,
        "size": 8,
        "enlarge": True,
        "download_tries": 2,
        "max_quarantined": 1,
        "held_out": 0.5,
    }
    config = IngestConfig.model_validate(settings | {"allow_private_addresses": True, "max_seconds": 60} | fields)
    return ingest(tmp_path / "data" / "faces", config)


def run_urls(tmp_path: Path, host: Host, *paths: str, **fields: Any) -> dict[str, str]:
    """Reasons of the images that are not kept, by path."""
    source = table(tmp_path / "t.jsonl", [{"url": f"{host.url}{path}"} for path in paths])
    run(tmp_path, f"urls:{source}", **fields)
    rows = records(tmp_path / "data" / "faces")
    return {row["source"].removeprefix(host.url): row["reason"] for row in rows if row["outcome"] != "kept"}


IMAGES = tuple(f"/a/{number}.png" for number in range(6))


def test_robots_txt_is_read_once_and_respected(tmp_path: Path, host: Host) -> None:
    host.files["/robots.txt"] = 200, "User-agent: *\nDisallow: /a/1\nDisallow: /*3.png$\nAllow: /a/1.png?v=2\n"
    reasons = run_urls(tmp_path, host, *IMAGES, "/b/13.png", "/a/1.png?v=2")
    assert reasons == dict.fromkeys(["/a/1.png", "/a/3.png", "/b/13.png"], "reserved by robots.txt")
    assert host.asked.count("/robots.txt") == 1
    assert "/a/3.png" not in host.asked
    assert all(agent and "darkroom" in agent.lower() for agent in host.agents)
    assert read_manifest(tmp_path / "data" / "faces").reserved == {"robots.txt": 3}


def test_a_group_for_this_program_replaces_the_one_for_all(tmp_path: Path, host: Host) -> None:
    host.files["/robots.txt"] = 200, "User-agent: *\nDisallow: /\n\nUser-agent: x\nUser-agent: Darkroom\nDisallow: /a/2"
    assert run_urls(tmp_path, host, *IMAGES) == {"/a/2.png": "reserved by robots.txt"}


@pytest.mark.parametrize(("status", "reserved"), [(404, False), (403, False), (503, True)])
def test_a_robots_txt_that_fails_disallows_everything(tmp_path: Path, host: Host, status: int, reserved: bool) -> None:
    host.files["/robots.txt"] = status, "User-agent: *\nDisallow: /"
    if reserved:
        with pytest.raises(UserError, match="HTTP 503"):
            run_urls(tmp_path, host, *IMAGES)
        assert host.asked == 2 * ["/robots.txt"]
    else:
        assert run_urls(tmp_path, host, *IMAGES) == {}


def test_a_redirect_does_not_lead_around_robots_txt(tmp_path: Path, host: Host) -> None:
    other = Host()
    other.files["/robots.txt"] = 200, "User-agent: *\nDisallow: /"
    with serving(serve(other)) as other.url:
        host.redirects["/a/1.png"] = f"{other.url}/7.png"
        assert run_urls(tmp_path, host, *IMAGES) == {"/a/1.png": "reserved by robots.txt"}
    assert other.asked == ["/robots.txt"]


def test_headers_reserve_an_image(tmp_path: Path, host: Host) -> None:
    host.headers["/a/1.png"] = [("X-Robots-Tag", "noarchive"), ("X-Robots-Tag", "NoAI, noimageai")]
    host.headers["/a/2.png"] = [("tdm-reservation", "1")]
    host.headers["/a/3.png"] = [("X-Robots-Tag", "noarchive, max-image-preview: none"), ("tdm-reservation", "0")]
    reasons = run_urls(tmp_path, host, *IMAGES)
    assert reasons == {"/a/1.png": "reserved by X-Robots-Tag", "/a/2.png": "reserved by a TDM reservation"}


def test_a_hosts_tdm_rules_apply_unless_the_header_says_otherwise(tmp_path: Path, host: Host) -> None:
    rules = [{"location": "/a/", "tdm-reservation": 1}, {"location": "/a/2*", "tdm-reservation": 0}, "damaged", {}]
    host.files["/.well-known/tdmrep.json"] = 200, json.dumps(rules)
    host.headers["/a/3.png"] = [("tdm-reservation", "0")]
    reasons = run_urls(tmp_path, host, *IMAGES, "/b/9.png")
    assert set(reasons) == {"/a/0.png", "/a/1.png", "/a/4.png", "/a/5.png"}
    assert set(reasons.values()) == {"reserved by a TDM reservation"}
    assert host.asked.count("/.well-known/tdmrep.json") == 1


@pytest.mark.parametrize("text", ["<html>", "[" * 100_000, '{"location": 1}', '["a"]', "[{}]", "\0" * 10**6])
def test_another_page_is_no_tdm_rule(tmp_path: Path, host: Host, text: str) -> None:
    host.files["/.well-known/tdmrep.json"] = host.files["/robots.txt"] = 200, text
    assert run_urls(tmp_path, host, *IMAGES) == {}


def test_wishes_are_ignored_on_request_and_that_is_recorded(tmp_path: Path, host: Host) -> None:
    host.files["/robots.txt"] = 200, "User-agent: *\nDisallow: /a/1"
    assert set(run_urls(tmp_path, host, *IMAGES)) == {"/a/1.png"}
    assert read_manifest(tmp_path / "data" / "faces").opt_outs is None
    source = table(tmp_path / "u.jsonl", [{"url": f"{host.url}/a/{number}.png"} for number in (11, 12)])
    assert run(tmp_path, f"urls:{source}", opt_outs="ignore").added == 2
    assert read_manifest(tmp_path / "data" / "faces").opt_outs == "ignore"


def photograph(form: str, value: str) -> bytes:
    data, packet = io.BytesIO(), XMP.format(value).encode()
    image = Image.linear_gradient("L").rotate(len(value) + len(form)).convert("RGB")
    if form == "TIFF":
        image.save(data, form, tiffinfo={700: packet})
    elif form == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        image.save(data, form, pnginfo=info)
    else:
        image.save(data, form, xmp=packet)
    return data.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_iptc_data_mining_in_a_file_reserves_it(tmp_path: Path, form: str) -> None:
    (tmp_path / "images").mkdir()
    values = ("DMI-PROHIBITED-AIMLTRAINING", "DMI-PROHIBITED", "DMI-ALLOWED", "DMI-UNSPECIFIED")
    for value in values:
        (tmp_path / "images" / f"{value}.{form.lower()}").write_bytes(photograph(form, value))
    result = run(tmp_path, str(tmp_path / "images"))
    assert {Path(each.source).stem: each.reason for each in result.quarantined} == dict.fromkeys(
        values[:2], "reserved by IPTC Data Mining in the file"
    )
    assert result.kept == 2


def test_images_on_a_list_are_left_out_unread(tmp_path: Path, host: Host) -> None:
    from hashlib import sha256

    listed = tmp_path / "left-out.txt"
    digest = sha256(png(4)).hexdigest().upper()
    listed.write_text(f"{host.url}/a/0.png\n# asked for by mail\n*/b/*\n{digest}\n", encoding="utf-8-sig")
    reasons = run_urls(tmp_path, host, *IMAGES, "/b/9.png", leave_out=str(listed))
    assert reasons == dict.fromkeys(["/a/0.png", "/b/9.png", "/a/4.png"], "reserved by the list ingest.leave_out")
    assert not {"/a/0.png", "/b/9.png"} & set(host.asked)


@pytest.mark.parametrize("data", [None, b"\xff\xfe\0", b"x" * 2**27])
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    if data is not None:
        (tmp_path / "list").write_bytes(data)
    with pytest.raises(UserError, match=r"ingest\.leave_out"):
        run(tmp_path, str(tmp_path / "images"), leave_out=str(tmp_path / "list"))


@pytest.mark.parametrize(
    ("values", "excluded"),
    [
        (["noindex"], True),
        (["googlebot: noai"], False),
        (["googlebot: noai, nofollow", "darkroom: NOML"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noimageindex"], True),
        (["all, nosnippet, noarchive"], False),
        (["max-snippet: -1"], False),
        ([":,:,,", ""], False),
    ],
)
def test_directives_of_x_robots_tag(values: list[str], excluded: bool) -> None:
    assert is_excluded(values) is excluded


def by_regular_expression(pattern: str, path: str) -> bool:
    """Oracle: what the pattern means, of a length at which backtracking does not matter."""
    import re

    body = ".*".join(map(re.escape, pattern.removesuffix("$").split("*")))
    return re.match(body + ("$" if pattern.endswith("$") else ""), path, re.DOTALL) is not None


@given(st.text("/ab*", max_size=9), st.booleans(), st.text("/ab", max_size=12))
def test_patterns_match_as_their_regular_expression(pattern: str, anchored: bool, path: str) -> None:
    pattern += "$" * anchored
    assert matches(pattern, path) is by_regular_expression(pattern, path)


@given(st.lists(st.sampled_from(["/a", "/b", "/a/b", "/"]), unique=True, max_size=3), st.sampled_from(["/a", "/c/a"]))
def test_plain_rules_agree_with_the_standard_library(disallowed: list[str], path: str) -> None:
    lines = ["User-agent: *", *(f"Disallow: {each}" for each in disallowed)]
    parser = RobotFileParser()
    parser.parse(lines)
    assert PathRules.of_robots("\n".join(lines)).allows(path) is parser.can_fetch("darkroom", path)


def test_hostile_patterns_take_linear_time() -> None:
    pattern, path = "/*" + "a*" * 2000 + "b$", "/" + "a" * 4000
    start = time.process_time()
    assert not matches(pattern, path)
    short = time.process_time() - start
    start = time.process_time()
    assert not matches("/*" + "a*" * 20_000 + "b$", "/" + "a" * 40_000)
    assert time.process_time() - start < 40 * short + 0.5
