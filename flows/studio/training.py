"""Tab that looks at images, starts a retraining on them as a flow run, and follows it to its report.

What it shows is read anew from Prefect and from the run's folder: a page that was closed or reloaded misses nothing.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import gradio as gr
import pandas as pd
from mlflow.client import MlflowClient
from PIL import Image, ImageOps

from diffusion.common.config import dataset_folder, plain_name
from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import require_same_storage
from diffusion.data.manifest import read_manifest
from diffusion.data.sources.survey import SIZES, Survey, survey
from diffusion.evaluation.config import choose_held_out
from diffusion.training.preflight import PREFLIGHT
from flows.checks import check
from flows.config import Params, assign
from flows.deployment import retrainings
from flows.deployment.retrainings import Retraining, RetrainingStep
from flows.evaluate import find_tracker
from flows.studio.errors import show_errors
from flows.studio.image_sources import check_zip, choose_folder, keep_zip, list_folders
from flows.studio.server import new_token, require_token
from flows.tracking.console import clock
from flows.tracking.runs import run_page

MAX_SHOWN = 12
"""Maximum number of thumbnails, and of sample grids."""
MAX_POINTS = 300
"""Maximum number of points of a curve."""
MAX_MINUTES = 24 * 60
"""Maximum time budget: what is deployed is cancelled after a day."""
DEFAULT_MINUTES = 10
POLL_SECONDS = 3.0
STEPS = ("ingest", "train", "evaluate", "promote", "sample", "explain")
"""Steps of a retraining, in the order of their running."""
PLAIN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class FoundImages:
    """Images that a person looked at, and where they are."""

    source: Path
    is_upload: bool
    survey: Survey
    thumbnails: list[Image.Image]


def look(folder: str, archive: str | None) -> FoundImages:
    """Look at the images of an uploaded zip or else of a folder, as ``darkroom init`` does; UserError as it raises."""
    if archive is not None:
        check_zip(Path(archive))
    source, thumbnails = Path(archive) if archive is not None else choose_folder(folder), list[Image.Image]()

    def show(image: Image.Image) -> None:
        if len(thumbnails) < MAX_SHOWN:
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((128, 128))
            thumbnails.append(small)

    with TemporaryDirectory() as scratch:
        found = survey(IngestConfig(source=str(source)), Path(scratch), show=show)
    if found.shorter_sides is None:
        raise UserError(f"none of {found.sampled} images can be read: give JPEG, PNG, WebP, GIF, BMP or TIFF")
    return FoundImages(source, archive is not None, found, thumbnails)


def make_params(base: dict[str, Any], found: FoundImages, name: str, size: int, minutes: float) -> Params:
    """Configuration of a retraining on the images; raises UserError for a name, size or time that cannot be.

    ``base``: sections of the deployment, which the retraining takes over.
    """
    try:
        plain_name(name := name.strip())
    except ValueError as error:
        raise UserError(f"the name {name!a} {error}") from error
    if not minutes or not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"{minutes or 0:g} minutes of training: choose from 1 to {MAX_MINUTES:,}")
    tree = json.loads(json.dumps(base))
    settings = {
        "ingest.source": str(found.source),
        "ingest.size": size,
        "training.dataset": name,
        "training.minutes": minutes,
    }
    settings |= {"model.text": True} if found.survey.captions else {}
    if is_new := not (dataset_folder(name) / "manifest.json").is_file():
        if (share := choose_held_out(found.survey.images)) is None:
            raise UserError(
                f"{found.survey.images:,} images are too few to train a model and to judge it: give a few times as many"
            )
        proposed = {"held_out": share, "fit": found.survey.proposed_fit}
        settings |= {f"ingest.{key}": value for key, value in proposed.items() if key not in tree.get("ingest", {})}
    for key, value in settings.items():
        assign(tree, key, value, key)
    params = Params.parse(tree)
    if not is_new:
        require_same_storage(read_manifest(params.dataset_folder), params.ingest, "never")
    return params


def start(found: FoundImages, name: str, size: int, minutes: float) -> UUID:
    """Start a retraining on the images; returns the ID of its flow run. UserError names what is missing."""
    with retrainings.prefect_client() as client:
        deployment = retrainings.choose_deployment(client, name.strip())
        base = retrainings.base_of(deployment.parameters["params"], name.strip())
        params = make_params(base, found, name, size, minutes)
        if found.is_upload:
            source = str(keep_zip(found.source, params.training.dataset))
            params = params.model_copy(update={"ingest": params.ingest.model_copy(update={"source": source})})
        check("retrain", params)
        check("retrain", params, connected=True)
        return retrainings.start(client, deployment, params)


@dataclass(frozen=True)
class TrainingProgress:
    """What a training has written so far into its folder."""

    images: int
    """Images seen."""
    total: int
    """Images to see; 0: unknown."""
    rate: float | None
    """Images per second, of late; None while it is unknown."""
    curves: dict[str, list[tuple[int, float]]]
    """Points (images, loss) of each curve."""
    grids: list[Path]
    """Sample grids, the newest first."""

    @classmethod
    def read(cls, folder: Path, begun: datetime | None, ended: datetime | None) -> "TrainingProgress | None":
        """Read the run's folder; None if what it holds was written by another retraining."""
        history = folder / "history.csv"
        if begun is None or not history.is_file():
            return None
        written = datetime.fromtimestamp(history.stat().st_mtime, UTC)
        if written < begun or (ended is not None and written > ended):
            return None
        rows = _rows(history)
        losses = _rows(folder / "losses.csv")
        curves = {
            "training": [(int(row["images"]), row["loss"]) for row in rows],
            "training, averaged weights": [(int(row["images"]), row["train_loss_ema"]) for row in losses],
            "held out, averaged weights": [(int(row["images"]), row["held_out_loss_ema"]) for row in losses],
        }
        rates = [row["images_per_second"] for row in rows[-10:]]
        total = 0
        with suppress(OSError, ValueError, KeyError):  # not written yet
            total = int(json.loads((folder / PREFLIGHT).read_text())["images"])
        return cls(
            images=max((points[-1][0] for points in curves.values() if points), default=0),
            total=total,
            rate=sum(rates) / len(rates) if rates else None,
            curves={name: _thin(points) for name, points in curves.items()},
            grids=sorted((folder / "samples").glob("*.png"), reverse=True)[:MAX_SHOWN],
        )

    def words(self) -> str:
        """Images seen, rate and time left."""
        # The last batch goes beyond the total.
        count = (
            f"{self.images:,} of {max(self.total, self.images):,} images" if self.total else f"{self.images:,} images"
        )
        if not self.rate:
            return count
        left = f", {clock((self.total - self.images) / self.rate)} left" if self.images < self.total else ""
        return f"{count}, {self.rate:,.0f} a second{left}"

    def table(self) -> pd.DataFrame:
        """Finite points of all curves, for a plot."""
        points = [
            (images, loss, name) for name, curve in self.curves.items() for images, loss in curve if math.isfinite(loss)
        ]
        return pd.DataFrame(points, columns=["images", "loss", "curve"])


