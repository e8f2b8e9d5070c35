"""A package that adds to Darkroom by entry points: built, installed, and used from the command line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from tests.builders import ROOT
from tests.builders.command_line import darkroom

pytestmark = pytest.mark.slow
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "darkroom-toys"
version = "VERSION"

[project.entry-points."darkroom.sources"]
npy = "darkroom_toys:NumpyArray"

[project.entry-points."darkroom.curation_rules"]
tint = "darkroom_toys:Tint"

[tool.setuptools]
py-modules = ["darkroom_toys"]
"""
MODULE = '''
from typing import Literal

import numpy as np
from PIL import Image

from diffusion.curation.rules import Rule
from diffusion.data.sources.base import Entry, Source


class NumpyArray(Source):
    """Images in a NumPy file, (N, H, W, 3) uint8."""

    form = "a .npy file"
    suffixes = (".npy",)
    options = ("label",)
    in_order = True

    def entries(self):
        for number in range(len(np.load(self.path, mmap_mode="r"))):
            yield Entry(f"{self.path.name}/{number}", str(number), "always", self.values.get("label"))

    def read(self, entries):
        images = np.load(self.path, mmap_mode="r")
        for entry in entries:
            yield Image.fromarray(images[int(entry.locator)])


class Tint(Rule):
    """The mean share of one colour, in [0, 1]."""

    title = "Tint"
    meaning = "mean share of one colour"
    bound = "max"

    colour: Literal["red", "green", "blue"] = "red"

    def measure(self, images, luma):
        means = images.mean((1, 2))
        return SCALE * means[:, ["red", "green", "blue"].index(self.colour)] / means.sum(1)
'''
RED, COUNT = 3, 12
"""Images that are mostly red, the first ones, and all."""
Run = Callable[..., CompletedProcess[str]]


def install(target: Path, version: str, scale: float) -> None:
    """Build the package and install it into ``target``, with measures of its rule multiplied by ``scale``."""
    project = target.with_name(f"{target.name}-project")
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT.replace("VERSION", version))
    (project / "darkroom_toys.py").write_text(MODULE.replace("SCALE", str(scale)))
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(project)], check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command line beside a set of images, with version 1.0 of the package, or another one."""
    root = tmp_path_factory.mktemp("extensions")
    install(root / "1.0", "1.0", 1)
    install(root / "2.0", "2.0", 0.1)
    images = np.random.default_rng(0).integers(0, 200, (COUNT, 9, 9, 3), np.uint8)
    images[:RED, ..., 0] = 255
    np.save(root / "faces.npy", images)

    def call(*arguments: str, version: str = "1.0") -> CompletedProcess[str]:
        sizes = ("--set", "ingest.size=8", "--set", "ingest.held_out=0.3", "--dataset", "faces", "--json")
        return darkroom(root, *arguments, *sizes, PYTHONPATH=f"{ROOT}:{root / version}")

    return call


def answer(process: CompletedProcess[str]) -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def test_sources_and_rules_of_a_package_are_used_by_ingest(run: Run) -> None:
    ingest = ("ingest", "npy:faces.npy?label=face", "--local", "--set", "curation.rules={tint: {max: 0.5}}")
    first = answer(run(*ingest))
    assert (first["listed"], first["kept"], first["dropped"]) == (COUNT, COUNT - RED, RED)
    assert first["source"] == "npy: darkroom-toys 1.0"
    again = answer(run(*ingest))
    assert (again["read"], again["content_digest"]) == (0, first["content_digest"])
    contents = answer(run("data", "show"))
    assert (contents["classes"], contents["sources"]) == ({"face": COUNT - RED}, ["npy: darkroom-toys 1.0"])
    assert contents["rules"] == [{"reason": "rules.tint.max", "count": RED}]
    # Another version of the package may read and measure otherwise: nothing of the old one is reused.
    other = answer(run(*ingest, version="2.0"))
    assert (other["read"], other["dropped"], other["source"]) == (COUNT, 0, "npy: darkroom-toys 2.0")


def test_errors_name_what_packages_add_and_how_to_set_it(run: Run) -> None:
    for arguments, message in (
        (("ingest", "nowhere.xyz"), "give a folder; .*; a .npy file"),
        (("ingest", "npy:faces.npy?colour=red"), "npy:faces.npy has no option colour: there is label"),
        (("--set", "curation.rules={hue: {max: 1}}"), "curation.rules: hue is not a rule: there is tint"),
        (("--set", "curation.rules.tint.colour=pink"), "curation.rules: tint.colour: Input should be 'red'"),
        (("--set", "curation.rules.tint.least=1"), "curation.rules: tint.least: Extra inputs"),
        (("--set", "curation.rules.sharpness.min=1"), "sharpness is not a rule: there is tint"),
    ):
        command = arguments if arguments[0] == "ingest" else ("ingest", "faces.npy", *arguments)
        process = run(*command, "--local")
        assert process.returncode == 2, process.stderr
        (line,) = process.stderr.splitlines()
        assert re.search(message, line), line
