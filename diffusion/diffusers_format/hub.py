"""Pipelines of diffusers on the Hugging Face Hub: verified downloads without code, and pushes of exports."""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import sha256_file
from diffusion.common.hub import HubFile, Repository, hub_api, parse_hub_uri, retry
from diffusion.common.parsing import parse_json
from diffusion.common.progress import Progress, ignore_progress
from diffusion.diffusers_format.import_pipeline import INDEX, WEIGHTS
from diffusion.families.header import Origin

CARD = "README.md"
SMALL = re.compile(r"[\w-]+\.(json|txt)|(spiece|sentencepiece\.bpe|tokenizer)\.model")
"""Names of configurations and vocabularies."""
MAX_SMALL_BYTES = 64 * 2**20
"""Maximum bytes of such a file."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
SAMPLES = "samples/"
LICENCES = re.compile(
    r"mit|isc|zlib|wtfpl|ncsa|pddl|ms-pl|cc|c-uda|odbl|odc-by|unlicense|postgresql|gfdl|unknown|openrail(\+\+)?"
    r"|(creativeml|bigscience)-openrail-m|(apache|artistic|mpl|ecl)-2\.0|(afl|osl)-3\.0|bsl-1\.0|ofl-1\.1"
    r"|cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-(2\.[05]|[34]\.0)|cdla-(sharing|permissive)-[12]\.0|bsd(-[23]-clause(-clear)?)?"
    r"|epl-[12]\.0|eupl-1\.[12]|l?gpl(-(2\.[01]|3\.0))?|agpl-3\.0"
)
"""Identifiers of licences that the Hub knows."""


def download_pipeline(uri: str, folder: Path, progress: Progress = ignore_progress) -> Origin:
    """Download the pipeline ``hf://OWNER/NAME@REVISION`` into ``folder``.

    Only safetensors, configurations, vocabularies and texts are fetched, each verified by its digest in the listing of
    the commit; of several variants of weights those without one. A killed download goes on when the call is repeated.

    Raises UserError for what is not a pipeline, has pickles in the place of safetensors, or needs a token; if the
    folder holds other files, and for a disk without room. Raises DarkroomError if the Hub sends other bytes, and
    TransientError if it cannot be reached.
    """
    name, revision = parse_hub_uri(uri, "model")
    repository = Repository.resolve("model", name, revision)
    files = _select_pipeline_files(repository)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        if strays := sorted(path for path in paths - {file.path for file in files} if not path.endswith(".partial")):
            raise UserError(f"{folder} holds {strays[0]}, which is not of {repository.uri}: give an empty folder")
        total, done = sum(file.size for file in files), 0
        for file in files:
            progress("bytes downloaded", done, total, file.path)
            repository.download(file, folder / file.path)
            done += file.size
        progress("bytes downloaded", done, total)
        for path in folder.rglob(".*.partial"):
            path.unlink()
        digests = {file.path: sha256_file(folder / file.path) for file in files}
    return Origin(source=f"hf://{name}", revision=repository.commit, licence=repository.licence, files=digests)


def _select_pipeline_files(repository: Repository) -> list[HubFile]:
    """Return the files of a pipeline; raises UserError for one that is incomplete without its pickles."""
    files = repository.files
    if INDEX not in files or files[INDEX].size > MAX_SMALL_BYTES:
        single_files = ", ".join(path for path in files if path.endswith((".safetensors", *PICKLES)))[:200]
        raise UserError(
            f"{repository.uri} is not a pipeline of diffusers: it has no {INDEX}"
            + (f", only {single_files}" if single_files else "")
            + "; use a repository that save_pretrained wrote"
        )
    try:
        index = parse_json(repository.read(files[INDEX]))
        components = [name for name, item in index.items() if isinstance(item, list) and item and item[0] is not None]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{INDEX} of {repository.uri} cannot be read ({error}): use another repository") from error
    paths = {INDEX}
    paths |= {path for path in files if "/" not in path and re.fullmatch(r"README\.md|LICEN[SC]E(\.\w+)?", path)}
    for component in components:
        base_names = {path: PurePosixPath(path).name for path in files if path.rpartition("/")[0] == component}
        paths |= {path for path, base in base_names.items() if SMALL.fullmatch(base)}
        variants: dict[str | None, set[str]] = {}
        for path, base in base_names.items():
            if match := WEIGHTS.fullmatch(base):
                variants.setdefault(match["variant"] or match["other"], set()).add(path)
        if None not in variants and len(variants) > 1:
            raise UserError(
                f"{component} of {repository.uri} has weights of variants alone ({', '.join(map(str, variants))}): "
                "use a repository or revision that has plain ones"
            )
        paths |= variants.get(None) or next(iter(variants.values()), set())
        pickles = sorted(path for path, base in base_names.items() if base.endswith(PICKLES))
        # What checks finished images is not run here.
        if pickles and not variants and component != "safety_checker":
            raise UserError(
                f"{component} of {repository.uri} has its weights only in {pickles[0]}, a pickle, which can run code: "
                "use a repository or revision with safetensors"
            )
    if excess := [path for path in sorted(paths) if ".safetensors" not in path and files[path].size > MAX_SMALL_BYTES]:
        raise UserError(f"{excess[0]} of {repository.uri} has over {MAX_SMALL_BYTES} bytes: use another repository")
    return [files[path] for path in sorted(paths)]


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
        raise UserError(f"{uri} names a revision, and a push goes to main: write hf://{name}")
    hub_api()
    if not os.environ.get("HF_TOKEN", "").strip():
        raise UserError("a push to the Hub needs a token with write access: set HF_TOKEN to one")
    return name


def push_to_hub(
    uri: str, folder: Path, card: str, samples: Mapping[str, bytes], message: str, public: bool = False
) -> PushResult:
    """Push an export to the model repository ``uri`` in one commit, unless it is there already.

    The repository is created if it does not exist, private unless ``public``. Files of an earlier export are replaced;
    others at its root stay. ``samples`` are images by path below ``samples/``, whose names must tell their content. A
    push that was killed is repeated; large files that arrived are not sent again.

    Raises UserError as ``check_push`` does, and for a token without access; DarkroomError if the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name, api = check_push(uri), hub_api()
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files |= {CARD: card.encode()} | dict(samples)
    folders = {path.partition("/")[0] for path in files if "/" in path}

    def push() -> PushResult:
        api.create_repo(name, private=not public, exist_ok=True)
        head = Repository.resolve("model", name, None)
        changes = [path for path, data in files.items() if not _is_there(path, data, head.files)]
        stale_paths = [
            path for path in head.files if "/" in path and path.partition("/")[0] in folders and path not in files
        ]
        if not changes and not stale_paths:
            return PushResult(repository=f"hf://{name}", commit=head.commit, created=False, files=len(files))
        operations: list[Any] = [
            CommitOperationAdd(path, str(data) if isinstance(data := files[path], Path) else data) for path in changes
        ]
        operations += [CommitOperationDelete(path) for path in stale_paths]
        try:
            commit = api.create_commit(name, operations, commit_message=message, parent_commit=head.commit)
        except RuntimeError as error:
            # Failed uploads of large files come wrapped.
            raise error.__cause__ or error from error
        return PushResult(repository=f"hf://{name}", commit=commit.oid, created=True, files=len(files))

    return retry(f"model {name}", push)


