"""Model card: data, training, evaluation and limits of a version, as its description in MLflow."""

from collections.abc import Iterable, Iterator

from mlflow.client import MlflowClient

from diffusion.common.escaping import escape_markdown
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.estimate import CONFIDENCE
from diffusion.evaluation.reports.html import count, counted, share, signed, with_error
from diffusion.evaluation.results import Evaluation
from flows.config import Params
from flows.registry.ledger_entries import LedgerEntry
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import notes_in, takedowns

CLASSES_SHOWN = 12
UNLIKELY = 0.01
"""Largest p-value of a defect that the card mentions."""
SEEN = 0.2
"""Smallest shift of colours or brightness that the card mentions, in standard deviations: less is hardly visible."""
LICENCE_UNKNOWN = "unknown: set ingest.licence, and until then assume that the images' owners allow nothing"


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
    channels = "grey" if data.channels == 1 else "RGB"
    sections = {
        "Gate decision": _decision(entry, comparison),
        "How good it is": _evaluation_metrics(evaluation) if comparison is None else _comparison_metrics(comparison),
        "Samples": _samples(evaluation, version),
        "Data": _data(data, version),
        "Training": _training(params, evaluation, version),
        "How to call it": _calls(version),
        "Limits": "\n".join(f"- {each}" for each in (*_limits(data, evaluation), *_limits_found(comparison))),
    }
    return "\n\n".join(
        [
            f"# {version.model}, version {version.number}",
            f"A model of {data.size}×{data.size} images ({channels}), made with Darkroom from the data set "
            f"{data.name}.",
            *filter(None, [takedowns(version)]),
            *(f"## {title}\n\n{text}" for title, text in sections.items()),
        ]
    )


def _decision(entry: LedgerEntry | None, comparison: ChampionComparison | None) -> str:
    if entry is None:
        return "Not yet: the gate decides next."
    outcome = (
        "champion" if entry.to_version == entry.version else f"not champion, which is {entry.to_version or 'none'}"
    )
    rows = [("outcome", outcome), ("why", escape_markdown(entry.why))]
    if entry.evidence is not None and entry.evidence.eval_key is not None:
        rows.append(("evaluation", f"`{entry.evidence.eval_key}`"))
    rows += [("when, by", f"{entry.when:%Y-%m-%d %H:%M} UTC, {escape_markdown(entry.who)}")]
    rows += [("ledger", f"entry {entry.number}, `{entry.digest}`")]
    said = [_table(rows), "What happened to it since is in its tags `darkroom.ledger.*`."]
    if comparison is not None:
        findings = [
            (each.rule, each.verdict.value, escape_markdown(each.reason)) for each in comparison.decision.findings
        ]
        said.insert(1, _table(findings, ("rule of the gate", "verdict", "reason")))
    return "\n\n".join(said)


def _evaluation_metrics(evaluation: Evaluation) -> str:
    metrics, baseline = evaluation.best.metrics(), evaluation.real_baseline.metrics()
    errors = {name: _error_of(name, metrics) for name in metrics}
    taken = set(errors.values())
    rows = [
        (
            name,
            with_error(value, metrics[error]) if (error := errors[name]) else f"{value:.4g}",
            f"{baseline[name]:.4g}" if name in baseline else "",
        )
        for name, value in metrics.items()
        if name not in taken
    ]
    scores = evaluation.best.scores
    return (
        f"On {counted(scores.reference, 'held-out image')}, by {counted(scores.samples, 'sample')}; ± is a standard "
        "error, and the real baseline is that of training images.\n\n"
        + _table(rows, ("metric", "value", "real baseline"))
    )


def _comparison_metrics(comparison: ChampionComparison) -> str:
    champion, baseline = comparison.champion, comparison.real_baseline.metrics()
    ours, theirs = comparison.candidate.metrics(), champion.metrics() if champion else {}
    estimates = comparison.candidate.estimates
    rows = [
        (name, with_error(each.value, each.error), _range(each.interval.low, each.interval.high))
        for name, each in estimates.items()
    ]
    rows += [
        (name, f"{ours[name]:.2%}", _range(ours[f"{name}_low"], ours[f"{name}_high"]))
        for name in ("copies_share", "duplicates_share")
    ]
    rows += [
        (name, with_error(ours[name], ours[f"{name}_se"]), "")
        for name in ("reconstruction_psnr", "psnr", "bits_per_dim", "held_out_loss")
        if name in ours
    ]
    rows += [(name, f"{ours[name]:.4g}", "") for name in ("class_agreement", "gflop_per_image") if name in ours]
    others = [tuple(f"{side[name]:.4g}" if name in side else "" for side in (theirs, baseline)) for name, *_ in rows]
    scores = comparison.candidate.scores
    return (
        f"On {counted(scores.reference, 'held-out image')}, by {counted(scores.samples, 'sample')} of another seed "
        "than it was selected by; ± is a standard error, and the real baseline is that of training images.\n\n"
        + _table(
            [(*row, *other) for row, other in zip(rows, others, strict=True)],
            ("metric", "value", f"{CONFIDENCE:.0%} interval", "the champion's", "real baseline"),
        )
    )


