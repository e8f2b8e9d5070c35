"""The code that a model version ships, run in a process of its own with this machine's libraries."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow

import diffusion
from diffusion.errors import UserError
from diffusion.files import write_json
from flows.registry import CODE, CODE_FOLDER, SERVED_MODEL, Version, digest_code
from flows.staging import SERVERS

REDRAW = Path(__file__).with_name("redraw.py")
BEGIN = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]); script = sys.argv[2]; runpy.run_path(script, None, '__main__')"
)
"""Runs a script with a folder before all others on the import path, once Python itself has started without it."""
REQUIREMENT = re.compile(r"[A-Za-z0-9._-]{1,100}==[A-Za-z0-9._+!-]{1,100}")
LONGEST_REQUIREMENTS = 100_000
"""Characters that are read of them."""
INSTALLED = Path(diffusion.__file__).parent.parent
"""Where the code of this installation lies."""


def fetch_code(version: Version, folder: Path) -> Path:
    """Fetch the code of ``version`` into ``folder``; returns where its package ``diffusion`` lies there.

    Raises UserError if it ships none, or not that of which its tag has the digest: who can write to the bucket can
    replace it there, and not the tag.
    """
    there = {item.path for item in mlflow.artifacts.list_artifacts(artifact_uri=version.uri)}
    if not {CODE_FOLDER, SERVED_MODEL.name} <= there:
        raise UserError(f"{version.uri} ships no code (any more): --installed runs what is installed here")
    if version.code_sha256 is None:
        raise UserError(
            f"{version.uri} has no tag {CODE}, so that nobody can tell whether its code was replaced, and it is not "
            "run: --installed runs what is installed here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CODE_FOLDER, SERVED_MODEL.name):
        mlflow.artifacts.download_artifacts(f"{version.uri}/{name}", dst_path=str(folder))
    if (found := digest_code(folder)) != version.code_sha256:
        raise UserError(
            f"the code of {version.uri} was altered after it was registered ({found[:12]}… there, "
            f"{version.code_sha256[:12]}… in its tag {CODE}), and is not run: find out who writes to the bucket; "
            "--installed runs what is installed here"
        )
    return folder / CODE_FOLDER


def fetch_requirements(version: Version) -> list[str]:
    """The libraries that ``version`` was registered with, as NAME==VERSION; lines that read otherwise are left out."""
    lines = str(mlflow.artifacts.load_text(f"{version.uri}/requirements.txt"))[:LONGEST_REQUIREMENTS].splitlines()
    return [line.strip() for line in lines if REQUIREMENT.fullmatch(line.strip())]


def moved(requirements: list[str]) -> list[str]:
    """Those of ``requirements`` that this machine has in another version, as ``NAME: theirs → ours``."""
    pinned = (line.strip().partition("==") for line in requirements)
    return [
        f"{name}: {wanted} → {here or 'not installed'}"
        for name, equal, wanted in pinned
        if equal and (here := _installed(name)) != wanted
    ]


def run(request: dict[str, Any], code: Path) -> Iterator[dict[str, Any]]:
    """The answers of ``flows.redraw`` to ``request``, drawn with the package ``diffusion`` in ``code``.

    The process has this machine's libraries, and no way to our servers. Nothing in ``code`` is loaded but what it
    imports: no ``sitecustomize``, no ``.pth``, and no bytecode is written there. Raises UserError, with its last words,
    if it fails.
    """
    folder = Path(request["folder"])
    asked, said = folder / "request.json", folder / "stderr"
    write_json(asked, request | {"code": str(code), "parent": os.getpid()})
    variables = {name: value for name, value in os.environ.items() if not name.startswith(SERVERS)}
    with asked.open() as words, said.open("w") as errors:
        process = subprocess.Popen(
            # Not -I, which implies -s: the libraries may be installed for this user alone.
            [sys.executable, "-E", "-P", "-B", "-c", BEGIN, str(code), str(REDRAW)],
            cwd=folder,
            env=variables,
            text=True,
            stdin=words,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        yield from map(json.loads, process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if process.returncode:
        last = said.read_text().strip().splitlines()[-1:]
        raise UserError("".join(last) if process.returncode > 0 else f"killed by signal {-process.returncode}")


def _installed(name: str) -> str | None:
    try:
        # As they were when it was registered: without what builds for one device add.
        return installed(name).split("+")[0]
    except PackageNotFoundError:
        return None