def _is_there(path: str, data: Path | bytes, files: Mapping[str, HubFile]) -> bool:
    if (file := files.get(path)) is None:
        return False
    # The bits of samples depend on the machine that generates them.
    if path.startswith(SAMPLES):
        return True
    return file.is_at(data) if isinstance(data, Path) else file.is_whole(io.BytesIO(data))


def hub_card(
    body: str,
    name: str,
    dataset: str,
    licence: str | None,
    sources: list[str],
    origin: Origin | None,
    metrics: Mapping[str, float],
    samples: list[str],
    conditional: bool,
) -> str:
    """Write a model card in the form of the Hub: front matter, then ``body``, samples and metrics in Markdown.

    Args:
        body: Description in Markdown.
        name: OWNER/NAME of the repository.
        dataset: Name of the data set.
        licence: Licence; None: unknown.
        sources: Versioned sources of the data set, as hf://datasets/OWNER/NAME@COMMIT.
        origin: Origin of the pipeline that it was fine-tuned from, or is; None: none.
        metrics: Metrics by name; those with ``NAME_low`` and ``NAME_high`` are shown, with this interval.
        samples: Paths of sample images.
        conditional: Whether the model is conditioned on prompts.
    """
    from huggingface_hub import ModelCardData

    matches = [re.match(r"hf://datasets/([^@?]+)@([0-9a-f]+)", source) for source in sources]
    base = re.match("hf://([^@]+)", origin.source) if origin is not None else None
    datasets = list(dict.fromkeys(match[1] for match in matches if match))
    intervals = {
        metric: (value, metrics[f"{metric}_low"], metrics[f"{metric}_high"])
        for metric, value in metrics.items()
        if {f"{metric}_low", f"{metric}_high"} <= metrics.keys()
        and not metric.startswith(("real_baseline", "champion"))
    }
    task = "text-to-image" if conditional else "unconditional-image-generation"
    licence = licence or "unknown"
    is_known = LICENCES.fullmatch(licence.lower()) is not None
    front_matter = ModelCardData(
        license=licence.lower() if is_known else "other",
        # A name on the Hub has no spaces.
        license_name=None if is_known else re.sub("[^a-z0-9.]+", "-", licence.lower())[:64].strip("-") or "other",
        library_name="diffusers",
        base_model=base[1] if base is not None else None,
        pipeline_tag=task,
        datasets=datasets or None,
        tags=["darkroom", "diffusion", task],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(task, datasets, dataset, intervals) or None,
    )
    parts = [f"---\n{front_matter.to_yaml()}\n---", body.strip()]
    if samples:
        images = "\n".join(f'<img src="{path}" width="128" alt="sample {i}">' for i, path in enumerate(samples))
        parts.append(f"## Samples\n\nGenerated by seed order, none selected.\n\n{images}")
    if intervals:
        rows = [f"| {key} | {value:.4g} | {low:.4g} … {high:.4g} |" for key, (value, low, high) in intervals.items()]
        table = "\n".join(["| metric | value | 95 % interval |", "|---|---|---|", *rows])
        parts.append(f"## Evaluation\n\nOn held-out images of the data set {escape_markdown(dataset)}.\n\n{table}")
    parts.append(f"## Licence\n\n{escape_markdown(licence)}")
    return "\n\n".join(parts) + "\n"


def _eval_results(
    task: str, datasets: list[str], dataset: str, intervals: Mapping[str, tuple[float, float, float]]
) -> list[Any]:
    """List metrics with their 95 % intervals as the Hub has them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0] if datasets else dataset,
            dataset_name=dataset,
            dataset_split="held out",
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
            metric_args={"interval": [low, high], "confidence": 0.95},
        )
        for metric, (value, low, high) in intervals.items()
    ]
