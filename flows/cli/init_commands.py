"""Command ``darkroom init``: look at images, and write a configuration for them."""

import json
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_controls, python_literal
from flows.cli.command import CommandOutput, DatasetName, command, connect

if TYPE_CHECKING:
    from diffusion.data.sources.survey import Survey

app = typer.Typer()
Images = Annotated[str, Argument(metavar="FOLDER", help="Images: a folder, or any source of `darkroom ingest`.")]
WriteMetadata = Annotated[
    bool | None,
    Option(
        "--write-metadata/--no-write-metadata",
        help="First write FOLDER/metadata.csv from a table with captions in it; default: asks in a terminal.",
        show_default=False,
    ),
]


@command(app, panel="Start and look around")
def init(
    source: Images,
    dataset: DatasetName = None,
    write_metadata: WriteMetadata = None,
) -> CommandOutput:
    """Look at images (sizes, channels, classes, captions), and write a commented params.yaml for them.

    A params.yaml that was edited is never changed: --write-metadata then writes the metadata.csv alone.

    Example:  darkroom init ~/faces
    """
    from diffusion.data.sources import survey as surveys

    path = Path("params.yaml")
    if (exists := path.exists()) and not write_metadata:
        raise UserError(f"{path} exists already: edit it, or run `darkroom init` in another folder")
    _require_dataset_name(dataset)
    folder = Path(source)
    table = surveys.find_captions(folder) if folder.is_dir() else None
    if table is None and write_metadata:
        raise UserError(f"no table with captions in {source}: leave --write-metadata out")
    if table is not None and write_metadata is None and sys.stdin.isatty() and sys.stderr.isatty():
        write_metadata = _ask_for_metadata(surveys.describe_table(table), folder)
    text, name = path.read_text() if exists else None, dataset
    if text is not None:
        survey, own_name = _survey(source), _own_name(text)
        if text == _template(survey, own_name, _proposals(survey, source)):
            text, name = None, own_name  # as init wrote it
    written = []
    if write_metadata and table is not None:
        written = [f"wrote      {surveys.write_metadata(table)}: the captions of {table.path.name}"]
    return _write_params(source, written, path, text, name)


def _require_dataset_name(dataset: str | None) -> None:
    from diffusion.common.config import plain_name

    try:
        plain_name(dataset or "images")
    except ValueError as error:
        raise UserError(f"--dataset {dataset} {error}") from error


def _ask_for_metadata(description: str, folder: Path) -> bool:
    guess = description.partition(", but")[0]
    return typer.confirm(f"{guess}. Write {folder}/metadata.csv, to learn them?", default=True, err=True)


def _write_params(source: str, written: list[str], path: Path, edited: str | None, name: str | None) -> CommandOutput:
    """Write params.yaml, unless it is there and was ``edited``; output of ``init``."""
    from diffusion.common.files import write_bytes

    survey = _survey(source)
    proposals = _proposals(survey, source)
    if proposals.get("ingest.folders") == "caption":
        survey = _survey(source, folders="caption")
    lines = [*survey.lines(), *written]
    value: dict[str, Any] = {"params": str(path), "survey": survey.model_dump(mode="json")}
    if edited is not None:
        lines.append(f"kept       {path}, which was edited: {_how_to_learn_captions(edited)} to learn the captions")
        return CommandOutput(value, lines)
    name = name or survey.proposed_name
    size = survey.proposed_size
    write_bytes(path, _template(survey, name, proposals).encode())
    next_command, notes = _advise(survey)
    lines += [*notes, *_describe_proposals(proposals)]
    lines += [f"wrote      {path}: {size}×{size} pixels, data set {name}", f"next       {next_command}"]
    return CommandOutput(value | {"dataset": name, "size": size, "next": next_command}, lines)


def _survey(source: str, **settings: Any) -> "Survey":
    """Survey a source, read as ``settings`` of ``ingest`` say; raises UserError if none of its images can be read."""
    from tempfile import TemporaryDirectory

    from diffusion.data.ingest.config import IngestConfig
    from diffusion.data.sources import survey as surveys

    config = IngestConfig.model_validate({"source": source} | settings)
    with connect("s3") if source.startswith("s3://") else nullcontext(), TemporaryDirectory() as scratch:
        objects = None
        if source.startswith("s3://"):
            from flows.storage.s3 import S3Objects

            objects = S3Objects()
        survey = surveys.survey(config, Path(scratch), objects)
    if survey.shorter_sides is None:
        raise UserError(
            f"none of {survey.sampled} images of {source} can be read: give JPEG, PNG, WebP, GIF, BMP or TIFF"
        )
    return survey


