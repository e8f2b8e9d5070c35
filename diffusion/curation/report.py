"""Self-contained page on which thresholds of curation are chosen: histograms with sliders, thumbnails and groups."""

import io
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from diffusion.common.config import Config
from diffusion.common.escaping import escape_controls
from diffusion.common.files import make_folder, write_bytes
from diffusion.common.progress import Progress, ignore_progress
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import Decision, Grouping, decide, images_of
from diffusion.curation.measures import Measurements, measure
from diffusion.curation.rules import RULES, Rule
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.staging import RemoteDataset
from diffusion.data.manifest import read_manifest, require_whole, work_folder
from diffusion.data.versions.image_lists import read_lists
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.reports.html import render

STEPS = 400
"""Positions of a slider."""
BINS = 48
"""Bars of a histogram."""
THUMBNAILS = 64
"""Images of a measure that the page has, of which the nearest to the threshold are shown."""
GROUPS, MEMBERS = 24, 8
"""Groups of near-duplicates shown, and images of each."""
SIDE = 64
"""Largest side of a thumbnail in pixels."""


class CurationPage(Config):
    """A page that was written."""

    dataset: str
    page: Path
    images: int
    dropped: int
    """Number of images that the configured rules would drop."""
    near_duplicates: int
    semantic_duplicates: int
    """Number of images that are near-duplicates of another one, which would be kept for them."""

    def lines(self) -> list[str]:
        """Describe the page."""
        return [
            f"{self.images:,} images measured; the configured rules would drop {self.dropped:,}",
            f"near-duplicates {self.near_duplicates:,}, semantic ones {self.semantic_duplicates:,}",
            f"page: {self.page}",
        ]


def write_curation_report(
    folder: Path,
    output: Path,
    config: CurationConfig,
    ingest: IngestConfig,
    evaluation: EvaluationConfig,
    progress: Progress = ignore_progress,
    *,
    remote: RemoteDataset | None = None,
) -> CurationPage:
    """Measure all images of the data set in ``folder``, kept or dropped, and write the page; changes nothing else.

    Groups follow ``config.near_duplicates`` and ``semantic_duplicates``, and span classes where these are unset.
    ``remote`` has the shards that are not in ``folder``. Raises UserError as ``curate`` does.
    """
    read_manifest(folder)
    make_folder(work_folder(folder))
    with FileLock(work_folder(folder) / "lock"):
        manifest = read_manifest(folder)
        require_whole(folder, manifest, without_shards=remote is not None)
        sections = config, evaluation, make_fan_out(ingest)
        measurements = measure(folder, manifest, *sections, progress, everything=True, remote=remote)
        verdicts = {name: getattr(config, name) or "report" for name in ("near_duplicates", "semantic_duplicates")}
        reported, lists = config.model_copy(update=verdicts), read_lists(folder, manifest)
        decision = decide(folder, manifest, measurements, reported, evaluation, lists, progress)
        thumbnails: dict[int, int] = {}
        rules = {**RULES, **{name: type(rule) for name, rule in config.rules.items()}}
        names = [name for name in rules if name in decision.columns]
        panels = [_panel(name, rules[name], decision, measurements, config, thumbnails) for name in names]
        groupings = {"near_duplicates": decision.near, "semantic_duplicates": decision.semantic}
        groups = {name: _groups(grouping, measurements, thumbnails) for name, grouping in groupings.items()}
        images = images_of(folder, manifest, measurements.records.take(list(thumbnails)), remote)
    counts = {name: _count_copies(grouping) for name, grouping in groupings.items()}
    dropped_count = sum(decision.rules.values())
    page = CurationPage(dataset=folder.name, page=output, images=len(measurements), dropped=dropped_count, **counts)
    limits = {
        "near_duplicates": ("near_duplicate_bits", decision.near and decision.near.limit),
        "semantic_duplicates": ("semantic_distance", decision.semantic and decision.semantic.limit),
    }
    html = render(
        "curation.html",
        page=page,
        digest=manifest.digest,
        panels=panels,
        groups=groups,
        limits=limits,
        calibration=decision.calibration,
        verdicts=verdicts,
        copies=counts,
        data={
            "images": [_thumbnail(image) for image in images],
            "panels": panels,
            "groups": [*groups["near_duplicates"], *groups["semantic_duplicates"]],
            "total": len(measurements),
            "rules": config.model_dump(mode="json", exclude_defaults=True),
        },
    )
    write_bytes(output, html)
    return page


