"""Repositories of the Hugging Face Hub: names, commits, listings, and downloads that are verified.

The Hub is the one of ``HF_ENDPOINT``; the token comes from ``HF_TOKEN`` alone and goes nowhere else. Nothing that a
repository holds is executed or unpickled here.
"""

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from tenacity import RetryCallState, Retrying, stop_after_attempt

from diffusion.common.config import MAX_NAME_LENGTH
from diffusion.common.errors import DarkroomError, TransientError, UserError, install_hint
from diffusion.common.files import sync_file, sync_folder
from diffusion.common.http_client import (
    HttpClient,
    HttpError,
    OversizedError,
    RetryableError,
    retry_delay,
    shorten_message,
)
from diffusion.common.parsing import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]
Result = TypeVar("Result")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([^?#\s]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
MAX_CARD = 2**20
"""Maximum bytes of a README.md that is read."""
MAX_FRONT_MATTER = 2**16
"""Maximum characters of the front matter of a README.md."""
MAX_FILES = 10**6
"""Maximum number of files of a repository."""
MAX_LISTING_SECONDS = 900.0
"""Deadline of the listing of all files, which takes a request for each thousand."""
TRIES = 5
"""Attempts without progress, ``MIN_RATE``, before a download, or a request, fails."""
SECONDS = 30.0
"""Deadline of an exchange, but for its body, which comes at ``MIN_RATE``."""
MIN_RATE = 1000.0
"""Least bytes per second of a body, and of a download over all its attempts."""
RESERVE = 2**28
"""Bytes that a download leaves free on the disk."""
NO_LICENCE = ("unknown", "other", "")
"""Values of ``license`` in a card that name none."""


class HubFile(NamedTuple):
    """A file of a repository at a commit."""

    path: str
    size: int
    digest: str
    """SHA-256 of a large file (64 hex digits), or else Git's SHA-1 of the blob (40)."""

    def is_whole(self, data: IO[bytes]) -> bool:
        """Return whether ``data`` has exactly these bytes."""
        if data.seek(0, os.SEEK_END) != self.size:
            return False
        digest = hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        data.seek(0)
        while piece := data.read(2**20):
            digest.update(piece)
        return digest.hexdigest() == self.digest

    def is_at(self, path: Path) -> bool:
        """Return whether the file at ``path`` is this one."""
        if not path.is_file():
            return False
        with path.open("rb") as data:
            return self.is_whole(data)


def parse_hub_uri(uri: str, kind: Kind) -> tuple[str, str | None]:
    """Return OWNER/NAME and the revision, if any, of ``hf://[datasets/]OWNER/NAME[@REVISION]``; raises UserError."""
    start = "hf://datasets/" if kind == "dataset" else "hf://"
    match = REPOSITORY.fullmatch(uri.removeprefix(start)) if uri.startswith(start) else None
    if match is None or (kind == "model" and match[1].startswith(("datasets/", "spaces/"))):
        raise UserError(f"{uri} names no {_kind_name(kind)} of the Hugging Face Hub: write {start}OWNER/NAME@REVISION")
    return match[1], match[2]


def _kind_name(kind: Kind) -> str:
    return "data set" if kind == "dataset" else "model"


def read_front_matter(card: str) -> dict[str, Any]:
    """Parse the YAML at the beginning of the text of a card; empty if there is none, or it is damaged or too long."""
    first, *lines = card[:MAX_FRONT_MATTER].removeprefix("\ufeff").split("\n")
    ends = (number for number, line in enumerate(lines) if line.rstrip() == "---")
    if first.rstrip() != "---" or (end := next(ends, None)) is None:
        return {}
    try:
        front_matter = parse_yaml("\n".join([*lines[:end], ""]))
    except ValueError:
        return {}
    return front_matter if isinstance(front_matter, dict) else {}


def licence_of(front_matter: Mapping[str, Any]) -> str | None:
    """Return the licence in a card's front matter: an identifier of the Hub, or the name or link of another licence."""
    value = front_matter.get("license")
    names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    if names and names[0].lower() == "other":
        others = (front_matter.get("license_name"), front_matter.get("license_link"))
        names = [name for name in others if isinstance(name, str)][:1]
    names = [name.strip() for name in names if name.strip().lower() not in NO_LICENCE and name.isprintable()]
    return ", ".join(names)[:MAX_NAME_LENGTH] or None


def hub_api() -> "HfApi":
    """Return the Hub's client; raises UserError if it is not installed."""
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import disable_progress_bars

        from diffusion.common.hub_transport import endpoint, use_http_client
    except ModuleNotFoundError as error:
        raise UserError(
            f"the Hugging Face Hub needs {error.name}, which is not installed: {install_hint('hub')}"
        ) from error
    if constants.is_offline_mode():
        raise UserError("the Hub cannot be reached, as HF_HUB_OFFLINE is set: unset it")
    disable_progress_bars()
    use_http_client(hub_client(os.getpid()))
    # False: no token that a login left on this machine.
    token = os.environ.get("HF_TOKEN", "").strip() or False
    return HfApi(endpoint=endpoint(), token=token, library_name="darkroom")


@cache
def hub_client(process: int) -> HttpClient:
    """Return the client of the process with this id: a fork must not share connections."""
    # Downloads of all workers of an ingest, of which none should wait for a connection.
    return HttpClient(SECONDS, MIN_RATE, connections=256)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client about ``what`` into UserError or DarkroomError, but for RetryableError."""
    import httpx2
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    has_token = bool(os.environ.get("HF_TOKEN", "").strip())
    token = "HF_TOKEN has no access to it" if has_token else "set HF_TOKEN to a token that may read it"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{what} is not a name on the Hub ({error}): give OWNER/NAME") from error
    except GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its terms on the Hub, and {token}") from error
    except DisabledRepoError as error:
        raise UserError(f"{what} is disabled on the Hub: use another") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what} is not on the Hub, or private: check OWNER/NAME; if it is private, {token}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"the Hub refuses access to {what} (HTTP {status}): {token}") from error
        raise DarkroomError(f"the Hub answers HTTP {status} about {what}: check HF_ENDPOINT") from error
    except httpx2.InvalidURL as error:
        raise UserError(f"HF_ENDPOINT leads nowhere ({error}): give https://HOST, or unset it") from error
    except RetryableError:
        raise
    except (HttpError, httpx2.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = shorten_message(error)
        raise DarkroomError(f"the answer about {what} is not a Hub's ({reason}): check HF_ENDPOINT") from error


def retry(what: str, request: Callable[[], Result], received: Callable[[], int] = lambda: 0) -> Result:
    """Return the result of ``request``, repeated after transient failures: TRIES times at most without progress.

    ``received``: number of bytes so far; attempts that bring less than ``MIN_RATE`` make no progress.

    Raises UserError as ``hub_errors`` does, and TransientError if the Hub cannot be reached.
    """
    size, start = received(), time.monotonic()

    def is_transient(state: RetryCallState) -> bool:
        nonlocal size, start
        gained, seconds = received() - size, time.monotonic() - start
        size, start = size + gained, start + seconds
        if gained > MIN_RATE * seconds:
            state.attempt_number = 1
        return state.outcome is not None and isinstance(state.outcome.exception(), RetryableError)

    try:
        with hub_errors(what):
            return Retrying(retry=is_transient, stop=stop_after_attempt(TRIES), wait=retry_delay, reraise=True)(request)
    except RetryableError as error:
        raise TransientError(
            f"the Hub gave no whole answer about {what} ({error}), at each of {TRIES} tries: give the same command "
            "again later, which goes on from there"
        ) from error


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    kind: Kind
    name: str
    """OWNER/NAME."""
    commit: str
    """Git commit, 40 hex digits."""

    @classmethod
    def resolve(cls, kind: Kind, name: str, revision: str | None) -> "Repository":
        """Resolve a branch, tag or commit (None: ``main``); raises UserError naming what there is instead."""
        from huggingface_hub.errors import RevisionNotFoundError

        api, what = hub_api(), f"{_kind_name(kind)} {name}"

        def request() -> Any:
            with suppress(RevisionNotFoundError):
                return api.repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)

        if (info := retry(what, request)) is None:
            refs = retry(what, lambda: api.list_repo_refs(name, repo_type=kind))
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            alternatives = ", ".join(names[:20]) or "none"
            raise UserError(f"{what} has no revision {revision}: there is {alternatives}")
        commit = str(info.sha or "")
        if not COMMIT.fullmatch(commit):
            raise DarkroomError(f"the Hub names no commit of {what}: check HF_ENDPOINT")
        if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
            raise DarkroomError(f"the Hub has {commit} for commit {revision} of {what}: use another HF_ENDPOINT")
        return cls(kind, name, commit)

    @property
    def uri(self) -> str:
        """Pinned URI: ``hf://[datasets/]OWNER/NAME@COMMIT``."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.name}@{self.commit}"

    @cached_property
    def files(self) -> dict[str, HubFile]:
        """All files by path, sorted; raises DarkroomError for paths that lead out of the repository."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        api = hub_api()
        headers = build_hf_headers(token=api.token, library_name="darkroom")

        def request() -> list[HubFile]:
            url: str | None = f"{api.endpoint}/api/{self.kind}s/{self.name}/tree/{self.commit}?recursive=true"
            files, deadline = list[HubFile](), time.monotonic() + MAX_LISTING_SECONDS
            while url:
                if len(files) > MAX_FILES or time.monotonic() > deadline:
                    raise HttpError(f"a listing of more than {MAX_FILES} files or {MAX_LISTING_SECONDS:g} s")
                hf_raise_for_status(page := get_session().get(url, headers=headers))
                for entry in page.json():
                    if entry["type"] == "file":
                        large = entry.get("lfs")
                        size, digest = (large["size"], large["oid"]) if large else (entry["size"], entry["oid"])
                        files.append(HubFile(str(entry["path"]), int(size), str(digest)))
                url = page.links.get("next", {}).get("url")
            return files

        files = retry(self.uri, request)
        for file in files:
            parts = file.path.split("/")
            if file.path.startswith("/") or {"", ".", ".."} & set(parts) or "\\" in file.path or "\0" in file.path:
                raise DarkroomError(
                    f"{self.uri} lists {file.path!a}, which is not a path in it: use another repository"
                )
            if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest) or file.size < 0:
                raise DarkroomError(f"{self.uri} lists {file.path} without a digest and size: use another repository")
        return {file.path: file for file in sorted(files)}

    @cached_property
    def card(self) -> dict[str, Any]:
        """Front matter of the repository's README.md; empty if it has none."""
        file = self.files.get("README.md")
        if file is None or file.size > MAX_CARD:
            return {}
        return read_front_matter(self.read(file).decode("utf-8", "replace"))

    @property
    def licence(self) -> str | None:
        """Licence that the card names: see ``licence_of``."""
        return licence_of(self.card)

    def read(self, file: HubFile) -> bytes:
        """Return the bytes of a small file; raises as ``fetch`` does."""
        data = io.BytesIO()
        self.fetch(file, data)
        return data.getvalue()

    def download(self, file: HubFile, path: Path) -> Path:
        """Write ``file`` to ``path``, whole or not at all, unless it lies there already; returns ``path``.

        What a killed or failed download received is kept beside it and continued. The caller is the only writer. Raises
        UserError for a disk without room, and as ``fetch`` does.
        """
        if file.is_at(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{file.digest[:32]}.partial")
        partial.touch()
        if shutil.disk_usage(path.parent).free + partial.stat().st_size < file.size + RESERVE:
            raise UserError(
                f"{file.path} of {self.uri} has {file.size} bytes, for which {path.parent} has no room: make room there"
            )
        with partial.open("r+b") as data:
            self.fetch(file, data)
        sync_file(partial)
        partial.replace(path)
        sync_folder(path.parent)
        return path

    def fetch(self, file: HubFile, data: IO[bytes]) -> None:
        """Complete ``data``, which holds the beginning of ``file``.

        Raises UserError as ``hub_errors`` does; TransientError if the Hub cannot be reached, which leaves what came;
        DarkroomError if other bytes than the listing names came, which empties ``data``.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        from diffusion.common.hub_transport import raise_for_status

        client, api = hub_client(os.getpid()), hub_api()
        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=self.commit, endpoint=api.endpoint)
        headers = build_hf_headers(token=api.token, library_name="darkroom")
        source = f"{file.path} of {self.uri}"

        def received() -> int:
            return data.seek(0, os.SEEK_END)

        def request() -> None:
            range_header = {"Range": f"bytes={offset}-"} if (offset := received()) else {}
            with client.stream("GET", url, headers | range_header, max_bytes=file.size) as response:
                raise_for_status(response, url)
                if response.status != 206:
                    data.seek(0)
                    data.truncate()
                try:
                    for piece in response.pieces:
                        data.write(piece)
                except OversizedError:
                    return
            if data.tell() < file.size:
                raise RetryableError(f"{data.tell()} of {file.size} bytes")

        if received() < file.size:
            retry(source, request, received)
        if not file.is_whole(data):
            data.seek(0)
            data.truncate()
            raise DarkroomError(
                f"{source} came with other bytes than its listing names ({file.size}, {file.digest}): give the same "
                "command again, and if that does not help use another HF_ENDPOINT"
            )
