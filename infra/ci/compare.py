"""A table for a change's review: what a small training under it scores, beside the champion.

``python infra/ci/compare.py data faces`` names the version of the data that the champion learned from; a training
on it compares. ``python infra/ci/compare.py figures faces reports/faces`` is the table, in Markdown, after ``darkroom
evaluate --local``. The champion is asked of the MLflow server and the bucket of the environment.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import data_source
from flows.local_stack.stack import join_servers

if TYPE_CHECKING:
    from flows.registry.model_versions import Version

MARK = "<!-- darkroom compare -->"
"""By which a forge finds the comment that it has to replace."""


def table(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Figures of the change and of the champion, in the order of ``ours``; real images' own are left out."""
    lines = ["| figure | champion | this change | difference |", "|---|---:|---:|---:|"]
    for name, value in ours.items():
        if name.startswith("real_baseline_"):
            continue
        other = theirs.get(name)
        difference = "" if other is None else f"{value - other:+.4g}"
        lines.append(f"| {name} | {'' if other is None else f'{other:.4g}'} | {value:.4g} | {difference} |")
    return "\n".join(lines)


def scores(champion: "Version") -> dict[str, float]:
    """What ``champion`` scored when it was evaluated, from its run's artifacts; empty if they are gone."""
    import mlflow

    from flows.tracking.runs import version_artifact

    try:
        artifact = f"runs:/{champion.run_id}/{version_artifact(champion.weights_sha256)}"
        return {name: float(value) for name, value in mlflow.artifacts.load_dict(artifact)["metrics"].items()}
    except (mlflow.MlflowException, OSError):
        return {}


def comment(model: str, report: Path) -> str:
    """The whole comment; raises UserError without an evaluation in ``report``."""
    try:
        ours = {name: float(value) for name, value in json.loads((report / "metrics.json").read_bytes()).items()}
        conditions = json.loads((report / "evaluation.json").read_bytes())["eval_key"]
    except FileNotFoundError as error:
        raise UserError(f"no evaluation in {report}: run `darkroom evaluate --local` first") from error
    try:
        champion = champion_of(model)
    except UserError as error:
        return "\n\n".join([MARK, table(ours, {}), f"Nothing to compare with: {error}"])
    said = (
        "Evaluated under the same conditions: the figures compare."
        if champion.tags.get("darkroom.eval_key") == conditions
        else "Evaluated under other conditions (data, features, sampling): **the figures do not compare**."
    )
    return "\n\n".join([MARK, f"Beside `{champion.uri}`.", table(ours, scores(champion)), said])


def data_version(model: str) -> str:
    """Digest of the version of the data that the champion of ``model`` learned from; raises UserError if it is gone."""
    from flows.datasets.catalog import Catalog

    champion = champion_of(model)
    dataset, content = (champion.tags.get(f"darkroom.{name}", "") for name in ("dataset", "content_digest"))
    for digest, manifest in Catalog.of(dataset, data_source()).versions().items():
        if manifest.content_digest == content:
            return digest
    raise UserError(f"what {champion.uri} learned from is not in the catalog of {dataset}: was it removed?")


def champion_of(model: str) -> "Version":
    """The champion of ``model``; raises UserError if there is none."""
    # Not at the top: a mistake in what is asked should wait for no server.
    from mlflow.client import MlflowClient

    from flows.registry.model_versions import resolve

    return resolve(MlflowClient(), f"models:/{model}@champion")


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description="A small training beside the champion.")
    verbs = parser.add_subparsers(required=True, dest="verb")
    verbs.add_parser("data", help="the version of the data that the champion learned from").add_argument("model")
    figures = verbs.add_parser("figures", help="a table of figures, in Markdown")
    figures.add_argument("model")
    figures.add_argument("report", type=Path, help="the folder of the evaluation, as reports/faces")
    asked = parser.parse_args()
    try:
        join_servers("mlflow", "s3")
        print(data_version(asked.model) if asked.verb == "data" else comment(asked.model, asked.report))
    except DarkroomError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
