"""Tars made in memory, and the peak memory of a call."""

import io
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping

from hypothesis import strategies as st

Files = Mapping[str, bytes]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    tar.addfile(info, io.BytesIO(data))


def tar_bytes(files: Files, format_: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)

names = st.builds("/".join, st.lists(parts, min_size=1, max_size=4)).filter(lambda name: name not in (".", ".."))

files = st.dictionaries(names.map(lambda name: f"{name}.png"), st.binary(max_size=1500), max_size=6)


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
