"""Captions by a command or an HTTP endpoint of the user's, called once per image; answers are cached on disk.

The cache, ``data/.NAME/captions.sqlite``, maps an image's key and the captioner's identity to a caption. An answer is
stored before the next image is sent, so a killed ingest sends again only images whose answers were due.
"""

import json
import os
import selectors
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from threading import Lock
from typing import Any

from diffusion.common.child_processes import child_environment
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.http_client import HttpClient, HttpError, OversizedError, RetryableError, shorten_message
from diffusion.common.progress import Progress
from diffusion.data.ingest.config import CaptionerConfig
from diffusion.data.ingest.index import LOCK_TIMEOUT, explain_database_errors
from diffusion.data.ingest.merge import Merge, write_part
from diffusion.data.manifest import CAPTIONER, read_records, work_folder
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import MAX_CHARACTERS, too_long_reason
from diffusion.data.sources.conventions import to_text

MAX_ANSWER = 2**17
"""Maximum bytes of an answer: more than the longest caption takes, escaped in JSON."""
MAX_UNANSWERED = 20
"""Images in a row without an answer, after which the captioner is taken for broken and called no more."""
REJECTED_STATUSES = (400, 413, 415, 422)
"""HTTP statuses that concern one image; all others than 200 concern the endpoint."""
POLL_SECONDS = 0.05
"""Interval between checks whether a command has ended."""
SCHEMA = """
    PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA secure_delete = ON;
    CREATE TABLE IF NOT EXISTS captions (key BLOB, captioner TEXT, caption TEXT, PRIMARY KEY (key, captioner))
        WITHOUT ROWID;
"""


class CaptionCounts(Config):
    """What a captioner answered during an ingest."""

    captioner: str
    """Version, with a digest of command or URL."""
    requests: int
    """Number of images that were sent to it, with or without success."""
    cached: int
    """Number of images whose captions were known from earlier answers."""
    failed: int
    """Number of images that should have a caption and got none; the next ingest sends them again."""
    reasons: dict[str, int]
    """The most frequent reasons for that."""


class NoCaptionError(Exception):
    """The captioner has no usable caption for one image; the message says why."""


class NoAnswerError(NoCaptionError):
    """The captioner did not answer, or is broken."""


def add_captions(merge: Merge, config: CaptionerConfig, progress: Progress) -> CaptionCounts:
    """Caption the kept images of ``merge.parts`` that lack a caption of this captioner; rewrites tables, no shards.

    Captions of the source stay unless ``config.replace``. Images without an answer keep what they have.

    Raises UserError if the captioner cannot be started or more than ``config.max_failed`` remain without an answer.
    """
    name, folder, parts = config.identity, merge.folder, merge.parts

    def is_due(row: dict[str, Any]) -> bool:
        captioner = row.get(CAPTIONER.name)
        if row["outcome"] != "kept" or captioner == name:
            return False
        return config.replace or captioner is not None or not row["caption"]

    due_counts = dict[int, int]()  # images by place of their part
    for place, part in enumerate(parts):
        if part.shard is not None and (part.captioners or {}).get(name) != part.outcomes.get("kept"):
            table = read_records(folder, part, ("outcome", "caption", CAPTIONER.name))
            due_counts[place] = sum(map(is_due, table.to_pylist()))
    total, done, cached_count, unanswered_count, reasons = sum(due_counts.values()), 0, 0, 0, Counter[str]()
    with ExitStack() as stack:
        cache = stack.enter_context(closing(Cache(folder)))
        captioner = stack.enter_context(closing(Captioner(config)))
        for place in (place for place, count in due_counts.items() if count):
            part = parts[place]
            assert part.shard is not None
            rows = read_records(folder, part).to_pylist()
            due_rows = {row["key"]: row for row in rows if is_due(row)}
            captions = {key: caption for key in due_rows if (caption := cache.get(key, name)) is not None}
            cached_count, done = cached_count + len(captions), done + len(captions)
            progress("images captioned", done, total)
            requests = [row for key, row in due_rows.items() if key not in captions]
            images = _images(folder / part.shard.name, requests if unanswered_count < MAX_UNANSWERED else ())
            with closing(_answers(captioner, cache, name, images)) as answers:
                for key, answer in answers:
                    done += 1
                    unanswered_count = unanswered_count + 1 if isinstance(answer, NoAnswerError) else 0
                    if isinstance(answer, NoCaptionError):
                        reasons[str(answer)] += 1
                    else:
                        captions[key] = answer
                    failed_count = reasons.total()
                    progress("images captioned", done, total, f"{failed_count:,} failed" if failed_count else "")
                    if unanswered_count == MAX_UNANSWERED:
                        break
            for key, caption in captions.items():
                due_rows[key] |= {"caption": caption, CAPTIONER.name: name}
                merge.index.recaption(due_rows[key])
            if captions:
                size, source = merge.config.size, part.source
                parts[place] = write_part(folder, part.number, part.shard, rows, size, source, part.shape)
    failed_count = total - (done - reasons.total())
    counts = CaptionCounts(
        captioner=name,
        requests=done - cached_count,
        cached=cached_count,
        failed=failed_count,
        reasons=dict(reasons.most_common(5)),
    )
    kept_count = sum(part.outcomes.get("kept", 0) for part in parts)
    if failed_count > config.max_failed * kept_count:
        summary = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        raise UserError(
            f"the captioner {name} left {failed_count:,} of {kept_count:,} images without a caption, more than the "
            f"share of {config.max_failed:g} that ingest.captioner.max_failed allows ({summary}): start or fix it and "
            "give the same command again, which sends these alone"
        )
    return counts


