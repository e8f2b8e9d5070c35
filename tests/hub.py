"""A Hugging Face Hub in a thread of the test: the endpoints that ``huggingface_hub`` asks, which misbehave to order."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a-token-that-must-not-be-seen-anywhere"
LARGE = re.compile(r".*\.(safetensors|parquet|tar|png|jpg|bin|ckpt)")
PAGE = 7
"""Entries of a page of a tree, so that listings take several."""


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: its commits in order, and its names for them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], message: str = "Update", ref: str = "main") -> str:
        """Replace all files; returns the commit."""
        entries = sorted((path, blob_id(data)) for path, data in files.items())
        sha = hashlib.sha1(repr((len(self.commits), message, entries)).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        self.messages.append(message)
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """What the server has, what it was asked, and how it misbehaves."""

    address: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by SHA-256."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers."""
    drop_after: int | None = None
    """Bytes of a file after which the connection breaks."""
    statuses: list[int] = field(default_factory=list)
    """Answers to the next requests, instead of what was asked for."""
    retry_after: str = ""
    added_size: int = 0
    """Bytes by which listings lie."""
    other_bytes: bool = False
    other_commit: bool = False
    endless: bool = False
    elsewhere: str | None = None
    """Address of another host that files are redirected to."""
    pages_at: str | None = None
    """Address of another host that pages of a listing go on at."""
    empty_pages: bool = False
    """Whether a listing goes on for ever, with nothing in it."""
    drip: float = 0.0
    """Seconds between bytes of the headers of answers, which have no end."""
    drop_commits: int = 0
    """Commits that are made, but whose answer is lost."""
    drop_uploads: int = 0
    pause: float = 0.0
    piece: int = 2**18
    """Seconds between pieces of a file, and their bytes."""

    def dataset(self, name: str, files: dict[str, bytes], **fields: Any) -> Repo:
        return self._new("dataset", name, files, fields)

    def model(self, name: str, files: dict[str, bytes], **fields: Any) -> Repo:
        return self._new("model", name, files, fields)

    def _new(self, kind: str, name: str, files: dict[str, bytes], fields: dict[str, Any]) -> Repo:
        repo = self.repos[kind, name] = Repo(**fields)
        repo.commit(files, "initial commit")
        return repo

    def paths(self, pattern: str, method: str = "GET") -> list[str]:
        """Paths that were asked for."""
        return [path for verb, path, _ in self.requests if verb == method and re.search(pattern, path)]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Inside, a Hub answers at its ``address``."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        self.path = unquote(urlsplit(self.path).path) + (f"?{query}" if (query := urlsplit(self.path).query) else "")
        self.hub.requests.append(
            (self.command, self.path, {name.title(): value for name, value in self.headers.items()})
        )
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.hub.drip:
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000:
                self.wfile.write(bytes([byte]))
                time.sleep(self.hub.drip)
        if self.hub.statuses:
            wait = {"Retry-After": self.hub.retry_after} if self.hub.retry_after else {}
            self._send(self.hub.statuses.pop(0), b"busy", wait)
            return
        for pattern, answer in ROUTES:
            method, _, rest = pattern.partition(" ")
            if method in (self.command, "*") and (match := re.fullmatch(rest, path)):
                answer(self, **match.groupdict())
                return
        self._send(404, b"no such endpoint")

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def handle(self) -> None:
        with suppress(ConnectionError):  # the other side has seen enough
            super().handle()

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, kind: str, name: str, rev: str = "main", writes: bool = False) -> tuple[Repo, str] | None:
        """The repository and the commit; None: an error was sent."""
        repo = self.hub.repos.get((kind.rstrip("s") or "model", name))
        if repo is None or ((repo.private or writes) and not self._allowed):
            self._refuse(404 if self._allowed else 401, "RepoNotFound")
        elif repo.gated and not self._allowed:
            self._refuse(401, "GatedRepo")
        elif (sha := repo.refs.get(rev, rev)) not in repo.commits and not writes:
            self._refuse(404, "RevisionNotFound")
        else:
            return repo, sha
        return None

    def info(self, kind: str, name: str, rev: str | None = None) -> None:
        if repository := self._repo(kind, name, rev or "main"):
            repo, sha = repository
            if self.hub.other_commit:
                sha = "f" * 40
            about = {"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "tags": [], "siblings": []}
            self._json(about)

    def refs(self, kind: str, name: str) -> None:
        if repo := self._repo(kind, name):
            refs = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in repo[0].refs.items()]
            self._json({"branches": refs, "tags": [], "converts": []})

    def tree(self, kind: str, name: str, rev: str, under: str = "") -> None:
        if not (repo := self._repo(kind, name, rev)):
            return
        if under and not any(path.startswith(f"{under}/") for path in repo[0].commits[repo[1]]):
            self._refuse(404, "EntryNotFound")
            return
        entries: list[dict[str, Any]] = []
        for path, data in repo[0].commits[repo[1]].items():
            size = len(data) + self.hub.added_size
            entry = {"type": "file", "path": path, "oid": blob_id(data), "size": size}
            if LARGE.fullmatch(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            entries.append(entry)
        folders = sorted({path.rpartition("/")[0] for path in repo[0].commits[repo[1]] if "/" in path})
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        more = (
            f"{self.hub.pages_at or self.hub.address}{self.path.partition('?')[0]}?recursive=True&cursor={start + PAGE}"
        )
        links = {"Link": f'<{more}>; rel="next"'} if start + PAGE < len(entries) or self.hub.empty_pages else {}
        self._json(entries[start : start + PAGE], links)

    def resolve(self, name: str, rev: str, path: str, kind: str | None = None) -> None:
        if not (repo := self._repo(kind or "model", name, rev)):
            return
        data = repo[0].commits[repo[1]].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        if self.hub.elsewhere:
            self._send(302, b"", {"Location": f"{self.hub.elsewhere}/elsewhere/{repo[1]}/{path}"})
            return
        self._file(data, repo[1])

    def from_elsewhere(self, rev: str, path: str) -> None:
        self._file(next(repo.commits[rev][path] for repo in self.hub.repos.values() if rev in repo.commits), rev)

    def _file(self, data: bytes, sha: str) -> None:
        if self.hub.other_bytes:
            data = bytes(byte ^ 1 for byte in data)
        start, status, more = 0, 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            more["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.hub.endless:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            self.wfile.write(data + b"more" * 1000)
            return
        body = data[start:]
        if self.hub.drop_after is not None and len(body) > self.hub.drop_after:
            self._send(status, body[: self.hub.drop_after], more | {"Content-Length": str(len(body))})
            self.wfile.flush()
            self.close_connection = True
            return
        if self.hub.pause:
            self._send(status, b"", more | {"Content-Length": str(len(body))})
            for begin in range(0, len(body), self.hub.piece):
                time.sleep(self.hub.pause)
                self.wfile.write(body[begin : begin + self.hub.piece])
            return
        self._send(status, body, more)

    def authored(self) -> None:
        self._json([])

    def valid(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        about = json.loads(self.body)
        name = f"{about['organization']}/{about['name']}"
        if not self._allowed:
            self._refuse(401, "Unauthorized")
            return
        kind = about.get("type", "model")
        if (kind, name) in self.hub.repos:
            about = {"error": f"You already created this {kind} repo", "url": f"{self.hub.address}/{name}"}
            self._send(409, json.dumps(about).encode())
            return
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub._new(kind, name, files, {"private": about["visibility"] == "private"})
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def preupload(self, kind: str, name: str, rev: str) -> None:
        if repo := self._repo(kind, name, rev, writes=True):
            there = repo[0].files
            self._json(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if LARGE.fullmatch(each["path"]) else "regular",
                            "shouldIgnore": False,
                            "oid": _oid(each["path"], there[each["path"]]) if each["path"] in there else None,
                        }
                        for each in json.loads(self.body)["files"]
                    ]
                }
            )

    def batch(self, name: str) -> None:
        objects = []
        for each in json.loads(self.body)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.stored:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if self.hub.drop_uploads:
            self.hub.drop_uploads -= 1
            self.close_connection = True
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.stored[oid] = self.body
        self._send(200)

    def make_commit(self, kind: str, name: str, rev: str) -> None:
        if not (repo := self._repo(kind, name, rev, writes=True)):
            return
        files, message = dict(repo[0].files), ""
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repo[0].refs[rev]) != repo[0].refs[rev]:
                    self._send(412, b"{}")
                    return
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo[0].commit(files, message, rev)
        if self.hub.drop_commits:
            self.hub.drop_commits -= 1
            self.close_connection = True
            return
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha})


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if LARGE.fullmatch(path) else blob_id(data)


NAMED = "(?P<name>[^/]+/[^/]+)"
OF = f"/api/(?P<kind>datasets|models)/{NAMED}"
ROUTES = (
    ("POST /api/validate-yaml", _Handler.valid),
    ("POST /api/repos/create", _Handler.create),
    ("GET /api/(datasets|models)", _Handler.authored),
    (f"GET {OF}", _Handler.info),
    (f"GET {OF}/revision/(?P<rev>.+)", _Handler.info),
    (f"GET {OF}/refs", _Handler.refs),
    (f"GET {OF}/tree/(?P<rev>[0-9a-f]{{40}})/(?P<under>.+)", _Handler.tree),
    (f"GET {OF}/tree/(?P<rev>.+)", _Handler.tree),
    (f"POST {OF}/preupload/(?P<rev>.+)", _Handler.preupload),
    (f"POST {OF}/commit/(?P<rev>.+)", _Handler.make_commit),
    (f"POST /(?:datasets/)?{NAMED}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("* /elsewhere/(?P<rev>[0-9a-f]{40})/(?P<path>.+)", _Handler.from_elsewhere),
    (f"* /(?P<kind>datasets)/{NAMED}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (f"* /{NAMED}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
