"""Which code and which data version a run stands on: git's commit and DVC's digest."""

import subprocess
from pathlib import Path

from botocore.exceptions import BotoCoreError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo

from diffusion.config import Config
from diffusion.errors import DarkroomError

INGEST_STAGE = "ingest"


class CodeVersion(Config):
    """The state of the git repository the flows run in."""

    commit: str | None
    """None outside a repository, or before its first commit."""
    dirty: bool
    """Whether tracked files differ from the commit."""


class DataVersion(Config):
    """A data set as DVC knows it."""

    digest: str
    """DVC's digest of the data set's folder, ``….dir``."""
    pointer: str
    """The file that holds it: dvc.lock, or the data set's own .dvc file."""
    pushed: bool
    """Whether it also lies on the remote."""


def code_version() -> CodeVersion:
    """The git commit of the working folder, and whether tracked files differ from it."""
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return CodeVersion(commit=head or None, dirty=bool(changes))


def _git(*arguments: str) -> str:
    try:
        finished = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine, so no commit to name either
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def record_data(folder: Path, push_to: str | None) -> DataVersion:
    """Record the data set in ``folder`` in DVC, and push it to the S3 address ``push_to`` if one is given.

    The output of dvc.yaml's ingest stage is committed to dvc.lock, so that ``dvc repro`` sees it as done;
    any other data set gets a .dvc file of its own. Outside a DVC repository one is made.
    Raises DarkroomError with DVC's own words if that fails.
    """
    try:
        root = Repo.find_root()
    except NotDvcRepoError:
        root = str(Path.cwd())
        Repo.init(root, no_scm=not (Path(root) / ".git").exists()).close()
    config = {"core": {"remote": "darkroom"}, "remote": {"darkroom": {"url": push_to}}} if push_to else None
    try:
        with Repo(root, config=config, _wait_for_lock=True) as repo:
            if _is_stage_output(repo, folder):
                repo.commit(INGEST_STAGE, force=True)
                target, pointer = INGEST_STAGE, "dvc.lock"
                output = repo.find_outs_by_path(str(folder))[0]
            else:
                stage = repo.add(str(folder))[0]
                target, pointer = stage.addressing, Path(stage.path).relative_to(root).as_posix()
                output = stage.outs[0]
            if push_to:
                repo.push([target])
            return DataVersion(digest=output.hash_info.value, pointer=pointer, pushed=push_to is not None)
    except (DvcException, BotoCoreError, OSError) as error:
        raise DarkroomError(f"DVC could not record or push {folder}: {error}") from error


def data_version(folder: Path) -> DataVersion | None:
    """What DVC has on record for the data set in ``folder``; None if nothing."""
    try:
        with Repo() as repo:
            for output in repo.index.outs:
                if Path(output.fs_path) == folder.resolve() and output.hash_info:
                    pointer = Path(output.stage.path).name
                    name = "dvc.lock" if pointer == "dvc.yaml" else Path(output.stage.relpath).as_posix()
                    return DataVersion(digest=output.hash_info.value, pointer=name, pushed=False)
    except NotDvcRepoError:
        return None
    return None


def _is_stage_output(repo: Repo, folder: Path) -> bool:
    return any(
        Path(output.fs_path) == folder.resolve() and output.stage.addressing == INGEST_STAGE
        for output in repo.index.outs
    )
