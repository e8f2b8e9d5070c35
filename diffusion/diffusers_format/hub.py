"""Pipelines of diffusers on the Hugging Face Hub: verified downloads without code, and pushes of exports."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import sha256_file
from diffusion.common.hub import HubFile, Repository, parse_hub_uri
from diffusion.common.hub_push import PushResult, card_licence, check_push, push_files
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


def push_to_hub(
    uri: str, folder: Path, card: str, samples: Mapping[str, bytes], message: str, public: bool = False
) -> PushResult:
    """Push an export to the model repository ``uri`` as ``push_files`` does, with ``card`` as its README.

    ``samples`` are images by path below ``samples/``, whose names must tell their content, as their bits depend on the
    machine that generates them.
    """
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files |= {CARD: card.encode()} | dict(samples)
    return push_files(check_push(uri), files, message, public, named_by_content=SAMPLES)


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
    fields = card_licence(licence)
    front_matter = ModelCardData(
        license=fields["license"],
        license_name=fields.get("license_name"),
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
