"""Model card: data, training, evaluation and limits of a version, as its description in MLflow."""

from collections.abc import Iterable, Iterator

from jinja2 import Environment, PackageLoader
from mlflow.client import MlflowClient

from diffusion.common.escaping import escape_markdown
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.estimate import CONFIDENCE
from diffusion.evaluation.evaluate import describe_kid
from diffusion.evaluation.reports.html import between, count, counted, share, signed, with_error
from diffusion.evaluation.results import Evaluation
from flows.config import Params
from flows.registry.ledger import LedgerEntry
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import notes_in, takedowns

CLASSES_SHOWN = 12
SEEN = 0.2
"""Smallest significant shift of colours or brightness in the card, in standard deviations: less is hardly visible."""


def write(
    client: MlflowClient,
    params: Params,
    evaluation: Evaluation,
    version: Version,
    entry: LedgerEntry | None,
    comparison: ChampionComparison | None = None,
) -> None:
    """Write the card as the description of ``version``; ``entry`` holds the gate's verdict, None before the decision.

    A card with that verdict is kept, with all manual edits; notes on takedowns are always kept.
    """
    found = client.get_model_version(version.model, str(version.number))
    there = found.description or ""
    if there if entry is None else entry.digest in there:
        return
    current = version.model_copy(update={"tags": dict(found.tags)})
    text = card(params, evaluation, read_manifest(params.dataset_folder), current, entry, comparison)
    client.update_model_version(version.model, str(version.number), description="\n\n".join([text, *notes_in(there)]))


def card(
    params: Params,
    evaluation: Evaluation,
    data: Manifest,
    version: Version,
    entry: LedgerEntry | None,
    comparison: ChampionComparison | None = None,
) -> str:
    """Render the card of ``version``, trained on ``data``, with its ``evaluation`` and ``comparison``, as Markdown."""
    best, evaluated, classes = evaluation.best, comparison.candidate if comparison else None, data.class_histogram
    compared = (f"{CONFIDENCE:.0%} interval",) if comparison else ()
    if comparison and comparison.champion:
        compared = (*compared, "the champion's")
    environment = Environment(loader=PackageLoader("flows.registry"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"markdown": escape_markdown, "listed": _listed}
    environment.filters |= {each.__name__: each for each in (count, counted, share, with_error)}
    text = environment.get_template("model_card.md").render(
        params=params,
        version=version,
        warning=takedowns(version),
        entry=entry,
        comparison=comparison,
        evaluated=evaluated,
        scores=(evaluated or best).scores,
        columns=("metric", "value", *compared, "real-vs-real baseline"),
        metrics=_compared(comparison) if comparison else _evaluated(evaluation),
        best=best,
        sampling=evaluation.sampling,
        grid=f"evaluation/grids/{best.images:010d}-{best.sha256[:8]}.png",
        data=data,
        classes=_listed(f"{escape_markdown(name)} ({count(number)})" for name, number in classes.items()),
        eval_key=evaluation.eval_key,
        quality=describe_kid(evaluation),
        rarest=min(classes.items(), key=lambda each: each[1], default=None),
        shifts={
            name: shift.spreads
            for name, shift in (comparison.candidate.drift.shifts.items() if comparison else ())
            if shift.spreads is not None
            and abs(shift.spreads) > SEEN
            and abs(shift.difference) > 3 * shift.standard_error
        },
    )
    return text.rstrip()


def _evaluated(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    metrics, baseline = evaluation.best.metrics(), evaluation.real_baseline.metrics()
    for name, value in metrics.items():
        if "_se_" not in name and not name.endswith("_se"):
            first, _, rest = name.partition("_")
            # kid_se_efflite0 is the standard error of kid_efflite0.
            error = metrics.get(f"{first}_se_{rest}", metrics.get(f"{name}_se"))
            yield name, _figure(value, error), signed(baseline[name]) if name in baseline else ""


def _compared(comparison: ChampionComparison) -> Iterator[tuple[str, ...]]:
    ours, baseline = comparison.candidate.metrics(), comparison.real_baseline.metrics()
    theirs = comparison.champion.metrics() if comparison.champion else {}
    rows = {
        name: (_figure(each.value, each.error), between(each.interval))
        for name, each in comparison.candidate.estimates.items()
    }
    for name in ("copies_share", "duplicates_share"):
        rows[name] = f"{ours[name]:.1%}", f"{ours[f'{name}_low']:.1%} … {ours[f'{name}_high']:.1%}"
    for name in ("reconstruction_psnr", "psnr", "bits_per_dim", "held_out_loss"):
        if name in ours:
            rows[name] = with_error(ours[name], ours[f"{name}_se"]), ""
    for name in ("class_agreement", "gflop_per_image"):
        if name in ours:
            rows[name] = signed(ours[name]), ""
    sides = (theirs, baseline) if comparison.champion else (baseline,)
    for name, row in rows.items():
        yield name, *row, *(signed(side[name]) if name in side else "" for side in sides)


def _figure(value: float, error: float | None) -> str:
    # A share of 0 or 1 has no error that was measured.
    return with_error(value, error).replace("-", "−") if error else signed(value)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - CLASSES_SHOWN
    return ", ".join(found[:CLASSES_SHOWN]) + (f" and {count(more)} more" if more > 0 else "")