def _range(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"


def _error_of(name: str, figures: Iterable[str]) -> str | None:
    """Name of the standard error of the metric ``name``, such as kid_se_efflite0 of kid_efflite0; None without one."""
    first, _, rest = name.partition("_")
    return next((error for error in (f"{first}_se_{rest}", f"{name}_se") if error in figures), None)


def _samples(evaluation: Evaluation, version: Version) -> str:
    best = evaluation.best
    path = f"evaluation/grids/{best.images:010d}-{best.sha256[:8]}.png"
    shown = f"get-artifact?path={path.replace('/', '%2F')}&run_uuid={version.run_id}"
    return f"![samples]({shown})\n\n`{path}` of run `{version.run_id}`, with the report, `evaluation/report.html`."


def _data(data: Manifest, version: Version) -> str:
    classes = [f"{escape_markdown(name)} ({count(number)})" for name, number in data.class_histogram.items()]
    more = len(classes) - CLASSES_SHOWN
    shown = ", ".join(classes[:CLASSES_SHOWN]) + (f" and {count(more)} more" if more > 0 else "")
    rows = [
        ("data set", data.name),
        ("images", f"{count(data.counts['train'])} to learn from, {count(data.counts['held_out'])} held out"),
        ("classes", shown or "none"),
        ("content", f"`{data.content_digest}`"),
        ("version", f"`{data.digest}`"),
        (
            "DVC",
            f"`{version.tags['darkroom.dvc_digest']}`" if "darkroom.dvc_digest" in version.tags else "not recorded",
        ),
        ("licence", escape_markdown(data.licence or LICENCE_UNKNOWN)),
    ]
    return _table(rows)


def _training(params: Params, evaluation: Evaluation, version: Version) -> str:
    training, tags = params.training, version.tags
    dirty = ", with changes that were not committed" if tags.get("darkroom.git_dirty") == "True" else ""
    rows = [
        ("family", params.model.family),
        ("images seen", count(evaluation.best.images)),
        ("batch, learning rate", f"{training.batch_size}, {training.learning_rate:g}"),
        ("run", f"`{version.run_id}`: its `params.json` has the whole configuration"),
        ("code", f"git `{tags['darkroom.git_commit']}`{dirty}" if "darkroom.git_commit" in tags else "outside of git"),
        ("weights", f"SHA-256 `{version.weights_sha256}`"),
    ]
    if autoencoder := tags.get("darkroom.autoencoder"):
        rows.append(("in the latents of", escape_markdown(autoencoder)))
    if start := tags.get("darkroom.start"):
        rows.append(("began with the weights of", escape_markdown(start)))
    return _table(rows)


def _calls(version: Version) -> str:
    return f"""```sh
darkroom sample --model {version.uri} --count 64 --seed 0
mlflow models serve -m {version.uri} --env-manager local --port 5001
```

```python
import mlflow, pandas as pd

model = mlflow.pyfunc.load_model("{version.uri}")
png = model.predict(pd.DataFrame({{"seed": [0], "index": [0]}}))["png"][0]
```"""


def _limits(data: Manifest, evaluation: Evaluation) -> Iterator[str]:
    scores = evaluation.best.scores
    yield f"It generates images like its training data, at {data.size}×{data.size}, with their gaps and biases."
    yield "It may come close to single training images: mark generated images as made by a model."
    yield (
        f"Its figures rest on features of {scores.extractor}: compare them only under equal conditions "
        f"(`{evaluation.eval_key}`)."
    )
    classes = data.class_histogram
    if (
        classes
        and (least := min(classes, key=lambda name: classes[name]))
        and classes[least] * 10 < max(classes.values())
    ):
        yield (
            f"Of class {escape_markdown(least)} it saw {counted(classes[least], 'image')}, of others more than ten "
            "times as many."
        )


def _limits_found(comparison: ChampionComparison | None) -> Iterator[str]:
    """Limits of the model that the comparison found."""
    if comparison is None:
        return
    evaluated = comparison.candidate
    copied, twins = evaluated.memorization, evaluated.duplicates
    yield (
        f"Of {counted(copied.generated, 'image')} that it generated {share(copied.copies, copied.generated)} look like "
        f"copies of training images; of images that no model has seen {copied.expected:.1%} do."
    )
    if twins.p_value < UNLIKELY:
        yield f"It generates near-duplicates: {twins.share:.1%}, of real ones {twins.expected:.1%}."
    for name, shift in evaluated.drift.shifts.items():
        if shift.spreads is not None and abs(shift.spreads) > SEEN and abs(shift.difference) > 3 * shift.standard_error:
            yield (
                f"Its images have {'more' if shift.spreads > 0 else 'less'} {name.replace('_', ' against ')} than "
                f"real ones, by {abs(shift.spreads):.1f} of their standard deviations."
            )
    if (classes := evaluated.per_class) is None:
        return
    if (worst := classes.worst) is not None:
        kid = with_error(worst.kid, worst.kid_se)
        yield f"Its worst class is {escape_markdown(worst.name)}: KID {kid} on its images alone."
    if (least := classes.least_recognized) is not None and least.agreement_high < least.agreement_real:
        taken = f", most others for {escape_markdown(least.taken_for)}" if least.taken_for else ""
        yield (
            f"Of images generated as {escape_markdown(least.name)} {least.agreement:.0%} are taken for that{taken}; of "
            f"real images {least.agreement_real:.0%}."
        )
    if classes.skipped:
        names = [escape_markdown(each.name) for each in classes.skipped]
        more = [f"and {count(len(names) - CLASSES_SHOWN)} more"] if len(names) > CLASSES_SHOWN else []
        yield f"There were too few images to evaluate these classes: {', '.join([*names[:CLASSES_SHOWN], *more])}."


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ("", "")) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split())
