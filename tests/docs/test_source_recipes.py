"""The recipes for sources that other tools read lead to a data set."""

import json
import runpy
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from diffusion.data.manifest import read_manifest
from tests.builders import ROOT
from tests.builders.command_line import CommandLine
from tests.builders.reading_sources import png
from tests.docs.pages import blocks, of_program

PAGE = ROOT / "docs" / "reference" / "sources.md"


def test_shards_of_img2dataset_are_ingested_with_captions(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()
    for shard in range(2):
        with tarfile.open(f"web/{shard:05d}.tar", "w") as tar:
            for number in range(20):
                key, caption = f"{shard:05d}{number:04d}", f"a blob, {number}"
                about = {"caption": caption, "url": f"http://a.example/{key}", "key": key, "status": "success"}
                about |= {"error_message": None, "width": 12, "height": 12, "sha256": "0" * 64}
                image, text = png(20 * shard + number), json.dumps(about)
                for end, data in (("png", image), ("json", text.encode()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{end}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
        Path(f"web/{shard:05d}_stats.json").write_text("{}")
    [words] = of_program("darkroom", blocks(PAGE, "sh")[1])
    result = command_line.json(*words, "--local", "--set", "ingest.size=8")
    assert (result["kept"], result["captions_found"]["captions"]) == (40, 40)


def test_a_set_of_torchvision_becomes_a_folder(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw, random = Path("downloads/FashionMNIST/raw"), np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = random.integers(0, 256, (40, 12, 12), np.uint8), np.arange(40, dtype=np.uint8) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
    [block] = blocks(PAGE, "python")
    Path("save.py").write_text(block)
    runpy.run_path("save.py")
    result = command_line.json("ingest", "fashion", "--dataset", "fashion", "--local", "--set", "ingest.size=12")
    assert result["kept"] == 40
    classes = read_manifest(Path("data/fashion")).class_histogram
    assert classes == {name.replace("/", "-"): 4 for name in sorted(datasets.FashionMNIST.classes)}
