"""The page on a version of a data set: made once, and shown wherever the version is used."""

from dataclasses import dataclass
from pathlib import Path

from diffusion.data.manifest import read_manifest
from diffusion.evaluation.dataset_report import DatasetSummary, write_dataset_report
from diffusion.files import write_json
from flows.params import Params
from flows.progress import reporter


@dataclass(frozen=True)
class DatasetPage:
    """A page that is there."""

    html: Path
    summary: DatasetSummary
    """Its key figures."""


def dataset_page(params: Params) -> DatasetPage:
    """The page on the current version of the data set ``training.dataset``, made unless it is there.

    It lies at ``reports/NAME/dataset/<digest>.html``, its key figures beside it.
    """
    html = _place(params)
    if (page := _read(html)) is not None:
        return page
    summary = write_dataset_report(params.dataset_folder, html, reporter())
    write_json(html.with_suffix(".json"), summary.model_dump(mode="json"))
    return DatasetPage(html, summary)


def page_at_hand(params: Params) -> DatasetPage | None:
    """The page if it is there, or can be made of what is: not where shards are fetched as training needs them."""
    return _read(_place(params)) if params.training.stream_bytes is not None else dataset_page(params)


def _place(params: Params) -> Path:
    digest = read_manifest(params.dataset_folder).digest
    return params.report_folder / "dataset" / f"{digest[:16]}.html"


def _read(html: Path) -> DatasetPage | None:
    figures = html.with_suffix(".json")
    if not (html.is_file() and figures.is_file()):
        return None
    return DatasetPage(html, DatasetSummary.model_validate_json(figures.read_bytes()))
