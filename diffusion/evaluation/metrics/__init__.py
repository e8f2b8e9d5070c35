"""Metrics of generated images, each with its definition and source, and the table of those that compare with real ones.

To add one, write a class of ``metrics.metric.Metric`` and import it below, or name it in another package under the
entry points of ``darkroom.metrics``.
"""

import re

from diffusion.common.config import classes_in
from diffusion.common.errors import UserError
from diffusion.common.extensions import extension_versions, with_extensions

# isort: off
from diffusion.evaluation.metrics.metric import Figure as Figure
from diffusion.evaluation.metrics.metric import Metric as Metric
from diffusion.evaluation.metrics.kid import KernelInceptionDistance as KernelInceptionDistance
from diffusion.evaluation.metrics.frechet import FrechetDistance as FrechetDistance
from diffusion.evaluation.metrics.overlap import Overlap as Overlap
# isort: on

GROUP = "darkroom.metrics"
METRICS = {kind.name: kind for kind in classes_in(globals(), Metric)}  # type: ignore[type-abstract]
"""Metrics in the order in which reports show them."""


def load_metrics() -> dict[str, Metric]:
    """Return all metrics by name, extensions last; raises UserError for one that cannot be used."""
    metrics: dict[str, Metric] = {}
    classes: dict[str, object] = with_extensions(GROUP, METRICS)
    names = {"extractor", "samples", "reference"}  # other fields of ``Scores``
    for name, kind in classes.items():
        if not (isinstance(kind, type) and issubclass(kind, Metric)):
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
        metrics[name] = kind()
    return metrics


def load_figures() -> dict[str, Figure]:
    """Return the figures of all metrics by name, in order."""
    return {figure.name: figure for metric in load_metrics().values() for figure in metric.figures}


def metric_versions() -> dict[str, str]:
    """Return the package and version of each metric that another package adds, by name."""
    return extension_versions(GROUP)
