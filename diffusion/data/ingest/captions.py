"""Captions by the user's captioner, called once per image; answers are cached on disk.

The cache, ``data/.NAME/captions.sqlite``, maps an image's key and the captioner's identity to a caption. An answer is
stored before the next image is sent, so a killed ingest sends again only images whose answers were due.
"""

import sqlite3
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.progress import Progress
from diffusion.data.ingest.captioners import Captioner, NoAnswerError, NoCaptionError, make_captioner
from diffusion.data.ingest.config import CaptionerConfig
from diffusion.data.ingest.index import LOCK_TIMEOUT, explain_database_errors
from diffusion.data.ingest.merge import Merge, rewrite_part
from diffusion.data.manifest import CAPTIONER, FileEntry, read_records, work_folder
from diffusion.data.prefetch import prefetch
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.sources.caption_files import complete_caption

MAX_UNANSWERED = 20
"""Images in a row without an answer, after which the captioner is taken for broken and called no more."""
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
    with closing(CaptionCache(folder)) as cache, closing(make_captioner(config)) as captioner:
        for place in (place for place, count in due_counts.items() if count):
            part = parts[place]
            assert part.shard is not None
            rows = read_records(folder, part).to_pylist()
            due_rows = {row["key"]: row for row in rows if is_due(row)}
            captions = {key: caption for key in due_rows if (caption := cache.get(key, name)) is not None}
            cached_count, done = cached_count + len(captions), done + len(captions)
            progress("images captioned", done, total)
            is_asked = unanswered_count < MAX_UNANSWERED
            requests = [row for key, row in due_rows.items() if is_asked and key not in captions]
            images = _images(folder, part.shard, requests, merge.index.store)
            with closing(images), closing(_answers(captioner, cache, name, images)) as answers:
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
                due_rows[key] |= {"caption": _complete_answer(caption, merge.config.trigger), CAPTIONER.name: name}
                merge.index.describe(due_rows[key])
            if captions:
                parts[place] = rewrite_part(folder, part, rows, merge.config.size, part.shard)
    failed_count = total - (done - reasons.total())
    _require_answers(name, failed_count, sum(part.outcomes.get("kept", 0) for part in parts), reasons, config)
    return CaptionCounts(
        captioner=name,
        requests=done - cached_count,
        cached=cached_count,
        failed=failed_count,
        reasons=dict(reasons.most_common(5)),
    )


def _complete_answer(answer: str, trigger: str | None) -> str | None:
    # Lines of a caption are several captions.
    return complete_caption(" ".join(answer.split()), None, trigger)


def _require_answers(name: str, failed: int, kept: int, reasons: Counter[str], config: CaptionerConfig) -> None:
    if failed > config.max_failed * kept:
        summary = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        raise UserError(
            f"the captioner {name} left {failed:,} of {kept:,} images without a caption, more than the "
            f"share of {config.max_failed:g} that ingest.captioner.max_failed allows ({summary}): start or fix it and "
            "give the same command again, which sends these alone"
        )


def _answers(
    captioner: Captioner, cache: "CaptionCache", name: str, images: Iterator[tuple[str, bytes]]
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
        captioner.stop()
        raise
    finally:
        answers.close()


def _images(
    folder: Path, entry: FileEntry, rows: Sequence[dict[str, Any]], store: ShardStore | None
) -> Generator[tuple[str, bytes], None, None]:
    """Yield key and PNG of the images in ``rows`` of a shard."""
    if not rows:
        return
    with shard_file(folder, entry, store) as path, path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            yield row["key"], file.read(row["size"])


class CaptionCache:
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
            try:
                self._database.execute("INSERT OR REPLACE INTO captions VALUES (?, ?, ?)", row)
            except sqlite3.OperationalError:
                self._database.execute("PRAGMA busy_timeout = 0")  # the other threads do not wait one after another
                raise

    def forget(self, keys: Iterable[str]) -> None:
        """Delete all answers about these images."""
        with self._lock:
            self._database.executemany("DELETE FROM captions WHERE key = ?", ((bytes.fromhex(key),) for key in keys))
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def forget_captions(folder: Path, keys: Iterable[str]) -> None:
    """Delete all answers about the images ``keys`` of the data set in ``folder``."""
    if (work_folder(folder) / "captions.sqlite").is_file():
        with explain_database_errors(work_folder(folder)), closing(CaptionCache(folder)) as cache:
            cache.forget(keys)