def _proposals(survey: "Survey", source: str) -> dict[str, Any]:
    """Settings for masks, and for folders called as in sd-scripts, 10_cat: what the word is, and repeats as weights."""
    from diffusion.data.sources.conventions import parse_folder
    from diffusion.data.sources.mask_files import UNUSED

    proposals: dict[str, Any] = {"ingest.masks": "files"} if UNUSED in survey.captions_found.ignored else {}
    folders = survey.captions_found.folders
    if not folders:
        return proposals
    words = {parse_folder(folder.rpartition("/")[2])[1] for folder in folders}
    # The captions of a subject name it; several classes have none.
    is_caption = len(words) == 1 or survey.captions > 0
    proposals["ingest.folders"] = "caption" if is_caption else "class"
    if len(set(folders.values())) > 1:
        proposals["training.weights"] = {f"{folder}/*": repeats for folder, repeats in folders.items()}
    return proposals


def _has_captions(survey: "Survey", proposals: dict[str, Any]) -> bool:
    return bool(survey.captions or proposals.get("ingest.folders") == "caption")


def _describe_proposals(proposals: dict[str, Any]) -> list[str]:
    lines = []
    if "ingest.folders" in proposals:
        meaning = {"class": "classes", "caption": "captions of images without one"}
        weights = "training.weights" in proposals
        lines.append(
            f"folders    their words are {meaning[proposals['ingest.folders']]} (ingest.folders), their repeats "
            f"{'weights (training.weights)' if weights else 'all equal, and change nothing'}"
        )
    if "ingest.masks" in proposals:
        lines.append("masks      are read (ingest.masks); training.mask weights the loss by them")
    return lines


def _own_name(text: str) -> str:
    """Name of the data set in the text of a params.yaml; "" if there is none."""
    from diffusion.common.parsing import parse_yaml

    with suppress(ValueError, KeyError, TypeError):
        return str(parse_yaml(text)["training"]["dataset"])
    return ""


def _how_to_learn_captions(text: str) -> str:
    has_section = re.search(r"^model:", text, re.MULTILINE)
    return "set `text: true` in its section `model`" if has_section else "add the lines `model:` and `  text: true`"


def _advise(survey: "Survey") -> tuple[str, list[str]]:
    """Next command for as many images as there are, and a note if they are too few to judge a model."""
    from diffusion.evaluation.config import choose_held_out

    if choose_held_out(survey.images) is not None:
        return "darkroom up && darkroom retrain", []
    return "darkroom up && darkroom ingest && darkroom train", [
        "           too few to train a model from nothing, or to judge it: fine-tune another on them "
        "(docs/how-to/fine-tune.md), and register it by `darkroom model import`"
    ]


def _template(survey: "Survey", name: str, proposals: dict[str, Any]) -> str:
    """Text of params.yaml: what the survey proposes, and ``proposals`` by dotted name."""
    from diffusion.data.ingest.config import IngestConfig
    from diffusion.evaluation.config import choose_held_out

    lines = "\n".join(f"#   {escape_controls(line)}" for line in survey.lines())
    has_captions = _has_captions(survey, proposals)
    model = ["  text: true  # learn the captions, for --prompt; needs the extra `text`"] if has_captions else []
    size = survey.proposed_size
    held_out, share = list[str](), choose_held_out(survey.images)
    if share not in (None, IngestConfig.model_fields["held_out"].default):
        held_out = [f"  held_out: {share:g}  # so that evaluation gets its 10 images or more, which are not trained on"]
    fit_line = "  # fit: crop  # of images that are not square: crop, pad, squash, or bucket to keep their shapes"
    if survey.proposed_fit == "bucket":
        fit_line = (
            f"  fit: bucket  # keeps their shapes; crop would cut {survey.cropped:.0%} of the pixels; or pad, squash"
        )
    return "\n".join(
        [
            "# yaml-language-server: $schema=params.schema.json",
            "# Configuration of Darkroom. Fields that are left out have their defaults.",
            "#   darkroom config show                           all fields, and where each is from",
            "#   darkroom config schema > params.schema.json    completion and checks in an editor",
            lines,
            "ingest:",
            f"  source: {python_literal(survey.source)}",
            f"  size: {size}  # height and width of stored images; twice the size trains four times as long",
            fit_line,
            *held_out,
            *(
                ["  # enlarge: true  # images below that size are quarantined otherwise"]
                if survey.has_images_below(size)
                else []
            ),
            *_setting_lines("ingest", proposals),
            "",
            *(["model:", *model, ""] if model else []),
            "training:",
            f"  dataset: {json.dumps(name, ensure_ascii=False)}",
            "  minutes: 10  # or `images`, the number to see; quality grows for hours",
            "  # flip: true  # mirror half of the images: right for most photographs, wrong for text",
            *_setting_lines("training", proposals),
            "",
        ]
    )


def _setting_lines(section: str, settings: dict[str, Any]) -> list[str]:
    return [
        f"  {key.partition('.')[2]}: {escape_controls(json.dumps(value, ensure_ascii=False))}"
        for key, value in settings.items()
        if key.startswith(f"{section}.")
    ]