def _answers(
    captioner: "Captioner", cache: "Cache", name: str, images: Iterator[tuple[str, bytes]]
) -> Generator[tuple[str, str | NoCaptionError], None, None]:
    """Send images, and store the answers; yields the key and answer of each, and stops all requests when closed."""

    def send(item: tuple[str, bytes]) -> tuple[str, str | NoCaptionError]:
        key, image = item
        try:
            caption = captioner(image)
        except NoCaptionError as error:
            return key, error
        cache.put(key, name, caption)
        return key, caption

    answers = prefetch(send, images, captioner.config.workers)
    try:
        yield from answers
    except BaseException:
        captioner.client.stopped.set()
        raise
    finally:
        answers.close()


class Captioner:
    """The command or endpoint of ``config``; thread-safe. Raises UserError for one that cannot be called at all."""

    def __init__(self, config: CaptionerConfig) -> None:
        self.config = config
        self.client = HttpClient(config.seconds, connections=config.workers)
        self._headers = {"Content-Type": "image/png", "Accept": "application/json"}
        if config.token_env:
            token = os.environ.get(config.token_env, "").strip()
            if not token or not token.isascii() or not token.isprintable():
                raise UserError(
                    f"the environment has no token in {config.token_env}, which ingest.captioner.token_env names: "
                    "set it to one line of ASCII"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        if config.command and shutil.which(config.command[0]) is None:
            raise UserError(f"ingest.captioner.command: {config.command[0]} is no program: give its path")
        if missing_names := [name for name in config.environment or () if name not in os.environ]:
            raise UserError(
                f"the environment has no {missing_names[0]}, which ingest.captioner.environment names: set it, or "
                "leave it out"
            )
        self._environment = child_environment(config.environment or ())

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def __call__(self, image: bytes) -> str:
        """Return the caption of a PNG; raises NoCaptionError, or NoAnswerError if the captioner is the reason."""
        if self.config.command:
            return _check_caption(self._run(self.config.command, image))
        try:
            answer = self.client.retrying(self.config.tries)(self._post, image)
            return _check_caption(json.loads(answer)["caption"])
        except RetryableError as error:
            raise NoAnswerError(f"{error}, at each of {self.config.tries} tries") from error
        except OversizedError as error:
            raise NoCaptionError(f"its answer has more than {MAX_ANSWER} bytes") from error
        except HttpError as error:
            raise NoAnswerError(str(error)) from error
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise NoCaptionError('its answer is not {"caption": "…"}') from error

    def _run(self, command: tuple[str, ...], image: bytes) -> str:
        deadline, answer = time.monotonic() + self.config.seconds, b""
        with ExitStack() as stack:
            file = stack.enter_context(NamedTemporaryFile(suffix=".png"))
            file.write(image)
            file.seek(0)
            errors = stack.enter_context(TemporaryFile())
            try:
                process = subprocess.Popen(
                    [file.name if argument == "{image}" else argument for argument in command],
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(
                    f"ingest.captioner.command: {command[0]} cannot be started ({error.strerror}): give a program, or "
                    "an executable script whose first line is #! and the path of its interpreter"
                ) from error
            stack.callback(_end, process)
            assert process.stdout is not None
            output = stack.enter_context(process.stdout)
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(output, selectors.EVENT_READ)
            while True:
                # A child of the command may hold the pipe open: once it ended, what it wrote is there.
                has_ended, remaining = process.poll() is not None, deadline - time.monotonic()
                if remaining <= 0:
                    raise NoAnswerError(f"no answer within {self.config.seconds:g} s")
                if selector.select(0 if has_ended else min(remaining, POLL_SECONDS)):
                    if not (piece := os.read(output.fileno(), 2**16)):
                        break
                    answer += piece
                    if len(answer) > MAX_ANSWER:
                        raise NoCaptionError(f"its answer has more than {MAX_ANSWER} bytes")
                elif has_ended:
                    break
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired as error:
                raise NoAnswerError(f"it did not end within {self.config.seconds:g} s") from error
            if code:
                errors.seek(max(errors.seek(0, os.SEEK_END) - 1000, 0))
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise NoAnswerError(f"exit code {code}{last and f': {shorten_message(last)}'}")
        try:
            return answer.decode()
        except UnicodeDecodeError as error:
            raise NoCaptionError("its answer is not UTF-8") from error

    def _post(self, image: bytes) -> bytes:
        with self.client.stream("POST", str(self.config.url), self._headers, image, max_bytes=MAX_ANSWER) as response:
            if response.status != 200:
                raise (NoCaptionError if response.status in REJECTED_STATUSES else NoAnswerError)(response.reason)
            return b"".join(response.pieces)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and its children; they may outlive it."""
    # PermissionError: only zombies are left (macOS).
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check_caption(answer: object) -> str:
    """Return a caption as a source would give it; raises NoCaptionError if there is none or it is too long."""
    if not (caption := (to_text(answer) or "").strip()):
        raise NoCaptionError("it has no caption for it")
    if len(caption) > MAX_CHARACTERS["caption"]:
        raise NoCaptionError(too_long_reason("caption"))
    return caption


def _images(shard: Path, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Yield key and PNG of the images in ``rows``."""
    with shard.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            yield row["key"], file.read(row["size"])


class Cache:
    """Answers of captioners by image and captioner, in the work folder of the data set in ``folder``."""

    def __init__(self, folder: Path) -> None:
        path = work_folder(folder) / "captions.sqlite"
        self._lock = Lock()
        try:
            self._database = sqlite3.connect(path, LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            self._database.executescript(SCHEMA)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and all images are captioned again") from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def get(self, key: str, captioner: str) -> str | None:
        """Return the caption of the image ``key`` by ``captioner``; None if there was no answer yet."""
        query = "SELECT caption FROM captions WHERE key = ? AND captioner = ?"
        with self._lock:
            row = self._database.execute(query, (bytes.fromhex(key), captioner)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, captioner: str, caption: str) -> None:
        """Store an answer: it outlives this process from now on."""
        row = bytes.fromhex(key), captioner, caption
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO captions VALUES (?, ?, ?)", row)

    def forget(self, keys: Iterable[str]) -> None:
        """Delete all answers about these images."""
        with self._lock:
            self._database.executemany("DELETE FROM captions WHERE key = ?", ((bytes.fromhex(key),) for key in keys))
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def forget_captions(folder: Path, keys: Iterable[str]) -> None:
    """Delete all answers about the images ``keys`` of the data set in ``folder``."""
    if (work_folder(folder) / "captions.sqlite").is_file():
        with explain_database_errors(work_folder(folder)), closing(Cache(folder)) as cache:
            cache.forget(keys)
