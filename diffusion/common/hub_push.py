"""Pushes of models to the Hugging Face Hub: one commit with all files, once, and licences as cards name them."""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.hub import HubFile, Repository, hub_api, parse_hub_uri, retry

LICENCES = re.compile(
    r"mit|isc|zlib|wtfpl|ncsa|pddl|ms-pl|cc|c-uda|odbl|odc-by|unlicense|postgresql|gfdl|unknown|openrail(\+\+)?"
    r"|(creativeml|bigscience)-openrail-m|(apache|artistic|mpl|ecl)-2\.0|(afl|osl)-3\.0|bsl-1\.0|ofl-1\.1"
    r"|cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-(2\.[05]|[34]\.0)|cdla-(sharing|permissive)-[12]\.0|bsd(-[23]-clause(-clear)?)?"
    r"|epl-[12]\.0|eupl-1\.[12]|l?gpl(-(2\.[01]|3\.0))?|agpl-3\.0"
)
"""Identifiers of licences that the Hub knows."""


class PushResult(Config):
    """Result of a push to the Hub."""

    repository: str
    """hf://OWNER/NAME."""
    commit: str
    """Commit that has all files."""
    created: bool
    """Whether this push made the commit; otherwise the repository had the same files already."""
    files: int
    """Number of files of the export, its card and samples included."""


def check_push(uri: str) -> str:
    """Return OWNER/NAME; raises UserError for another form, without a token, or if the Hub's client is missing."""
    name, revision = parse_hub_uri(uri, "model")
    if revision is not None:
        raise UserError(f"{uri} names a revision, and a push goes to main: leave @{revision} out")
    hub_api()
    if not os.environ.get("HF_TOKEN", "").strip():
        raise UserError("a push to the Hub needs a token with write access: set HF_TOKEN to one")
    return name


def card_licence(licence: str) -> dict[str, str]:
    """Return the fields of a card's front matter for a licence, which the Hub may not know."""
    if LICENCES.fullmatch(licence.lower()):
        return {"license": licence.lower()}
    # A name on the Hub has no spaces.
    return {
        "license": "other",
        "license_name": re.sub("[^a-z0-9.]+", "-", licence.lower())[:64].strip("-") or "other",
    }


def push_files(
    name: str,
    files: Mapping[str, Path | bytes],
    message: str,
    public: bool = False,
    named_by_content: str | None = None,
) -> PushResult:
    """Push ``files``, by their paths, to the model repository ``name`` in one commit, unless they are there already.

    The repository is created if it does not exist, private unless ``public``. Files of an earlier push in the same
    folders are replaced; others stay. Below ``named_by_content`` equal paths have equal content. A push that was killed
    is repeated; large files that arrived are not sent again.

    Raises UserError for a token without access; DarkroomError if the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, folders = hub_api(), {path.partition("/")[0] for path in files if "/" in path}
    place = f"hf://{name}"

    def push() -> PushResult:
        api.create_repo(name, private=not public, exist_ok=True)
        head = Repository.resolve("model", name, None)
        changes = [path for path, data in files.items() if not _is_there(path, data, head.files, named_by_content)]
        stale_paths = [
            path for path in head.files if "/" in path and path.partition("/")[0] in folders and path not in files
        ]
        if not changes and not stale_paths:
            return PushResult(repository=place, commit=head.commit, created=False, files=len(files))
        operations: list[Any] = [
            CommitOperationAdd(path, str(data) if isinstance(data := files[path], Path) else data) for path in changes
        ]
        operations += [CommitOperationDelete(path) for path in stale_paths]
        try:
            commit = api.create_commit(name, operations, commit_message=message, parent_commit=head.commit)
        except RuntimeError as error:
            # Failed uploads of large files come wrapped.
            raise error.__cause__ or error from error
        return PushResult(repository=place, commit=commit.oid, created=True, files=len(files))

    return retry(f"model {name}", push)


def _is_there(path: str, data: Path | bytes, files: Mapping[str, HubFile], named_by_content: str | None) -> bool:
    if (file := files.get(path)) is None:
        return False
    if named_by_content is not None and path.startswith(named_by_content):
        return True
    return file.is_at(data) if isinstance(data, Path) else file.is_whole(io.BytesIO(data))
