"""The results of a tab: the images of a batch, one of them large with what made it, and what can be done with it."""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffusion.generation.config import Task
from diffusion.generation.requests import tasks_of
from flows.studio.errors import show_errors
from flows.studio.source import FILES, GeneratedImages, StudioSource, make_progress_callback
from flows.studio.uploads import memory_returned

MAX_BATCHES = 12
"""Maximum number of batches that a page keeps."""
VARIATION = 0.5
"""Strength of a variation: what the image shows is kept, and how it looks changes."""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Options of events that generate: a second generation would slow down the first and double its memory."""
BAR = gr.Progress()
"""Default of a handler's argument, for which Gradio gives it a bar of its own."""
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
INSTANT: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
TO_RESULTS = """() => {
  const results = [...document.querySelectorAll('.results')].find(each => each.offsetParent);
  const top = results ? results.getBoundingClientRect().top : 0;
  if (top < 0 || top > innerHeight * 0.6) results.scrollIntoView({behavior: 'smooth'});
  return [];
}"""
"""On a phone, where the results stand between prompt and options, they are often outside of the screen."""

GalleryItem = tuple[Path | Image.Image, str]


def pixels_class(source: StudioSource) -> str:
    """CSS class of images: the pixels of small ones stay squares when they are enlarged."""
    return "pixels" if source.model.header.size <= 128 else "smooth"


class PageGenerator:
    """Generation for the pages' requests, each of which its page can stop."""

    def __init__(self, current: Callable[[], StudioSource]) -> None:
        self.current = current
        self._stops: dict[str, threading.Event] = {}

    def __call__(
        self, fields: Mapping[str, Any], request: gr.Request, bar: gr.Progress, source: StudioSource | None = None
    ) -> GeneratedImages:
        """Generate the images of a page's request with the ``source``, by default the current one."""
        session, stop = request.session_hash or "", threading.Event()
        self._stops[session] = stop
        try:
            return (source or self.current()).generate(fields, make_progress_callback(bar), stop.is_set)
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    def stop(self, request: gr.Request) -> None:
        """Stop what is being generated for a page, if anything is."""
        if (stop := self._stops.get(request.session_hash or "")) is not None:
            stop.set()


class Results:
    """Components of the results of a ``task``, with a hint in the place of the first ones."""

    def __init__(self, source: StudioSource, task: Task, hint: str) -> None:
        style: dict[str, Any] = {"format": "png", "elem_classes": [pixels_class(source), "tight"]}
        tasks = tasks_of(source.model)
        self.task, self.hint = task, hint
        self.history, self.position = gr.State([]), gr.State((0, 0))
        self.heading = gr.HTML(heading_html(None, hint), elem_classes="heading")
        grid: dict[str, Any] = style | {
            "columns": 6,
            "fit_columns": False,
            "object_fit": "contain",
            "height": "auto",
            "allow_preview": False,
            "interactive": False,
            "show_label": False,
            "buttons": [],
        }
        with gr.Column(visible=False) as self.panel:
            self.gallery = gr.Gallery(**grid | {"elem_classes": [*style["elem_classes"], "images"]})
            with gr.Row(elem_classes="detail"):
                self.image = gr.Image(
                    show_label=False, interactive=False, height=320, min_width=120, buttons=["fullscreen"], **style
                )
                with gr.Column(min_width=120, elem_classes="facts"):
                    self.facts = gr.HTML()
                    with gr.Row(elem_classes="actions"):
                        small: dict[str, Any] = {"size": "sm", "min_width": 80}
                        self.again = gr.Button("Again", **small)
                        # Made only where the model can do it: a button without effect is worse than none.
                        self.vary = gr.Button("Vary", **small) if "img2img" in tasks else None
                        self.inpaint = gr.Button("Inpaint", **small) if "inpaint" in tasks else None
                        self.download = gr.DownloadButton("Download with metadata", size="sm", min_width=180)
            with gr.Column(visible=False) as self.earlier_panel:
                gr.HTML("<h3>Earlier</h3>")
                self.earlier = gr.Gallery(**grid | {"elem_classes": [*style["elem_classes"], "earlier"]})
        self.outputs = [
            *(self.gallery, self.heading, self.history, self.position, self.image, self.facts, self.download),
            *(self.panel, self.earlier, self.earlier_panel),
        ]

    def show(self, history: Sequence[GeneratedImages], number: int = 0, image: int = 0) -> list[Any]:
        """Values of the outputs that show an ``image`` of batch ``number``, the newest being 0."""
        batch = history[number]
        others = [item for item in history if item is not batch]
        earlier = [(item.paths[0], item.title or item.texts[0] or f"seed {item.seed}") for item in others]
        return [
            [(path, text) for path, text in zip(batch.paths, captions(batch), strict=True)],
            heading_html(batch, self.hint),
            list(history),
            (number, image),
            *self.show_image(batch, image),
            gr.Column(visible=True),
            earlier,
            gr.Column(visible=bool(others)),
        ]

    def show_image(self, batch: GeneratedImages, number: int) -> list[Any]:
        """Values of large image, facts and download for an image of a batch."""
        path = batch.paths[number]
        return [path, facts_html(batch, number), gr.DownloadButton(value=path)]

    def wire(self, generate: PageGenerator, start: "StartButton", form: Mapping[str, Any]) -> None:
        """Connect the buttons; the ``form`` has the controls that a click on an example fills in."""
        place = [self.history, self.position]

        def select(history: list[GeneratedImages], position: tuple[int, int], event: gr.SelectData) -> list[Any]:
            # By its number in the list kept here: a path from the browser could name any file.
            batch = history[position[0]]
            number = int(event.index)
            fields = batch.fields_of(number) if batch.title else {}
            texts = [fields.get(name, gr.skip()) for name in form_texts]
            return [(position[0], number), *self.show_image(batch, number), *texts]

        def select_batch(history: list[GeneratedImages], position: tuple[int, int], event: gr.SelectData) -> list[Any]:
            others = [number for number in range(len(history)) if number != position[0]]
            return self.show(history, others[event.index])

        def again(
            history: list[GeneratedImages], position: tuple[int, int], request: gr.Request, bar: gr.Progress = BAR
        ) -> list[Any]:
            seed = secrets.randbelow(2**32)
            fields = history[position[0]].fields_of(position[1]) | {"seed": seed}
            if self.task == "interpolate":
                fields["to_seed"] = secrets.randbelow(2**32)
            return [*self._add(generate, fields, history, request, bar), seed]

        def vary(
            history: list[GeneratedImages], position: tuple[int, int], request: gr.Request, bar: gr.Progress = BAR
        ) -> list[Any]:
            batch, number = history[position[0]], position[1]
            names = ("prompt", "label", "negative_prompt", "guidance", "steps", "sampler", "count")
            fields = {name: value for name, value in batch.fields_of(number).items() if name in names}
            if label := batch.labels[number]:
                fields["label"] = label
            fields |= {"task": "img2img", "strength": VARIATION, "image": batch.paths[number]}
            return self._add(generate, fields | {"seed": secrets.randbelow(2**32)}, history, request, bar)

        form_texts = [name for name in ("prompt", "label") if name in form]
        texts = [form[name] for name in form_texts]
        chosen = [self.position, self.image, self.facts, self.download]
        self.gallery.select(select, place, [*chosen, *texts], **INSTANT)
        self.earlier.select(select_batch, place, self.outputs, **INSTANT)
        start.chain([self.again.click], again, place, [*self.outputs, form["seed"]], self.heading)
        if self.vary is not None:
            start.chain([self.vary.click], vary, place, self.outputs, self.heading)

    def _add(
        self,
        generate: PageGenerator,
        fields: dict[str, Any],
        history: list[GeneratedImages],
        request: gr.Request,
        bar: gr.Progress,
    ) -> list[Any]:
        """Generate the images of a request, whose files are paths, and show them before ``history``."""
        files = {name: fields[name].read_bytes() for name in FILES if name in fields}
        with show_errors(), memory_returned() if files else nullcontext():
            batch = generate({"task": self.task} | fields | files, request, bar)
        return self.show([batch, *history][:MAX_BATCHES])


