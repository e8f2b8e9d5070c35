"""Report page of a data set version, written once and shown wherever the version is used."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from diffusion.common.files import write_json
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.reports.dataset_report import DatasetSummary, write_dataset_report
from flows.config import Params
from flows.tracking.progress_reporter import reporter


@dataclass(frozen=True)
class DatasetPage:
    """Report page on disk, with its summary."""

    html: Path
    summary: DatasetSummary


def make_dataset_page(params: Params) -> DatasetPage:
    """Return the page of the current version of the data set ``training.dataset``; write it if it is missing.

    Its path is ``reports/NAME/dataset/DIGEST.html``, with the summary beside it.
    """
    html = _page_path(params)
    if (page := _read_page(html)) is not None:
        return page
    summary = write_dataset_report(params.dataset_folder, html, reporter())
    write_json(html.with_suffix(".json"), summary.model_dump(mode="json"))
    return DatasetPage(html, summary)


def find_dataset_page(params: Params) -> DatasetPage | None:
    """Like ``make_dataset_page``, but return only an existing page if shards are streamed from the remote."""
    return _read_page(_page_path(params)) if params.training.stream_bytes is not None else make_dataset_page(params)


def _page_path(params: Params) -> Path:
    digest = read_manifest(params.dataset_folder).digest
    return params.report_folder / "dataset" / f"{digest[:16]}.html"


def _read_page(html: Path) -> DatasetPage | None:
    figures = html.with_suffix(".json")
    if not (html.is_file() and figures.is_file()):
        return None
    try:
        return DatasetPage(html, DatasetSummary.model_validate_json(figures.read_bytes()))
    except ValidationError:  # written by another version of Darkroom
        return None
