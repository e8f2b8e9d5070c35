"""Charts of a trial: how much better the challenger is, and what both sides foresee at each noise level."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from diffusion.evaluation.charts import Chart, Paper, chart, legend
from diffusion.evaluation.gate import Headline
from diffusion.evaluation.held_out_loss import HeldOutLoss


def lead_chart(headline: Headline, delta: float, confidence: float) -> Chart:
    """How much better the challenger is: at least and at most, beside nothing at all and the smallest that counts."""
    lead, smallest = headline.lead, headline.smallest(delta)
    reach = lead.reach(confidence)

    def draw(axes: Axes, paper: Paper) -> None:
        axes.axvline(0, color=paper.muted, linewidth=1.2, label="as good as the champion")
        style = (0, (4, 3))
        axes.axvline(smallest, color=paper.series[1], linewidth=1.4, linestyle=style, label="better by δ")
        axes.errorbar(
            [lead.value], [0], xerr=[reach], color=paper.series[0], marker="o", markersize=8, linewidth=2.4, capsize=6
        )
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.set_xlabel(f"how much better in {headline.name}")
        legend(axes, paper)

    return chart(f"The lead, and where it lies with confidence {confidence:g} to either side", draw, (7.4, 1.9))


def losses_chart(losses: Mapping[str, HeldOutLoss]) -> Chart | None:
    """The loss on held-out pictures by noise level, of each model by its name; None: of none is there any."""
    curves = {name: found.levels for name, found in losses.items() if found.levels}
    if not curves:
        return None

    def draw(axes: Axes, paper: Paper) -> None:
        for (name, levels), colour in zip(curves.items(), paper.series, strict=False):
            sigmas = [math.sqrt(each.sigma_low * each.sigma_high) for each in levels]
            means, errors = [each.loss for each in levels], [1.96 * each.loss_se for each in levels]
            axes.errorbar(
                sigmas, means, errors, color=colour, marker="o", markersize=4, linewidth=1.6, capsize=2, label=name
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("noise level σ")
        legend(axes, paper)

    return chart("Loss on held-out pictures by noise level, with 95 % intervals (lower is better)", draw, (7.4, 3.3))
