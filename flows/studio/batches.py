"""Tab that shows the sampling batches on S3, and of each image the chain of records back to its training images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from html import escape
from itertools import islice
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from diffusion.common.config import dataset_folder
from diffusion.common.errors import UserError
from diffusion.common.image_grids import to_pil_image
from diffusion.data.dataset import Dataset
from diffusion.evaluation.metrics.registration import describe_images, find_registered
from flows.environment import settings
from flows.provenance.trace import Trace, trace
from flows.sampling.batch_format import BATCH, MAX_BATCH_BYTES, SUCCESS, Row, SamplingBatch, parse_batch
from flows.sampling.lookup import find, read_image, read_pixels, read_rows
from flows.storage.s3 import Location, Store, batch_places
from flows.storage.s3_errors import MissingObjectError
from flows.studio.errors import show_errors
from flows.studio.results import GalleryItem

logger = logging.getLogger(__name__)

PAGE = 24
"""Images on a page of the gallery."""
MAX_LISTED_BATCHES = 1000
"""Maximum number of batches that are listed: each costs three requests."""
MAX_COMPARED_IMAGES = 10_000
"""Maximum number of training images among which the nearest are searched: about a second per thousand."""
NEAREST = 8


@dataclass(frozen=True)
class ListedBatch:
    """Sampling batch at its usual place on S3."""

    batch: SamplingBatch
    place: Location
    written: datetime
    """When it was finished, or else begun."""
    finished: bool

    @property
    def title(self) -> str:
        """Model version and name of the batch."""
        suffix = "" if self.finished else " (unfinished)"
        return f"{self.batch.model}/{self.batch.version} {self.place.prefix.rpartition('/')[2]}{suffix}"

    @property
    def summary(self) -> str:
        """What tells it from others, short enough for a list on a phone."""
        suffix = "" if self.finished else ", unfinished"
        return f"{self.batch.model}/{self.batch.version}, seed {self.batch.seed}, {self.batch.count:,} images{suffix}"


def list_batches(store: Store, bucket: str) -> list[ListedBatch]:
    """List the sampling batches in ``bucket``, newest first, as ``batch_places`` finds them."""
    places = islice(batch_places(store, bucket), MAX_LISTED_BATCHES)

    def read(place: Location) -> ListedBatch | None:
        try:
            batch = parse_batch(store.get(bucket, place.key(BATCH), MAX_BATCH_BYTES), f"{place}/{BATCH}")
        except MissingObjectError:
            return None
        except UserError as error:  # an unreadable batch does not hide the others
            logger.warning("%s", error)
            return None
        success, start = store.stat(bucket, place.key(SUCCESS)), store.stat(bucket, place.key(BATCH))
        entry = success or start
        return entry and ListedBatch(batch, place, entry.written, success is not None)

    with ThreadPoolExecutor(16) as pool:
        batches = [listed_batch for listed_batch in pool.map(read, places) if listed_batch is not None]
    return sorted(batches, key=lambda listed_batch: listed_batch.written, reverse=True)


def select_batches(
    batches: Sequence[ListedBatch], model: str | None = None, version: int | None = None, title: str | None = None
) -> list[ListedBatch]:
    """Batches of a model, of a version, or with a title; None: of all."""
    return [
        entry
        for entry in batches
        if model in (None, entry.batch.model)
        and version in (None, entry.batch.version)
        and title in (None, entry.title)
    ]


def matching_rows(store: Store, batches: Sequence[ListedBatch], text: str = "") -> Iterator[tuple[ListedBatch, Row]]:
    """Yield the images whose class or prompt contains ``text``, without case, read a part of a manifest at a time."""
    query = text.strip().casefold()
    for entry in batches:
        for chunk in range(len(entry.batch.chunks())):
            try:
                rows = read_rows(store, entry.place, entry.batch, chunk)
            except MissingObjectError:  # not generated yet
                continue
            for row in rows:
                if query in f"{row.get('label') or ''}\n{row.get('prompt') or ''}".casefold():
                    yield entry, row


def load_page(
    store: Store, batches: Sequence[ListedBatch], text: str, page: int
) -> tuple[list[GalleryItem], list[str], bool]:
    """Images of a page, counted from 1, with captions, their S3 addresses, and whether it is the last page."""
    found = list(islice(matching_rows(store, batches, text), (page - 1) * PAGE, page * PAGE + 1))
    rows = found[:PAGE]

    def load(pair: tuple[ListedBatch, Row]) -> Image.Image | None:
        entry, row = pair
        try:
            pixels = read_pixels(read_image(store, entry.place, entry.batch, row["index"], row))
        except MissingObjectError:
            return None
        return None if pixels is None else Image.fromarray(pixels)

    items: list[GalleryItem] = []
    addresses = []
    with ThreadPoolExecutor(16) as pool:
        for (entry, row), image in zip(rows, pool.map(load, rows), strict=True):
            if image is not None:
                # Numbers of several batches are told apart by the batch.
                place = f"{entry.title} " if batches[1:] else ""
                description = " ".join(filter(None, [row.get("label"), row.get("prompt")]))
                items.append((image, f"{place}{row['index']}{': ' if description else ''}{description}"))
                addresses.append(f"{entry.place}/{row['key']}")
    return items, addresses, len(found) == len(rows)


def lineage(chain: Trace) -> str:
    """Show the chain of records of an image as HTML, from the image down to the shards."""
    links: list[tuple[str, list[str]]] = []
    if image := chain.image:
        states = {True: "as generated", False: "altered since", None: "not on record"}
        conditions = [f"{name} {text}" for name, text in (("class", image.label), ("prompt", image.prompt)) if text]
        lines = [image.where, f"image {image.index} of seed {image.seed}, {states[image.as_generated]}", *conditions]
        links.append(("Image", [*lines, f"sha256 {image.sha256[:16]}…"]))
    if batch := chain.batch:
        sampling = f"{batch.sampling.sampler}, {batch.sampling.steps} steps"
        links.append(("Batch", [f"{batch.count:,} images of seed {batch.seed}, {sampling}", f"{chain.place}"]))
    if model := chain.model:
        aliases = " ".join(f"@{alias}" for alias in model.aliases)
        links.append(("Model", [f"{model.uri} {aliases}", f"registered {model.registered:%Y-%m-%d %H:%M} UTC"]))
    if run := chain.run:
        git = f"git commit {run.git_commit[:12]}" if run.git_commit else "outside of a git repository"
        links.append(("Run", [f"{run.name}, {run.started:%Y-%m-%d %H:%M} UTC", run.run_id, git]))
    if data := chain.data:
        links.append(("Data set", [f"{data.dataset}, {data.images:,} images", f"version {data.version[:16]}…"]))
    for takedown in chain.takedowns:
        links.append(("Takedown", [takedown.name, *filter(None, [takedown.reason])]))
    html = "".join(
        f"<li><b>{title}</b><span>{'<br>'.join(escape(line) for line in lines)}</span></li>" for title, lines in links
    )
    if data := chain.data:
        shards = "".join(
            f"<li>{escape(shard.name)}, {shard.bytes:,} bytes<br>{escape(shard.where or 'lost')}"
            f"<br>sha256 {shard.sha256}</li>"
            for shard in data.shards
        )
        count = f"{len(data.shards):,} shards" if data.shards[1:] else "1 shard"
        html += f"<li><b>Shards</b><details><summary>{count}</summary><ul>{shards}</ul></details></li>"
    problems = "".join(f"<p class='problem'>{escape(problem)}</p>" for problem in chain.broken)
    return f"<ol class='chain'>{html}</ol>{problems}"


def nearest_training_images(pixels: np.ndarray, chain: Trace) -> tuple[list[GalleryItem], str]:
    """Find the training images nearest to an image, (H, W) or (H, W, 3) uint8, after registration.

    Returns them with their distances, if the data set is in this workspace, and words on what was compared.
    """
    if chain.data is None:
        return [], "The data set is not known, so there are no nearest training images."
    name, folder = chain.data.dataset, dataset_folder(chain.data.dataset)
    if not (folder / "manifest.json").is_file():
        return [], f"Nearest training images: the data set {name} is not in this workspace (`darkroom data checkout`)."
    dataset = Dataset.open(folder)
    try:
        rows = dataset.rows("train")[:MAX_COMPARED_IMAGES]
        image = torch.from_numpy(np.array(pixels)).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)[None]
        if image.shape[1] != dataset.shape[0]:
            return [], f"The data set {name} has other channels here now."
        pieces = (dataset.images_in_order(rows[start : start + 1000]) for start in range(0, len(rows), 1000))
        neighbours = find_registered(
            [image], map(describe_images, pieces), lambda numbers: dataset.images_in_order(rows[numbers])
        )
        numbers = neighbours.rows[0, :NEAREST].numpy()
        items: list[GalleryItem] = [
            (to_pil_image(neighbour), f"{distance:.2f} {label or ''}")
            for neighbour, distance, label in zip(
                dataset.images_in_order(rows[numbers]),
                neighbours.distances[0, :NEAREST].tolist(),
                dataset.labels(rows[numbers]),
                strict=True,
            )
        ]
        message = f"Nearest of {len(rows):,} training images, with distances after registration (0: equal, 1: unlike)"
        if dataset.manifest.content_digest != chain.data.content_digest:
            message += ", of another version of the data set than the model was trained on"
        return items, message
    finally:
        dataset.close()


def tab(model: str) -> None:
    """Add the tab, which begins with the newest batch of ``model``."""
    style: dict[str, Any] = {
        **{"format": "png", "object_fit": "contain", "height": "auto", "elem_classes": ["pixels", "tight"]},
        **dict.fromkeys(("interactive", "allow_preview", "fit_columns", "show_label"), False),
        "buttons": [],
    }
    with gr.Tab("Batches") as page:
        batches, addresses, number = gr.State([]), gr.State([]), gr.State(1)
        with gr.Row(elem_classes="filters"):
            models = gr.Dropdown([], label="Model", min_width=130, visible=False)
            versions = gr.Dropdown([], label="Version", min_width=110, visible=False)
            names = gr.Dropdown([], label="Batch", min_width=260, scale=2, visible=False)
            text = gr.Textbox(label="Class or prompt contains", min_width=160, visible=False)
            refresh_button = gr.Button("Refresh", size="sm", min_width=90, scale=0, elem_classes="beside")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                heading = gr.HTML(elem_classes="heading")
                gallery = gr.Gallery(columns=6, elem_id="batch-images", visible=False, **style)
                with gr.Row():
                    back_button = gr.Button("Previous page", size="sm", min_width=110, visible=False)
                    next_button = gr.Button("Next page", size="sm", min_width=110, visible=False)
            with gr.Column(scale=2, min_width=300):
                chain, message = gr.HTML(), gr.Markdown()
                nearest = gr.Gallery(columns=4, visible=False, **style)
    filters = [models, versions, names, text]
    images = [gallery, heading, addresses, number, back_button, next_button, chain, message, nearest]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    show = partial(_show_page, model)
    for control in (models, versions):
        update = control.input(_narrow, [batches, models, versions], [versions, names], **private)
        update.then(partial(show, page_number=1), [batches, *filters], images, **private)
    for event in (names.input, text.submit):
        event(partial(show, page_number=1), [batches, *filters], images, **private)
    for button, move in ((back_button, -1), (next_button, 1)):
        button.click(partial(_turn, show, move), [batches, *filters, number], images, **private)
    for event in (page.select, refresh_button.click):
        event(partial(_refresh, model), None, [batches, *filters, *images], **private)
    gallery.select(_select, addresses, [chain, message, nearest], **private)


def _refresh(model: str) -> list[Any]:
    """List the batches anew, and show the first page of the newest one of ``model``."""
    with show_errors():
        entries = list_batches(Store(), settings().bucket)
    model_names = sorted({entry.batch.model for entry in entries})
    name = model if model in model_names else ""
    of_model = select_batches(entries, name or None)
    return [
        entries,
        gr.Dropdown([("all", ""), *model_names], value=name, visible=len(model_names) > 1),
        *_narrow(entries, name, ""),
        gr.Textbox("", visible=bool(entries)),
        *_show_page(model, entries, name, "", of_model[0].title if of_model else "", "", 1),
    ]


def _narrow(entries: list[ListedBatch], name: str, version: str) -> list[Any]:
    """Offer the versions of the chosen model, and the batches of the chosen version."""
    of_model = select_batches(entries, name or None)
    numbers = [str(number) for number in sorted({entry.batch.version for entry in of_model}, reverse=True)]
    current = version if version in numbers else ""
    listed = select_batches(of_model, version=int(current) if current else None)
    choices = [(entry.summary, entry.title) for entry in listed]
    choices += [("all", "")] if listed[1:] else []
    return [
        gr.Dropdown([("all", ""), *numbers], value=current, visible=len(numbers) > 1),
        gr.Dropdown(choices, value=listed[0].title if listed else "", visible=bool(listed)),
    ]


def _show_page(
    model: str, entries: list[ListedBatch], name: str, version: str, title: str, query: str, page_number: int
) -> tuple[Any, ...]:
    """Show a page of the images that the filters select."""
    with show_errors():
        selection = select_batches(entries, name or None, int(version) if version else None, title or None)
        items, places, is_last = load_page(Store(), selection, query, page_number)
    start = (page_number - 1) * PAGE
    return (
        gr.Gallery(items, selected_index=None, visible=bool(items)),
        describe_page(model, selection, query, range(start, start + len(items))),
        places,
        page_number,
        gr.Button(visible=page_number > 1),
        gr.Button(visible=not is_last),
        "<p>Click an image to see where it comes from.</p>" if items else "",
        "",
        gr.Gallery(visible=False),
    )


def _select(places: list[str], event: gr.SelectData) -> tuple[Any, ...]:
    """Show where an image comes from, and the training images nearest to it."""
    with show_errors():
        chain, location = trace(places[event.index]), find(places[event.index], Store(), settings().bucket)
        pixels = read_pixels(location.image.png) if location.image else None
        if pixels is None:
            return lineage(chain), "", gr.Gallery(visible=False)
        items, message = nearest_training_images(pixels, chain)
    return lineage(chain), message, gr.Gallery(items, visible=bool(items))


def _turn(show: Callable[..., tuple[Any, ...]], move: int, *arguments: Any) -> tuple[Any, ...]:
    *filters, number = arguments
    return show(*filters, number + move)


def describe_page(model: str, batches: Sequence[ListedBatch], query: str, shown: range) -> str:
    """Describe the page of images ``shown`` of ``batches`` as HTML; if there are none, how to get some."""
    if not batches:
        command = f"darkroom sample --model models:/{model}@champion --count 100"
        return f"<div class='empty'>There are no batches yet: <code>{escape(command)}</code> makes one.</div>"
    first = batches[0]
    title = f"{len(batches)} batches" if batches[1:] else first.title
    made = "" if batches[1:] else f" of seed {first.batch.seed}, {first.written:%Y-%m-%d %H:%M} UTC"
    count = f"{sum(entry.batch.count for entry in batches):,} images{made}"
    where = "no image"
    if shown:
        # A whole batch shows its images by their numbers, which begin at 0.
        is_numbered = not batches[1:] and not query.strip()
        low, high = shown.start, shown.stop - 1
        where = f"images {low} to {high}" if is_numbered else f"{low + 1} to {high + 1} of those"
    page = f"{where} with {query.strip()!r}" if query.strip() else where
    return f"<h2>{escape(title)}</h2><p>{escape(count)}: {escape(page)}</p>"