def _count_copies(grouping: Grouping | None) -> int:
    return 0 if grouping is None else int((grouping.leaders != np.arange(len(grouping.leaders))).sum())


def _panel(
    name: str,
    rule: type[Rule],
    decision: Decision,
    measurements: Measurements,
    config: CurationConfig,
    thumbnails: dict[int, int],
) -> dict[str, Any]:
    """Describe one measure: histogram, thresholds with the numbers that they drop, and images along its range."""
    configured = {limit.bound: limit.value for limit in config.limits if limit.name == name}
    bound = rule.bound if rule.bound in configured else next(iter(configured), rule.bound)
    values = decision.columns[name]
    order = np.argsort(values, kind="stable")
    series = values[order]
    low, high = float(series[0]), float(np.quantile(series, 0.995)) if bound == "min" else float(series[-1])
    counts, edges = np.histogram(np.clip(values, low, max(high, low + 1e-9)), BINS)
    # Thresholds lie where a slider moves evenly through the images, but most of them in the tail that is dropped.
    tail = np.concatenate([np.linspace(0, 0.2, STEPS * 3 // 4), np.linspace(0.2, 1, STEPS // 4)])
    quantiles = np.quantile(series, tail if bound == "min" else 1 - tail)
    limit = configured.get(bound)
    configured_limits = set() if limit is None else {float(limit)}
    limits = sorted({float(f"{value:.4g}") for value in quantiles} | configured_limits, reverse=bound == "max")
    left_ranks, right_ranks = (np.searchsorted(series, limits, side) for side in ("left", "right"))
    dropped_counts = left_ranks if bound == "min" else len(series) - right_ranks
    # Of the images, too, most are in that tail.
    places = np.unique(np.round((len(order) - 1) * np.linspace(0, 1, THUMBNAILS) ** 3).astype(int))
    rows = order[places] if bound == "min" else order[len(order) - 1 - places]
    strip = [
        {
            "image": thumbnails.setdefault(int(row), len(thumbnails)),
            "value": float(values[row]),
            "source": escape_controls(measurements.records["source"][int(row)].as_py()[:160]),
        }
        for row in rows
    ]
    return {
        "name": name,
        "rule": f"rules.{name}.{bound}" if name in config.rules else f"{bound}_{name}",
        "bound": bound,
        "title": rule.title,
        "meaning": rule.meaning,
        "low": low,
        "high": float(edges[-1]),
        "counts": counts.tolist(),
        "limits": limits,
        "dropped": dropped_counts.tolist(),
        "limit": limit,
        "strip": strip,
    }


def _groups(grouping: Grouping | None, measurements: Measurements, thumbnails: dict[int, int]) -> list[dict[str, Any]]:
    """Describe the largest groups, the leader of each first."""
    if grouping is None:
        return []
    leaders, sizes = np.unique(grouping.leaders, return_counts=True)
    largest = np.lexsort((leaders, -sizes))[:GROUPS]
    groups = []
    for leader, size in zip(leaders[largest].tolist(), sizes[largest].tolist(), strict=True):
        if size > 1:
            others = np.flatnonzero(grouping.leaders == leader)
            rows = [leader, *(row for row in others.tolist() if row != leader)][:MEMBERS]
            members = [
                {"image": thumbnails.setdefault(row, len(thumbnails)), **_describe(measurements, row)} for row in rows
            ]
            groups.append({"size": size, "members": members})
    return groups


def _describe(measurements: Measurements, row: int) -> dict[str, Any]:
    record = measurements.records.slice(row, 1).to_pylist()[0]
    return {
        "source": escape_controls(record["source"][:160]),
        "size": f"{record['width']}×{record['height']}",
        "label": escape_controls(record["label"] or ""),
    }


def _thumbnail(image: np.ndarray) -> str:
    """Encode ``image`` (H, W, 3) as a WebP of at most SIDE pixels, in a data URI."""
    thumbnail, data = Image.fromarray(image), io.BytesIO()
    thumbnail.thumbnail((SIDE, SIDE))
    thumbnail.save(data, "WEBP", quality=75)
    return "data:image/webp;base64," + b64encode(data.getvalue()).decode()
