"""Shards from elsewhere: verified before use, fetched once, and never more of them than the bound allows."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from diffusion.common.errors import UserError
from diffusion.data import shards
from diffusion.data.dataset import Dataset
from diffusion.data.loader import Loader, WindowedOrder
from diffusion.data.manifest import FileEntry
from diffusion.data.shards import ShardCache
from tests.builders import ROOT
from tests.builders.small_datasets import random_images, write_dataset

SIZE = 1000


class Shelf:
    """A store of random shards of 1000 bytes each, which counts what is fetched, and may spoil or delay it."""

    def __init__(self, count: int) -> None:
        self.contents = [np.random.default_rng(number).bytes(SIZE) for number in range(count)]
        self.entries = [
            FileEntry(name=f"shards/{number:05d}.tar", sha256=hashlib.sha256(data).hexdigest(), bytes=SIZE)
            for number, data in enumerate(self.contents)
        ]
        self.fetched: list[int] = []
        self.spoilt: dict[int, list[bytes]] = {}
        """What comes instead, the first times, of the shard of a number."""
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, entry: FileEntry, path: Path) -> None:
        number = self.entries.index(entry)
        self.fetched.append(number)
        self.gate.wait(10)
        spoilt = self.spoilt.get(number)
        path.write_bytes(spoilt.pop(0) if spoilt else self.contents[number])

    def read(self, cache: ShardCache, number: int) -> None:
        """Read from a shard and check what comes."""
        spans = [(0, 10), (500, 500), (3, 1)]
        expected = [self.contents[number][offset : offset + size] for offset, size in spans]
        assert list(cache.read(self.entries[number], spans)) == expected


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(shelf: Shelf, folder: Path) -> Iterator[ShardCache]:
    """With room for three shards."""
    with closing(ShardCache(folder, shelf, 3 * SIZE)) as shard_cache:
        yield shard_cache


def held(folder: Path) -> set[str]:
    """What lies in the cache, apart from locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_is_fetched_once_and_read_by_offset(shelf: Shelf, cache: ShardCache) -> None:
    for _ in range(3):
        shelf.read(cache, 2)
    assert shelf.fetched == [2]