def _rows(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV of numbers, without a last line that is being written."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    step = math.ceil(len(points) / MAX_POINTS) or 1
    return [*points[-1::-step]][::-1]


def describe(run: Retraining, steps: Sequence[RetrainingStep], line: str, progress: TrainingProgress | None) -> str:
    """Show as HTML how far a retraining is, and at its end the verdict with links to the report and to MLflow."""
    params, parts = run.params, list[str]()
    minutes = params.training.minutes
    # A warm start takes a share of them, which is known once it is decided.
    limit = "at most " if params.may_continue and params.training.init_from is None else ""
    budget = f", {limit}{minutes:g} {'minute' if minutes == 1 else 'minutes'} of training" if minutes else ""
    parts.append(
        f"<p><b>{escape(params.model_name)}</b>: {escape(run.state)}. {params.ingest.size}×{params.ingest.size} "
        f"pixels{budget}</p>"
    )
    if run.is_final:
        parts.append(f"<p class='verdict'>{escape(run.message)}</p>")
    by_name = {step.name: step for step in steps}
    items = []
    for name in STEPS:
        if (step := by_name.get(name)) is None:
            items.append(f"<li>{name}</li>")
            continue
        page = escape(step.page, quote=True)
        text = f"<a href='{page}' target='_blank' rel='noopener'>{name}</a> {escape(step.state)}, {clock(step.seconds)}"
        if step.state in ("Paused", "Suspended"):
            text += f": waits for approval, <a href='{page}' target='_blank' rel='noopener'>answer in Prefect</a>"
        items.append(f"<li class='{escape(step.state.lower(), quote=True)}'>{text}</li>")
    parts.append(f"<ol class='steps'>{''.join(items)}</ol>")
    if progress is not None:
        if progress.total and not run.is_final:
            parts.append(f"<progress value='{progress.images}' max='{progress.total}'></progress>")
        parts.append(f"<p>{escape(progress.words())}</p>")
    if line and (progress is None or [step.state for step in steps if step.name == "train"] != ["Running"]):
        parts.append(f"<p><small>{escape(line)}</small></p>")
    links = {"In Prefect": run.page} | (_links(run) if run.is_final and progress is not None else {})
    parts.append(
        "<p>"
        + " · ".join(
            f"<a href='{escape(page, quote=True)}' target='_blank' rel='noopener'>{name}</a>"
            for name, page in links.items()
            if page
        )
        + "</p>"
    )
    return "".join(parts)


def _links(run: Retraining) -> dict[str, str]:
    """Pages about the result, as far as they are there."""
    links, folder = dict[str, str](), run.params.report_folder
    with suppress(FileNotFoundError):
        written = datetime.fromtimestamp((folder / "report.html").stat().st_mtime, UTC)
        # A later retraining writes its own there.
        if run.begun is not None and run.ended is not None and run.begun <= written <= run.ended:
            links["Report"] = folder.as_posix()
    with suppress(UserError):  # it ended before its first checkpoint
        links["In MLflow"] = run_page(MlflowClient(), find_tracker(run.params).run_id)
    return links


def follow(run_id: str) -> tuple[str, TrainingProgress | None, bool]:
    """Read how far a retraining is: as HTML, the training's progress, and whether it has ended."""
    run, steps, line = retrainings.read_retraining(UUID(run_id))
    progress = TrainingProgress.read(run.params.run_folder, run.begun, run.ended)
    return describe(run, steps, line, progress), progress, run.is_final


def _choices() -> list[tuple[str, str]]:
    return [
        (
            f"{run.params.model_name}, {f'{run.begun:%Y-%m-%d %H:%M} UTC' if run.begun else 'not begun'}, {run.state}",
            str(run.id),
        )
        for run in retrainings.list_retrainings()
    ]


def describe_found(found: FoundImages) -> str:
    """Show what was found as HTML."""
    # As `darkroom init` prints it, without the path of an upload.
    lines = [line.replace(f" in {found.survey.source}", "", 1) for line in found.survey.lines()]
    if found.survey.has_images_below(size := found.survey.proposed_size):
        lines.append(f"small      some have under {size} pixels, and are quarantined at that size")
    cells = ((line[:10].strip(), line[10:].strip()) for line in lines)
    rows = "".join(f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in cells)
    return f"<table class='found'>{rows}</table>"


def describe_name(name: str) -> str:
    """Say whether images are added to a data set of this folder, or become a new one."""
    try:
        folder = dataset_folder(name.strip())
    except UserError as error:
        return escape(str(error))
    if not (folder / "manifest.json").is_file():
        return "A new data set."
    return f"They are added to the {read_manifest(folder).kept:,} images of this data set."


def page(title: str) -> gr.Blocks:
    """Page with the tab alone, for a model that has no champion yet."""
    with gr.Blocks(title=f"Darkroom: {title}", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            f"<h1><b>Darkroom</b> {escape(title)}</h1><p>There is no champion yet: train one here, then start "
            "<code>darkroom ui</code> again.</p>",
            elem_classes="masthead",
        )
        with gr.Tabs():
            tab(blocks)
    return blocks.queue(default_concurrency_limit=4)


def _nothing(html: str) -> tuple[Any, ...]:
    """Values of a page that follows no training, and says why."""
    return html, gr.LinePlot(visible=False), gr.Gallery(None, visible=False), None, gr.Timer(active=False)


def _examine(place: str | None, upload: str | None) -> tuple[Any, ...]:
    """Look at the images, and propose a name and a size for them."""
    with show_errors():
        images = look(place or "", upload)
    proposal = images.survey
    return (
        *(gr.Column(visible=True), describe_found(images), images.thumbnails, proposal.proposed_name),
        *(proposal.proposed_size, images, *[new_token()] * 2),
    )


def _begin(
    images: FoundImages, title: str, pixels: int, budget: float, expected: str | None, sent: str | None
) -> tuple[Any, ...]:
    """Start a retraining, and choose it among those to follow."""
    with show_errors():
        require_token(expected, sent)
        run_id = str(start(images, title, pixels, budget))
        choices = _choices()
    return gr.Column(visible=False), gr.Dropdown(choices, value=run_id, visible=True), gr.Timer(active=True), None, None


def _show_newest(before: Any) -> tuple[Any, ...]:
    """List the retrainings, and show how far the newest is."""
    try:
        choices = _choices()
    except UserError as error:
        return gr.Dropdown([], value=None, visible=False), *_nothing(f"<p class='problem'>{escape(str(error))}</p>")
    run_id = choices[0][1] if choices else None
    return gr.Dropdown(choices, value=run_id, visible=bool(choices)), *_show_progress(run_id, before)


def _show_progress(run_id: str | None, before: Any) -> tuple[Any, ...]:
    """Show how far a retraining is; grids only if they are others than those ``before``."""
    if run_id is None:
        return _nothing("<p>No training yet.</p>")
    try:
        html, progress, is_final = follow(run_id)
    except UserError as error:
        # In the page, as it is asked again and again until Prefect answers.
        return f"<p class='problem'>{escape(str(error))}</p>", *[gr.skip()] * 4
    files = progress.grids if progress else []
    now = [run_id, *map(str, files)]
    captions = [(str(path), f"{int(path.stem):,} images") for path in files]
    return (
        html,
        gr.LinePlot(progress.table() if progress else None, visible=progress is not None),
        gr.skip() if now == before else gr.Gallery(captions, visible=bool(files)),
        now,
        gr.Timer(active=not is_final),
    )


def tab(blocks: gr.Blocks | None = None) -> None:
    """Add the tab that trains; it is filled when it is opened, or with the page ``blocks``."""
    with gr.Tab("Train") as tab_page, gr.Row():
        with gr.Column(scale=2, min_width=300):
            folder = gr.Dropdown(list_folders(), value="", label="Folder on the server", allow_custom_value=True)
            archive = gr.File(label="Or a zip of images", file_types=[".zip"], height=140)
            look_button = gr.Button("Look at the images")
            with gr.Column(visible=False) as plan:
                found_html = gr.HTML()
                thumbnails = gr.Gallery(
                    show_label=False, columns=4, height="auto", buttons=[], interactive=False, elem_classes="tight"
                )
                name = gr.Textbox(label="Name of the data set and model", max_length=100)
                name_note = gr.HTML()
                with gr.Row():
                    size = gr.Number(SIZES[0], label="Size in pixels", precision=0, minimum=4, min_width=110)
                    minutes = gr.Number(
                        DEFAULT_MINUTES, label="Minutes of training", minimum=1, maximum=MAX_MINUTES, min_width=110
                    )
                start_button = gr.Button("Start training", variant="primary")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                runs = gr.Dropdown([], label="Trainings", min_width=260, visible=False)
                refresh_button = gr.Button("Refresh", size="sm", scale=0, min_width=110, elem_classes="beside")
            status = gr.HTML()
            plot = gr.LinePlot(x="images", y="loss", color="curve", height=260, visible=False, buttons=[])
            grids = gr.Gallery(
                label="Samples as it learns",
                columns=2,
                height="auto",
                object_fit="contain",
                visible=False,
                buttons=[],
                elem_classes=["tight", "learned"],
            )
        found, shown, expected_token = gr.State(), gr.State(), gr.State()
        token, timer = gr.Textbox(visible=False), gr.Timer(POLL_SECONDS, active=False)

    tokens, view = [expected_token, token], [status, plot, grids, shown, timer]
    look_button.click(
        _examine,
        [folder, archive],
        [plan, found_html, thumbnails, name, size, found, *tokens],
        api_visibility="private",
        concurrency_limit=1,
    )
    name.change(describe_name, name, name_note, **PLAIN)
    # Prefect may take a while to answer.
    waiting = PLAIN | {"show_progress": "full", "show_progress_on": status}
    begun = start_button.click(_begin, [found, name, size, minutes, *tokens], [plan, runs, timer, *tokens], **waiting)
    begun.success(_show_progress, [runs, shown], view, **PLAIN)
    for event in (tab_page.select if blocks is None else blocks.load, refresh_button.click):
        event(_show_newest, shown, [runs, *view], **PLAIN)
    runs.input(_show_progress, [runs, shown], view, **PLAIN)
    timer.tick(_show_progress, [runs, shown], view, concurrency_limit=2, **PLAIN)
