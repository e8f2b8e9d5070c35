"""Power cuts: what a program wrote is recorded, and put together again as a disk may have it after the power failed.

A disk has what was synced, and of the rest whatever it likes: POSIX promises no order. ``record`` runs a program with
``record_writes.c`` preloaded; ``Recording.cuts`` plays it up to some of its operations, and ``Disk.write_to`` makes the
folder that is found then.
"""

import copy
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from tests.builders.command_line import output_of

SOURCE = Path(__file__).with_name("record_writes.c")
ENTRY = re.compile(rb"([A-Z]+) ([^\n]*)\n")
GARBAGE = re.compile(r"(^|/)\.|\.partial$")
"""Names under which nothing counts as finished."""


class Loss(Enum):
    """What a disk has of what was not synced."""

    ALL = "nothing: neither data nor names"
    DATA = "all names, none of the data: files are empty, or as long as they were at the last sync"
    ZEROS = "all names and lengths, zeros instead of the data"
    SOME = "some of the names and some of the data, in no order"


@dataclass
class Inode:
    """A file or folder."""

    folder: bool = False
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    """Writes since the last sync, in order: offset and data; a length alone is a truncation to the offset."""
    target: str | None = None
    """Of a symbolic link."""

    def write(self, offset: int, data: bytes) -> None:
        _apply(self.data, offset, data)
        self.unsynced.append((offset, data))

    def truncate(self, size: int) -> None:
        _resize(self.data, size)
        self.unsynced.append((size, b""))

    def sync(self) -> None:
        self.synced = bytes(self.data)
        self.unsynced.clear()

    def after(self, loss: Loss, chance: random.Random) -> bytes:
        """What is found in the file after a cut."""
        if not self.unsynced:
            return self.synced
        if loss in (Loss.ALL, Loss.DATA):
            return self.synced
        content = bytearray(self.synced)
        if loss is Loss.SOME:
            for offset, data in self.unsynced:
                if chance.random() < 0.5:
                    _apply(content, offset, data) if data else _resize(content, offset)
        if chance.random() < 0.5 or loss is Loss.ZEROS:
            _resize(content, len(self.data))
        return bytes(content)


def _apply(data: bytearray, offset: int, written: bytes) -> None:
    if len(data) < offset:
        _resize(data, offset)
    data[offset : offset + len(written)] = written


