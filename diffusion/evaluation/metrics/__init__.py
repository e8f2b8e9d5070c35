"""Metrics of generated images, each with its definition and source, and the table of those that compare with real ones.

To add one, write a class of ``metrics.metric.Metric`` and import it below, or name it in another package under the
entry points of ``darkroom.metrics``.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from diffusion.common.config import classes_in
from diffusion.common.errors import UserError
from diffusion.common.extensions import extension_versions, with_extensions

# isort: off
from diffusion.evaluation.metrics.metric import BaseMetric as BaseMetric
from diffusion.evaluation.metrics.metric import Figure as Figure
from diffusion.evaluation.metrics.metric import Metric as Metric
from diffusion.evaluation.metrics.kid import KernelInceptionDistance as KernelInceptionDistance
from diffusion.evaluation.metrics.frechet import FrechetDistance as FrechetDistance
from diffusion.evaluation.metrics.precision_recall import Overlap as Overlap
# isort: on

GROUP = "darkroom.metrics"
AnyMetric = TypeVar("AnyMetric", bound=BaseMetric)
METRICS = {kind.name: kind for kind in classes_in(globals(), Metric)}  # type: ignore[type-abstract]
"""Metrics in the order in which reports show them."""


def load_group(group: type[AnyMetric], built_in: Mapping[str, type[AnyMetric]]) -> dict[str, AnyMetric]:
    """Return all metrics of one base class by name, extensions last; raises UserError for one that cannot be used."""
    metrics: dict[str, AnyMetric] = {}
    classes: dict[str, object] = with_extensions(GROUP, built_in)
    names = {"extractor", "samples", "reference"}  # other fields of ``Scores``
    for name, kind in classes.items():
        if not (isinstance(kind, type) and issubclass(kind, BaseMetric)):
            raise UserError(
                f"{name} of {GROUP} is not a class of diffusion.evaluation.metrics.metric.Metric: uninstall it"
            )
        for figure in kind.figures:
            if figure.name in names or not re.fullmatch("[a-z][a-z0-9_]*", figure.name):
                raise UserError(
                    f"{name} of {GROUP} computes {figure.name!r}, which is taken or not a name of lower-case letters, "
                    "digits and _: uninstall it"
                )
            names.add(figure.name)
        if issubclass(kind, group):
            metrics[name] = kind()
    return metrics


def check_figures(name: str, metric: BaseMetric, values: Any) -> None:
    """Raise UserError unless ``values``, computed by the ``metric`` of this name, are finite figures of its own."""
    figures = {figure.name for figure in metric.figures}
    for figure, value in values.items() if isinstance(values, Mapping) else [("figures", values)]:
        if figure not in figures or not math.isfinite(value):
            raise UserError(
                f"the metric {name} computed {figure} = {value}, which is not a finite figure of its own: update or "
                "uninstall its package"
            )


def load_metrics() -> dict[str, Metric]:
    """Return all metrics of images by name, extensions last; raises UserError for one that cannot be used."""
    return load_group(Metric, METRICS)  # type: ignore[type-abstract]


def load_figures() -> dict[str, Figure]:
    """Return the figures of all metrics by name, in order."""
    return {figure.name: figure for metric in load_metrics().values() for figure in metric.figures}


def metric_versions() -> dict[str, str]:
    """Return the package and version of each metric that another package adds, by name."""
    return extension_versions(GROUP)