class StartButton:
    """Button that starts a generation, and while it runs is one that stops it."""

    def __init__(self, title: str, generate: PageGenerator) -> None:
        self.start = gr.Button(title, variant="primary", size="lg", elem_classes="start")
        self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_classes="start")
        self.generate, self.runs = generate, list[Any]()

    def chain(
        self,
        triggers: list[Any],
        run: Any,
        inputs: Any,
        outputs: list[Any],
        progress_on: Any,
        api_name: str | None = None,
    ) -> None:
        """Run an event handler after any of the ``triggers``, with the stop button in the place of this one."""
        buttons = [self.start, self.stop]
        api: dict[str, Any] = PRIVATE if api_name is None else {"api_name": api_name}
        begin = gr.on(triggers, lambda: _swap(False), None, buttons, js=TO_RESULTS, **INSTANT)
        event = begin.then(run, inputs, outputs, show_progress_on=progress_on, **ONE_AT_A_TIME, **api)
        # What was selected was an image of the batch before.
        event.then(lambda: (*_swap(True), gr.Gallery(selected_index=None)), None, [*buttons, outputs[0]], **INSTANT)
        # After an error ``then`` is not run.
        event.failure(lambda: _swap(True), None, buttons, **INSTANT)
        self.runs.append(event)

    def wire(self) -> None:
        """Connect the stop button, after all events that it stops."""

        def stop(request: gr.Request) -> tuple[Any, Any]:
            self.generate.stop(request)
            return _swap(True)

        self.stop.click(stop, None, [self.start, self.stop], cancels=self.runs, **INSTANT)


def _swap(is_idle: bool) -> tuple[Any, Any]:
    return gr.Button(visible=is_idle), gr.Button(visible=not is_idle)


def captions(batch: GeneratedImages) -> list[str]:
    """Caption of each image: its prompt or class where they differ, or else its number."""
    if len({*batch.texts}) > 1:
        return batch.texts
    return [str(batch.first_index + number) for number in range(len(batch.paths))]


def heading_html(batch: GeneratedImages | None, hint: str) -> str:
    """Title of the results, and how they were made; without any the ``hint``."""
    if batch is None:
        return f"<div class='empty'>{escape(hint)}</div>"
    texts = {*batch.texts}
    title = batch.title or ("Any class" if len(texts) > 1 else next(iter(texts))) or "Results"
    word = "prompt" if any(batch.prompts) else "class"
    hint = f" Click one to use its {word}." if batch.title and len(texts) > 1 else ""
    return f"<h2>{escape(title)}</h2><p>{escape(batch.note)}.{hint}</p>"


def facts_html(batch: GeneratedImages, number: int) -> str:
    """What made an image: prompt and class, seed and number, and where the rest is recorded."""
    text = batch.texts[number]
    prompt = f"<p class='prompt'>{escape(text)}</p>" if text else ""
    rows = {"Seed": batch.seed}
    rows |= {"To seed": batch.fields["to_seed"]} if "to_seed" in batch.fields else {}
    rows |= {"Image": batch.first_index + number}
    rows |= {"Strength": batch.fields["strength"]} if "strength" in batch.fields else {}
    rows |= {"Negative": batch.fields["negative_prompt"]} if "negative_prompt" in batch.fields else {}
    items = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f"{prompt}<dl>{items}</dl>"
