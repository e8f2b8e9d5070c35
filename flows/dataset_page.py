"""Page on a data set version, written once and shown wherever the version is used."""

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
    """Page on disk, with its key figures."""

    html: Path
    summary: DatasetSummary


def make_dataset_page(params: Params) -> DatasetPage:
    """Return the page on the current version of the data set ``training.dataset``, and write it if there is none.

    It lies at ``reports/NAME/dataset/DIGEST.html``, its key figures beside it.
    """
    html = _page_path(params)
    if (page := _read_page(html)) is not None:
        return page
    summary = write_dataset_report(params.dataset_folder, html, reporter())
    write_json(html.with_suffix(".json"), summary.model_dump(mode="json"))
    return DatasetPage(html, summary)


def find_dataset_page(params: Params) -> DatasetPage | None:
    """Return the page as above, but where shards are streamed from the remote only if it is there already."""
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
    except ValidationError:  # written by a version of Darkroom with other figures
        return None