def test_the_next_process_finds_what_was_fetched(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    shelf.read(cache, 2)
    with closing(ShardCache(folder, shelf, 3 * SIZE)) as second:
        shelf.read(second, 2)
    assert shelf.fetched == [2]


def test_least_recently_used_shard_is_evicted(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    for number in (0, 1, 2, 0, 3, 4):
        time.sleep(0.01)  # file systems keep times to some milliseconds
        shelf.read(cache, number)
        assert sum((folder / name).stat().st_size for name in held(folder)) <= 3 * SIZE
    assert held(folder) == {f"{shelf.entries[number].sha256}.tar" for number in (0, 3, 4)}
    shelf.read(cache, 0)
    assert shelf.fetched == [0, 1, 2, 3, 4]


def test_shard_larger_than_the_cache_is_an_error(shelf: Shelf, folder: Path) -> None:
    small = ShardCache(folder, shelf, SIZE - 1)
    with pytest.raises(UserError, match=r"shards/00000\.tar has 1000 bytes.*holds 999: raise training\.stream_bytes"):
        shelf.read(small, 0)


def test_prefetched_shards_are_ready_when_needed(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    cache.prefetch([shelf.entries[number] for number in (5, 1, 3)])
    eventually(lambda: len(held(folder)) == 3 and not list(folder.glob("*.partial")))
    fetched = list(shelf.fetched)
    for number in (5, 1, 3):
        shelf.read(cache, number)
    assert sorted(fetched) == [1, 3, 5]
    assert shelf.fetched == fetched


def test_prefetched_shards_are_not_evicted_by_other_reads(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    cache.prefetch([shelf.entries[0], shelf.entries[1]])
    shelf.read(cache, 0)
    shelf.read(cache, 1)
    for number in (2, 3, 4, 5):
        shelf.read(cache, number)
    shelf.read(cache, 0)
    shelf.read(cache, 1)
    assert sorted(shelf.fetched) == [0, 1, 2, 3, 4, 5]


def test_prefetching_more_than_the_cache_holds_works(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    cache.prefetch(shelf.entries)
    for number in range(6):
        shelf.read(cache, number)
        assert sum((folder / name).stat().st_size for name in held(folder)) <= 3 * SIZE
    assert set(shelf.fetched) == set(range(6))


def test_concurrent_reads_share_one_fetch(shelf: Shelf, cache: ShardCache) -> None:
    shelf.gate.clear()
    cache.prefetch([shelf.entries[0]])
    eventually(lambda: shelf.fetched == [0])
    readers = [threading.Thread(target=shelf.read, args=(cache, 0)) for _ in range(4)]
    for reader in readers:
        reader.start()
    shelf.gate.set()
    for reader in readers:
        reader.join()
    assert shelf.fetched == [0]


@pytest.mark.parametrize("spoilt", [b"short", bytes(SIZE), b""])
def test_a_shard_that_comes_damaged_is_fetched_once_more(
    shelf: Shelf, cache: ShardCache, folder: Path, spoilt: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.spoilt[3] = [spoilt]
    shelf.read(cache, 3)
    assert shelf.fetched == [3, 3]
    assert "shards/00003.tar" in caplog.text


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("spoilt", "words"), [(b"short", "5 bytes long instead of 1000"), (bytes(SIZE), "changed")])
def test_shards_that_come_damaged_twice_are_named(
    shelf: Shelf, cache: ShardCache, folder: Path, prefetch: bool, spoilt: bytes, words: str
) -> None:
    shelf.spoilt[3] = [spoilt, spoilt]
    if prefetch:
        cache.prefetch([shelf.entries[3]])
        eventually(lambda: shelf.fetched == [3, 3])
    with pytest.raises(UserError, match=rf"shards/00003\.tar .* is {words}.*, also when fetched again"):
        shelf.read(cache, 3)
    assert shelf.fetched == [3, 3]
    assert held(folder) == set()
    shelf.read(cache, 3)  # mended meanwhile


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_shard_damaged_in_the_cache_is_fetched_again(
    shelf: Shelf, cache: ShardCache, folder: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.read(cache, 0)
    (path,) = folder.glob("*.tar")
    path.write_bytes(bytes(SIZE) if how == "changed" else path.read_bytes()[:-1])
    with closing(ShardCache(folder, shelf, 3 * SIZE)) as second:
        shelf.read(second, 0)
    assert shelf.fetched == [0, 0]
    assert "shards/00000.tar" in caplog.text


def test_missing_shard_error_reaches_the_reader(shelf: Shelf, folder: Path) -> None:
    class Empty:
        def fetch(self, entry: FileEntry, path: Path) -> None:
            raise UserError(f"no {entry.name} on the remote")

    with closing(ShardCache(folder, Empty(), 3 * SIZE)) as cache:
        for entries in ([], shelf.entries[:1]):
            cache.prefetch(entries)
            with pytest.raises(UserError, match=r"no shards/00000\.tar on the remote"):
                cache.read(shelf.entries[0], [(0, 1)])
    assert held(folder) == set()


def test_full_disk_in_the_shard_cache_is_a_readable_error(shelf: Shelf, folder: Path) -> None:
    class Full:
        def fetch(self, entry: FileEntry, path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    words = r"no space left for shard shards/00000\.tar.*training\.stream_bytes"
    with closing(ShardCache(folder, Full(), 3 * SIZE)) as cache, pytest.raises(UserError, match=words):
        cache.read(shelf.entries[0], [(0, 1)])
    assert held(folder) == set()


def test_leftovers_of_killed_processes_are_evicted(shelf: Shelf, cache: ShardCache, folder: Path) -> None:
    for number in (4, 5):
        (folder / f"{shelf.entries[number].sha256}.{SIZE}.partial").write_bytes(b"begun")
    for number in (0, 1, 2):
        shelf.read(cache, number)
    assert held(folder) == {f"{shelf.entries[number].sha256}.tar" for number in (0, 1, 2)}


def test_shards_that_others_fetch_count_and_are_waited_for(
    shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Shelf(6)
    other.gate.clear()
    with closing(ShardCache(folder, other, SIZE)) as slow, closing(ShardCache(folder, shelf, SIZE)) as ours:
        slow.prefetch([other.entries[0]])
        eventually(lambda: other.fetched == [0])
        monkeypatch.setattr(shards, "MAX_WAIT", 0.2)
        with pytest.raises(UserError, match=r"no room for shard shards/00001\.tar.*other processes"):
            shelf.read(ours, 1)
        monkeypatch.undo()
        reader = threading.Thread(target=shelf.read, args=(ours, 1))
        reader.start()
        other.gate.set()
        reader.join(10)
        assert not reader.is_alive()
    assert held(folder) == {f"{shelf.entries[1].sha256}.tar"}


READER = """
import sys
from contextlib import closing
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
from diffusion.data.shards import ShardCache
from tests.diffusion.data.test_shard_cache import Shelf
shelf, rng = Shelf(6), np.random.default_rng(int(sys.argv[2]))
with closing(ShardCache(Path(sys.argv[1]), shelf, 3000)) as cache:
    print("begun", flush=True)
    for _ in range(int(sys.argv[3])):
        cache.prefetch([shelf.entries[number] for number in rng.permutation(6)[:2]])
        shelf.read(cache, int(rng.integers(6)))
"""


def reader(folder: Path, seed: int, reads: int) -> "subprocess.Popen[str]":
    root = str(ROOT)
    command = [sys.executable, "-c", READER.format(root=root), str(folder), str(seed), str(reads)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_a_small_cache_though_one_is_killed(folder: Path) -> None:
    processes = [reader(folder, seed, 40) for seed in range(2)]
    doomed = reader(folder, 9, 10**9)
    assert doomed.stdout is not None
    assert doomed.stdout.readline() == "begun\n"
    time.sleep(0.3)
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.communicate()
    most = 0
    while any(process.poll() is None for process in processes):
        with FileLock(folder / ".lock"):  # so that none comes and none goes while they are counted
            most = max(most, sum(path.stat().st_size for path in folder.glob("*.tar")))
        time.sleep(0.05)
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert 0 < most <= 3 * SIZE


class Away:
    """The shards of a data set, moved to another folder."""

    def __init__(self, folder: Path, elsewhere: Path) -> None:
        (folder / "shards").rename(elsewhere)
        self.elsewhere = elsewhere
        self.fetched: list[str] = []

    def fetch(self, entry: FileEntry, path: Path) -> None:
        self.fetched.append(entry.name)
        path.write_bytes((self.elsewhere / Path(entry.name).name).read_bytes())


def bytes_in(folder: Path) -> int:
    """Of all shards in a cache, less those that are thrown out meanwhile."""
    total = 0
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_sets_larger_than_the_cache_are_seen_whole(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "set", random_images(120), per_shard=10, held_out_every=0)
    with closing(Dataset.open(tmp_path / "set")) as local:
        whole = local.images(range(120))
    store = Away(tmp_path / "set", tmp_path / "remote")
    room = 4 * max(shard.bytes for shard in manifest.shards)
    cache = ShardCache(tmp_path / "cache", store, room)
    with closing(Dataset.open(tmp_path / "set", cache, cache_bytes=0)) as data:
        order = WindowedOrder(manifest.layout_digest, 0, 2, data.by_shard())
        # One batch ahead: these windows are so small that more would reach beyond the next one.
        with Loader(data, range(120), order, 10, prefetch=1, workers=1) as loader:
            for epoch in range(2):
                rows = []
                for at in range(0, 120, 10):
                    batch = loader.batch(120 * epoch + at)
                    assert torch.equal(batch.images, whole[batch.rows])
                    rows += batch.rows.tolist()
                    assert bytes_in(tmp_path / "cache") <= room
                assert sorted(rows) == list(range(120))
    assert set(store.fetched) == {shard.name for shard in manifest.shards}
    assert len(store.fetched) <= 2 * len(manifest.shards) + 4  # each once an epoch, and those of the window ahead
