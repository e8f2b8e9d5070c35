"""Model card: data, training, evaluation and limits of a version, as its description in MLflow."""

from collections.abc import Iterable, Iterator

import mlflow
from jinja2 import Environment, PackageLoader
from mlflow.client import MlflowClient

from diffusion.common.escaping import escape_markdown, pluralize
from diffusion.data.manifest import Manifest
from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.estimate import CONFIDENCE
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement, describe_agreement
from diffusion.evaluation.reports.evaluation_report import describe_kid
from diffusion.evaluation.reports.html import format_count, format_interval, format_signed, format_with_error
from diffusion.evaluation.results import Evaluation
from diffusion.families.header import ModelHeader, Origin
from flows.registry.ledger import LedgerEntry
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import describe_takedowns, find_notes
from flows.tracking.runs import read_run_manifest, version_artifact

CLASSES_SHOWN = 12
SEEN = 0.2
"""Smallest significant shift of colours or brightness in the card, in standard deviations: less is hardly visible."""


def write(
    client: MlflowClient,
    header: ModelHeader,
    evaluation: Evaluation,
    data: Manifest,
    version: Version,
    entry: LedgerEntry | None,
    comparison: ChampionComparison | None = None,
) -> None:
    """Write the card as the description of ``version``; ``entry`` holds the gate's verdict, None before the decision.

    A card with that verdict is kept, with all manual edits; notes on takedowns are always kept.
    """
    model_version = client.get_model_version(version.model, str(version.number))
    description = model_version.description or ""
    if description if entry is None else entry.digest in description:
        return
    current = version.model_copy(update={"tags": dict(model_version.tags)})
    text = card(header, evaluation, data, current, entry, comparison)
    client.update_model_version(
        version.model, str(version.number), description="\n\n".join([text, *find_notes(description)])
    )


def write_imported(client: MlflowClient, header: ModelHeader, origin: Origin, version: Version) -> None:
    """Write the card of an imported version that was not evaluated yet, unless it has one."""
    model_version = client.get_model_version(version.model, str(version.number))
    if not model_version.description:
        text = _environment().get_template("imported_card.md").render(header=header, origin=origin, version=version)
        client.update_model_version(version.model, str(version.number), description=text.rstrip())


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("flows.registry"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"markdown": escape_markdown, "listed": _join_names}
    environment.filters |= {function.__name__: function for function in (format_count, pluralize, format_with_error)}
    return environment


def card(
    header: ModelHeader,
    evaluation: Evaluation,
    data: Manifest,
    version: Version,
    entry: LedgerEntry | None,
    comparison: ChampionComparison | None = None,
) -> str:
    """Render the card of ``version`` as Markdown, with its ``evaluation`` and ``comparison`` on ``data``.

    ``header`` comes from its weights. It was trained on ``data`` unless a tag of the version names another content.
    """
    best, candidate = evaluation.best, comparison.candidate if comparison else None
    content_digest = version.tags.get("darkroom.content_digest", data.content_digest)
    trained_here = header.origin is None and content_digest == data.content_digest
    classes = data.class_histogram if trained_here else header.class_histogram
    comparison_columns = (f"{CONFIDENCE:.0%} interval",) if comparison else ()
    if comparison and comparison.champion:
        comparison_columns = (*comparison_columns, "the champion's")
    agreement = (candidate or best).text_image_agreement
    text = (
        _environment()
        .get_template("model_card.md")
        .render(
            header=header,
            origin=header.origin,
            trained_here=trained_here,
            version=version,
            warning=describe_takedowns(version),
            entry=entry,
            comparison=comparison,
            evaluated=candidate,
            scores=(candidate or best).scores,
            columns=("metric", "value", *comparison_columns, "real-vs-real baseline"),
            metrics=_list_comparison(comparison) if comparison else _list_metrics(evaluation),
            best=best,
            sampling=candidate.sampling if candidate else evaluation.sampling,
            grid=f"evaluation/grids/{best.images:010d}-{best.sha256[:8]}.png",
            data=data,
            classes=_join_names(
                f"{escape_markdown(name)} ({format_count(number)})" for name, number in classes.items()
            ),
            eval_key=evaluation.eval_key,
            quality=describe_kid(evaluation, candidate, comparison.real_baseline if comparison else None),
            agreement=None if agreement is None else describe_agreement(agreement),
            rarest=min(classes.items(), key=lambda item: item[1], default=None),
            max_class_images=max(classes.values(), default=0),
            shifts={
                name: shift.spreads
                for name, shift in (comparison.candidate.drift.shifts.items() if comparison else ())
                if shift.spreads is not None
                and abs(shift.spreads) > SEEN
                and abs(shift.difference) > 3 * shift.standard_error
            },
        )
    )
    return text.rstrip()


def load_manifest_and_metrics(version: Version) -> tuple[Manifest | None, dict[str, float]]:
    """Return the manifest of the data that ``version`` saw, and its metrics by name, as far as its run has them."""
    client, artifact, metrics = MlflowClient(), version_artifact(version.weights_sha256), {}
    if artifact in {item.path for item in client.list_artifacts(version.run_id, "evaluation/versions")}:
        metrics = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/{artifact}")["metrics"]
    return read_run_manifest(client, version.run_id), metrics


def _list_metrics(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    metrics, baseline = evaluation.best.metrics(), evaluation.real_baseline.metrics()
    for name, value in metrics.items():
        if "_se_" not in name and not name.endswith(("_se", "_low", "_high")):
            prefix, _, suffix = name.partition("_")
            # kid_se_efflite0 is the standard error of kid_efflite0.
            error = metrics.get(f"{prefix}_se_{suffix}", metrics.get(f"{name}_se"))
            yield name, _figure(value, error), format_signed(baseline[name]) if name in baseline else ""


def _list_comparison(comparison: ChampionComparison) -> Iterator[tuple[str, ...]]:
    candidate, baseline = comparison.candidate.metrics(), comparison.real_baseline.metrics()
    champion = comparison.champion.metrics() if comparison.champion else {}
    rows = {
        name: (_figure(metric.value, metric.error), format_interval(metric.interval))
        for name, metric in comparison.candidate.estimates.items()
    }
    if isinstance(agreement := comparison.candidate.text_image_agreement, TextImageAgreement):
        name, estimate = f"text_image_agreement_{agreement.encoder}", agreement.agreement
        rows[name] = _figure(estimate.value, estimate.error), format_interval(estimate.interval)
        baseline |= {name: agreement.real.value}
    for name in ("copies_share", "duplicates_share"):
        rows[name] = f"{candidate[name]:.2%}", f"{candidate[f'{name}_low']:.2%} … {candidate[f'{name}_high']:.2%}"
    for name in ("reconstruction_psnr", "psnr", "bits_per_dim", "held_out_loss"):
        if name in candidate:
            rows[name] = format_with_error(candidate[name], candidate[f"{name}_se"]), ""
    for name in ("class_agreement", "gflop_per_image"):
        if name in candidate:
            rows[name] = format_signed(candidate[name]), ""
    sides = (champion, baseline) if comparison.champion else (baseline,)
    for name, row in rows.items():
        yield name, *row, *(format_signed(side[name]) if name in side else "" for side in sides)


def _figure(value: float, error: float | None) -> str:
    # A share of 0 or 1 has no error that was measured.
    return format_with_error(value, error) if error else format_signed(value)


def _join_names(names: Iterable[str]) -> str:
    texts = list(names)
    more = len(texts) - CLASSES_SHOWN
    return ", ".join(texts[:CLASSES_SHOWN]) + (f" and {format_count(more)} more" if more > 0 else "")
