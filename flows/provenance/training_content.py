"""Public summary of the content that a model was trained on, in the form of the template of the EU's AI Office.

The template of 24 July 2025 is for providers of general-purpose models, under Article 53(1)(d) of Regulation (EU)
2024/1689. Records fill in what they know: data set, sources, sizes, licences, captioners, takedowns, base models. The
rest is marked for a person, with the question of the template.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from diffusion.checkpoints import find_base, read_model_header
from diffusion.common.escaping import escape_markdown, pluralize
from diffusion.data.manifest import Manifest
from diffusion.families.header import ModelHeader

TO_FILL_IN = "**To be filled in by the provider**"
"""Mark of what no record says."""
UNKNOWN = "unknown here"
"""Value where the data set is not on this machine."""
REFERENCE = "https://digital-strategy.ec.europa.eu/en/library/explanatory-notice-and-template-public-summary-training-content-general-purpose-ai-models"
SIZES = ((10**6, "less than 1 million images"), (10**9, "1 million to 1 billion images"))
"""Ranges of the template for images, by the number that is too large for them; above them, more."""
PUBLIC = "hf://"
"""Beginning of the names of public sources that are recorded."""


def summarize_training_content(
    weights: Path,
    data: Manifest | None,
    version: str | None = None,
    takedowns: str | None = None,
    ancestors: Sequence[str] = (),
) -> str:
    """Write the summary in Markdown.

    Args:
        weights: The model file, with those that it is based on beside it.
        data: Manifest of the data set that it was trained on; None: unknown here.
        version: The registered version, models:/NAME/NUMBER; None: a file.
        takedowns: Names of takedowns, since its training, of images that it learned from; None: none.
        ancestors: Registered models that it was made from, in words; its bases may be among them.
    """
    header = read_model_header(weights)
    data = data if header.images else None
    sections = {
        "1. General information": _general(weights, header, data, version, ancestors),
        "2. List of data sources": _sources(header, data),
        "3. Aspects of data processing": _processing(data, takedowns),
    }
    lines = [
        f"# Public summary of training content: {escape_markdown(version or header.dataset)}",
        "",
        f"In the form of the [template of the European Commission's AI Office]({REFERENCE}). Darkroom filled in what "
        f"its records say; {sum(TO_FILL_IN in text for rows in sections.values() for text in rows.values())} entries "
        f"are marked: {TO_FILL_IN}.",
    ]
    for title, rows in sections.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    return "\n".join(lines) + "\n"


def _general(
    weights: Path, header: ModelHeader, data: Manifest | None, version: str | None, ancestors: Sequence[str]
) -> Mapping[str, str]:
    bases = list(_bases(weights))
    names = {base.partition(",")[0] for base in bases}
    bases += [f"{text}, whose own summary applies" for text in ancestors if text.partition(",")[0] not in names]
    images, modality = UNKNOWN, "image"
    if data is not None:
        count = data.counts["train"]
        size = next((text for limit, text in SIZES if count < limit), "more than 1 billion images")
        images = f"{size} ({pluralize(count, 'image')} to train on, {data.counts['held_out']:,} held out)"
        images += ", besides the data of the models that it is based on" if bases else ""
    if header.encoder is not None or getattr(header.model, "text", False):
        modality = "image, and text as captions of images"
    return {
        "Provider, authorised representative and contact": TO_FILL_IN,
        "Model": escape_markdown(version or f"{header.dataset}, a model file that is not registered"),
        "Models that it is based on": ", ".join(map(escape_markdown, bases)) or "none",
        "Date of placement on the market of the Union": TO_FILL_IN,
        "Modalities": modality,
        "Size of the training data": images,
        "Types of content": f"images of {header.pixels} pixels{_classes(header)}; in words: {TO_FILL_IN}",
        "Latest date of acquisition of data": TO_FILL_IN,
        "Languages of captions": TO_FILL_IN if "text" in modality else "none",
        "Other characteristics": f"content SHA-256 `{header.content_digest}`, {header.images:,} images seen",
    }


def _classes(header: ModelHeader) -> str:
    count = len(header.class_histogram)
    return f", of {count:,} classes" if count > 1 else ""


def _bases(weights: Path) -> Iterator[str]:
    header = read_model_header(weights)
    if header.origin is not None and header.base is None:
        yield f"{header.origin.source}, licence {header.origin.licence or 'unknown'}, whose own summary applies"
    while header.base is not None:
        base, weights = header.base, find_base(weights, header.base)
        header = read_model_header(weights)
        source = header.origin.source if header.origin is not None else header.dataset
        licence = header.origin.licence if header.origin is not None else None
        yield f"{base.version or source}, licence {licence or 'unknown'}, whose own summary applies"


def _sources(header: ModelHeader, data: Manifest | None) -> Mapping[str, str]:
    """List the sources: those with public names, and what is left for a person to sort."""
    public = [source for source in data.sources if source.startswith(PUBLIC)] if data is not None else []
    others = [source for source in data.sources if source not in public] if data is not None else []
    unnamed = sum(1 for part in data.parts if part.source is None and part.shard is not None) if data is not None else 0
    name = f"data set {escape_markdown(header.dataset)}"
    licence = escape_markdown(data.licence) if data is not None and data.licence else TO_FILL_IN
    rest = f"{name} has {pluralize(unnamed, 'part')} from folders or archives without a public name: {TO_FILL_IN}"
    synthetic, none = "no captions by a machine are recorded", "none recorded"
    if data is None:
        rest, synthetic, none = TO_FILL_IN, f"captions by a machine: {UNKNOWN}", UNKNOWN
    elif data.captioners:
        synthetic = "captions by " + ", ".join(
            f"{escape_markdown(who)} ({count:,})" for who, count in data.captioners.items()
        )
    return {
        "2.1 Publicly available data sets": ", ".join(f"`{source}`" for source in public) or none,
        "2.2 Private data sets of third parties": rest if unnamed or others or data is None else none,
        "2.3 Data crawled and scraped": f"crawlers, period, and domains: {TO_FILL_IN}",
        "2.4 Data of users": TO_FILL_IN,
        "2.5 Synthetic data": f"{synthetic}; generated images: {TO_FILL_IN}",
        "2.6 Other sources": ", ".join(map(escape_markdown, others)) or none,
        "Licence of the images": licence,
    }


def _processing(data: Manifest | None, takedowns: str | None) -> Mapping[str, str]:
    outcomes: Counter[str] = Counter()
    for part in data.parts if data is not None else ():
        outcomes.update(part.outcomes)
    removed = f"{pluralize(outcomes['removed'], 'image')} taken down before training" if data is not None else UNKNOWN
    since = escape_markdown(takedowns) if takedowns else "none recorded"
    left_out = [f"{outcomes[name]:,} {name}" for name in ("duplicate", "quarantined", "dropped") if outcomes[name]]
    return {
        "3.1 Reservations of rights (Article 4(3) of Directive (EU) 2019/790)": _reservations(data),
        "Takedowns": f"{removed}; since: {since}",
        "3.2 Removal of illegal content": f"measures: {TO_FILL_IN}; left out by rules and checks: "
        f"{', '.join(left_out) or (UNKNOWN if data is None else 'nothing')}",
        "3.3 Other": "resized, stored without loss, a share held out by content",
    }


def _reservations(data: Manifest | None) -> str:
    if data is None:
        return f"{UNKNOWN}; measures before collection: {TO_FILL_IN}"
    return f"measures before collection: {TO_FILL_IN}"