def _resize(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


@dataclass
class Change:
    """What one operation did to folders: entries set, by folder and name, or taken away. It happens whole or not."""

    entries: list[tuple[int, str, int | None]]
    synced: bool = False


@dataclass
class Disk:
    """Inodes by a number of their own, as file systems use theirs again."""

    root: Path
    inodes: list[Inode] = field(default_factory=lambda: [Inode(folder=True)])
    numbers: dict[int, int] = field(default_factory=dict)
    """Where the inode of a number that the system uses now is among the ``inodes``."""
    names: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    """The entries of each folder as the programs see them."""
    changes: list[Change] = field(default_factory=list)
    finished: dict[str, set[bytes]] = field(default_factory=dict)
    """What was ever whole under a name: there before, or renamed to it."""
    written_in_place: set[str] = field(default_factory=set)
    """Files that were made under their final names."""
    renamed: dict[int, str] = field(default_factory=dict)
    """Names by inode of files that were renamed to them."""
    grown: set[str] = field(default_factory=set)
    """Of these, those that were written to afterwards."""

    @classmethod
    def of(cls, root: Path) -> "Disk":
        """The folder ``root`` as it is, and all of it synced."""
        disk = cls(root)
        disk.numbers[root.stat().st_ino] = 0
        for path in sorted(root.rglob("*")):
            inode = Inode(folder=path.is_dir() and not path.is_symlink())
            if path.is_symlink():
                inode.target = str(path.readlink())
            elif path.is_file():
                inode.data = bytearray(path.read_bytes())
                inode.sync()
            name = path.relative_to(root).as_posix()
            disk._enter(path.lstat().st_ino, str(path), inode, synced=True)
            if path.is_file():
                disk.finished.setdefault(name, set()).add(bytes(inode.data))
        return disk

    def play(self, operation: str, argument: str, data: bytes) -> None:
        """Do what was recorded."""
        if operation in ("CREATE", "MKDIR", "SYMLINK"):
            number, _, place = argument.partition(" ")
            place, _, target = place.partition("\t")
            self._enter(int(number), place, Inode(folder=operation == "MKDIR", target=target or None))
            if operation == "CREATE":
                self.written_in_place.add(self._name(place))
        elif operation == "UNNAMED":
            self.numbers[int(argument)] = self._new(Inode())
        elif operation == "LINK":
            number, _, place = argument.partition(" ")
            self._change((*self._entry(place), self.numbers[int(number)]))
        elif operation == "WRITE":
            number, offset, _ = argument.split()
            inode_number = self.numbers[int(number)]
            self.inodes[inode_number].write(int(offset), data)
            self.grown |= {self.renamed[inode_number]} if inode_number in self.renamed else set()
        elif operation == "TRUNCATE":
            number, size = argument.split()
            self.inodes[self.numbers[int(number)]].truncate(int(size))
        elif operation == "SYNC":
            self._sync(argument)
        elif operation == "RENAME":
            number, _, places = argument.partition(" ")
            before, after = places.split("\t")
            folder, name = self._entry(before)
            inode = self.numbers[int(number)]
            if self.names[folder].get(name) != inode:
                # It was renamed before by a system call that is not seen.
                [former] = [key for key, each in self.names[folder].items() if each == inode]
                self._change((folder, former, None), (folder, name, inode))
            self._change((folder, name, None), (*self._entry(after), inode))
            if not self.inodes[inode].folder:
                self.finished.setdefault(self._name(after), set()).add(bytes(self.inodes[inode].data))
                self.written_in_place.discard(self._name(after))
                self.renamed[inode] = self._name(after)
        elif operation == "UNLINK":
            self._change((*self._entry(argument), None))
        else:
            assert operation == "MAPPED", operation

    def write_to(self, target: Path, loss: Loss, chance: random.Random) -> None:
        """Make in ``target`` what a disk may have if the power fails now."""
        names: dict[int, dict[str, int]] = {number: {} for number in self.names}
        for change in self.changes:
            survives = {Loss.ALL: False, Loss.DATA: True, Loss.ZEROS: True}.get(loss, chance.random() < 0.5)
            if change.synced or survives:
                for folder, name, number in change.entries:
                    if number is None:
                        names[folder].pop(name, None)
                    else:
                        names[folder][name] = number
        self._write(0, names, target, loss, chance)

    def _write(
        self, number: int, names: Mapping[int, Mapping[str, int]], target: Path, loss: Loss, chance: random.Random
    ) -> None:
        target.mkdir()
        for name, each in names[number].items():
            inode, path = self.inodes[each], target / name
            if inode.folder:
                self._write(each, names, path, loss, chance)
            elif inode.target is not None:
                path.symlink_to(inode.target)
            else:
                path.write_bytes(inode.after(loss, chance))

    def torn(self, target: Path) -> list[str]:
        """Names in ``target`` that look finished, and hold what was never whole under that name, nor begin with it."""
        names = []
        for path in target.rglob("*"):
            name = path.relative_to(target).as_posix()
            if path.is_file() and not GARBAGE.search(name) and name not in self.written_in_place:
                whole, data = self.finished.get(name, set()), path.read_bytes()
                grown = name in self.grown and any(data.startswith(each) for each in whole)
                names += [name] if data not in whole and not grown else []
        return names

    def _new(self, inode: Inode) -> int:
        self.inodes.append(inode)
        if inode.folder:
            self.names[len(self.inodes) - 1] = {}
        return len(self.inodes) - 1

    def _enter(self, number: int, place: str, inode: Inode, synced: bool = False) -> None:
        self.numbers[number] = self._new(inode)
        self._change((*self._entry(place), self.numbers[number]), synced=synced)

    def _change(self, *entries: tuple[int, str, int | None], synced: bool = False) -> None:
        for folder, name, number in entries:
            if number is None:
                del self.names[folder][name]
            else:
                self.names[folder][name] = number
        self.changes.append(Change(list(entries), synced))

    def _sync(self, number: str) -> None:
        every = number == "ALL"
        synced = range(len(self.inodes)) if every else [self.numbers[int(number)]]
        for each in synced:
            self.inodes[each].sync()
        for change in self.changes:
            change.synced |= every or any(folder in synced for folder, _, _ in change.entries)

    def _name(self, place: str) -> str:
        return Path(place).relative_to(self.root).as_posix()

    def _entry(self, place: str) -> tuple[int, str]:
        """Folder and name in it."""
        *folders, name = Path(place).relative_to(self.root).parts
        folder = 0
        for each in folders:
            folder = self.names[folder][each]
        return folder, name


@dataclass(frozen=True)
class Recording:
    """A folder as it was, and what a program did to it, in order."""

    start: Disk
    operations: list[tuple[str, str, bytes]]

    def cuts(self, count: int, chance: random.Random) -> Iterator[tuple[Disk, bool]]:
        """The disk after some of the operations: ``count`` moments, half of them beside what was synced or renamed.

        With each comes whether it is the end, when the program has said that it is done; that comes last.
        """
        every = range(1, len(self.operations) + 1)
        decisive = {n for n in every if self.operations[n - 1][0] in ("SYNC", "RENAME", "LINK")}
        near = sorted({m for n in decisive for m in (n - 1, n)} & set(every))
        moments = [*chance.sample(near, min(count - count // 2, len(near))), len(self.operations)]
        moments += chance.sample(every, min(count // 2, len(every)))
        disk, position = copy.deepcopy(self.start), 0
        for moment in sorted(moments):
            for operation in self.operations[position:moment]:
                disk.play(*operation)
            position = moment
            yield disk, moment == len(self.operations)


def library(folder: Path) -> Path:
    """The library that records, compiled into ``folder``; skips the test where it cannot be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("recording what a program writes needs Linux and a C compiler")
    library_file = folder / "record_writes.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library_file, SOURCE, "-ldl", "-lpthread"], check=True)
    return library_file


def record(
    library_file: Path, root: Path, script: str, *arguments: str, variables: Mapping[str, str] = {}
) -> Recording:
    """Run the Python ``script`` in the folder ``root``, with ``library_file`` preloaded; its changes to ``root``."""
    log = root.parent / f"{root.name}.writes"
    start = Disk.of(root.resolve())
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE.parents[2]),
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": str(library_file),
        "POWER_CUT_ROOT": str(root.resolve()),
        "POWER_CUT_LOG": str(log),
        **variables,
    }
    output_of([sys.executable, "-c", script, *arguments], cwd=root, env=environment)
    recording = Recording(start, list(_read(log.read_bytes())))
    log.unlink()
    return recording


def _read(record: bytes) -> Iterator[tuple[str, str, bytes]]:
    at = 0
    while at < len(record):
        entry = ENTRY.match(record, at)
        assert entry, record[at : at + 100]
        operation, argument = entry[1].decode(), os.fsdecode(entry[2])
        size = int(argument.split()[2]) if operation == "WRITE" else 0
        yield operation, argument, record[entry.end() : entry.end() + size]
        at = entry.end() + size
