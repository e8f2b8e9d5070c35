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
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import yaml

from diffusion.common.config import LONGEST_NAME
from diffusion.common.errors import DarkroomError, TransientError, UserError
from diffusion.common.files import sync_file, sync_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]
Result = TypeVar("Result")
NAME = r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}"
COMMIT = re.compile("[0-9a-f]{40}")
LONGEST_CARD = 2**20
"""Maximum bytes of a README.md that is read."""
TRIES = 5
"""Attempts without a new byte before a download, or a request, fails."""
SECONDS = 30.0
"""Longest wait for the next bytes of an answer."""
LONGEST_PAUSE = 30.0
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


class _RetryableError(Exception):
    """A transient failure; ``after``: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def parse_hub_uri(uri: str, kind: Kind) -> tuple[str, str | None]:
    """Return OWNER/NAME and the revision, if any, of ``hf://[datasets/]OWNER/NAME[@REVISION]``; raises UserError."""
    start = "hf://datasets/" if kind == "dataset" else "hf://"
    match = re.fullmatch(f"{start}({NAME})(?:@([^?#\\s]+))?", uri)
    if match is None or (kind == "model" and match[1].startswith(("datasets/", "spaces/"))):
        raise UserError(f"{uri} names no {_kind_name(kind)} of the Hugging Face Hub: write {start}OWNER/NAME@REVISION")
    return match[1], match[2]


def _kind_name(kind: Kind) -> str:
    return "data set" if kind == "dataset" else "model"


def read_front_matter(card: str) -> dict[str, Any]:
    """Parse the YAML at the beginning of the text of a card; empty if there is none, or it is damaged."""
    match = re.match(r"\ufeff?---\s*?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        front_matter = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
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
    return ", ".join(names)[:LONGEST_NAME] or None


def hub_api() -> "HfApi":
    """Return the Hub's client; raises UserError if it is not installed."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, get_session
    except ModuleNotFoundError as error:
        raise UserError(
            f"the Hugging Face Hub needs {error.name}, which is not installed: run `pip install -e '.[hub]'` in "
            "Darkroom's checkout"
        ) from error
    disable_progress_bars()
    hooks = (session := get_session()).event_hooks
    if _limit_timeouts not in hooks["request"]:
        session.event_hooks = hooks | {"request": [*hooks["request"], _limit_timeouts]}
    # False: no token that a login left on this machine.
    token = os.environ.get("HF_TOKEN", "").strip() or False
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").strip() or None, token=token, library_name="darkroom")


def _limit_timeouts(request: Any) -> None:
    # The client waits without end for most answers.
    limits = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: SECONDS if limits.get(kind) is None else limits[kind] for kind in kinds}


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client about ``what`` into UserError, transient ones into ``_RetryableError``."""
    import httpx2
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    has_token = bool(os.environ.get("HF_TOKEN", "").strip())
    token = "HF_TOKEN has no access to it" if has_token else "set HF_TOKEN to a token that may read it"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{what} is no name on the Hub ({error}): give OWNER/NAME") from error
    except GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its terms on the Hub, and {token}") from error
    except DisabledRepoError as error:
        raise UserError(f"{what} is disabled on the Hub: use another") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what} is not on the Hub, or private: check OWNER/NAME; if it is private, {token}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{what} cannot be reached, as HF_HUB_OFFLINE is set: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"the Hub refuses access to {what} (HTTP {status}): {token}") from error
        if status not in (408, 425, 429) and status < 500:
            raise DarkroomError(f"the Hub answers HTTP {status} about {what}: check HF_ENDPOINT") from error
        pause = error.response.headers.get("Retry-After", "")
        raise _RetryableError(f"HTTP {status}", float(pause[:6]) if pause.isdecimal() else None) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise UserError(f"HF_ENDPOINT leads nowhere ({error}): give https://HOST, or unset it") from error
    except httpx2.TransportError as error:
        raise _RetryableError(str(error) or type(error).__name__) from error
    except (httpx2.TooManyRedirects, httpx2.DecodingError, JSONDecodeError, KeyError, TypeError) as error:
        raise DarkroomError(f"the answer about {what} is none of a Hub's: check HF_ENDPOINT") from error


def retry(what: str, request: Callable[[], Result], has_progressed: Callable[[], bool] = lambda: False) -> Result:
    """Return the result of ``request``, repeated after transient failures: TRIES times at most without progress.

    ``has_progressed``: whether the last, failed request brought anything.

    Raises UserError as ``hub_errors`` does, and TransientError if the Hub cannot be reached.
    """
    failures = 0
    while True:
        try:
            with hub_errors(what):
                return request()
        except _RetryableError as error:
            failures = 1 if has_progressed() else failures + 1
            if failures >= TRIES:
                raise TransientError(
                    f"the Hub gave no whole answer about {what} ({' '.join(str(error).split())[:200]}), at each of "
                    f"{TRIES} tries: give the same command again later, which goes on from there"
                ) from error
            time.sleep(min(error.after or 0.25 * 2**failures, LONGEST_PAUSE))


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
        from huggingface_hub.hf_api import RepoFile

        api = hub_api()

        def request() -> list[HubFile]:
            entries = api.list_repo_tree(self.name, recursive=True, revision=self.commit, repo_type=self.kind)
            return [
                HubFile(entry.path, entry.lfs.size, entry.lfs.sha256)
                if entry.lfs
                else HubFile(entry.path, entry.size, entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile)
            ]

        files = retry(self.uri, request)
        for file in files:
            parts = file.path.split("/")
            if file.path.startswith("/") or {"", ".", ".."} & set(parts) or "\\" in file.path or "\0" in file.path:
                raise DarkroomError(f"{self.uri} lists {file.path!a}, which is no path in it: use another repository")
            if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest) or file.size < 0:
                raise DarkroomError(f"{self.uri} lists {file.path} without a digest and size: use another repository")
        return {file.path: file for file in sorted(files)}

    @cached_property
    def card(self) -> dict[str, Any]:
        """Front matter of the repository's README.md; empty if it has none."""
        file = self.files.get("README.md")
        if file is None or file.size > LONGEST_CARD:
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
        DarkroomError if other bytes than those of the listing came, which empties ``data``.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        api = hub_api()
        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=self.commit, endpoint=api.endpoint)
        headers = build_hf_headers(token=api.token, library_name="darkroom") | {"Accept-Encoding": "identity"}
        source, offset = f"{file.path} of {self.uri}", 0

        def request() -> None:
            nonlocal offset
            offset = data.seek(0, os.SEEK_END)
            range_header = {"Range": f"bytes={offset}-"} if offset else {}
            with get_session().stream("GET", url, headers=headers | range_header, timeout=SECONDS) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    data.seek(0)
                    data.truncate()
                for piece in response.iter_raw():
                    data.write(piece)
                    if data.tell() > file.size:
                        return
            if data.tell() < file.size:
                raise _RetryableError(f"{data.tell()} of {file.size} bytes")

        if data.seek(0, os.SEEK_END) < file.size:
            retry(source, request, lambda: data.seek(0, os.SEEK_END) > offset)
        if not file.is_whole(data):
            data.seek(0)
            data.truncate()
            raise DarkroomError(
                f"{source} came with other bytes than those of its listing ({file.size}, {file.digest}): give the same "
                "command again, and if that does not help use another HF_ENDPOINT"
            )
