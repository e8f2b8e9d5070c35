"""The page docs/comparison.md: models of each family, trained for the same time on the same images.

    python benchmarks/families.py                          # Fashion-MNIST, ten minutes each: about an hour on two cores
    python benchmarks/families.py --source FOLDER --size 32 --minutes 30

First, on an otherwise idle machine, it measures how many images each trains on per second, taking turns; from then on
the minutes are that many images, and what else the machine does makes no difference. Evaluation and ranking are those
of ``darkroom compare``. After a kill it resumes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from loading import FASHION, fashion
from quality import Darkroom, darkroom, measure_rates, rate_of

from diffusion.common.image_grids import make_grid, save_png
from diffusion.common.shapes import Images
from diffusion.common.threads import cores
from diffusion.data.dataset import Dataset
from diffusion.evaluation.ranking import Ranking, rank_models
from diffusion.evaluation.reports.ranking_report import Column, cost_columns, describe_ranking, metric_columns
from diffusion.families.config import FAMILIES
from flows.config import load_params

PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
IMAGES = PAGE.parent / "images" / "comparison"
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="of images; default: Fashion-MNIST")
    parser.add_argument("--name", default="fashion", help="of the data set")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--minutes", type=float, default=10, help="that each is trained")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/fashion"))
    args = parser.parse_args()

    args.scratch.mkdir(parents=True, exist_ok=True)
    source = args.source or str(args.scratch / fashion(args.scratch, args.size)["source"])
    (args.scratch / "params.yaml").write_text(f"training:\n  dataset: {args.name}\n")
    darkroom(args.scratch, "ingest", "--local", words=[f"ingest.source={source}", f"ingest.size={args.size}"])
    families = [Darkroom(name, args.scratch, (f"model.family={name}",)) for name in FAMILIES if name != "diffusers"]
    seconds = 60 * args.minutes
    measure_rates(families, seconds)
    models = {}
    for family in families:
        final = family.train(0, round(rate_of(family, seconds) * seconds))
        models[family.name] = final, load_params(args.scratch / "params.yaml", [*family.settings]).sampling
    config = load_params(args.scratch / "params.yaml", []).evaluation
    data = args.scratch / "data" / args.name
    ranking, images = rank_models(data, models, config, args.scratch / "reports" / args.name)
    save(images)
    PAGE.write_text(page(ranking, Dataset.open(data), args.source or str(FASHION), args.minutes))


def save(images: Mapping[str, Images]) -> None:
    """Lay out the images of each model, and real ones."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, images_of_model in images.items():
        save_png(IMAGES / f"{name}.png", make_grid(images_of_model, COLUMNS))


def page(ranking: Ranking, dataset: Dataset, source: str, minutes: float) -> str:
    """The comparison in Markdown."""
    names = [model.name for model in ranking.models]
    rows = [*metric_columns(ranking), *cost_columns(ranking.models)]
    machine = ranking.models[0].fingerprint
    return "\n\n".join(
        [
            "# Comparison of model families",
            f"{len(dataset):,} images of {dataset.manifest.size}×{dataset.manifest.size} (`{source}`), each family "
            f"trained once for {minutes:g} minutes with its default settings, on {cores()} cores "
            f"({machine.device}, {machine.precision}), evaluated on {ranking.models[0].scores.samples:,} images "
            "of the same seed against held-out ones. `python benchmarks/families.py` writes this page, "
            "and `darkroom compare` one for your own images.",
            "\n".join(f"- {finding}" for finding in describe_ranking(ranking)),
            _table(["", *names, "real"], rows),
            "In brackets are 95 % confidence intervals. The column real is the real baseline: training images instead "
            "of generated ones.",
            "What each is good at: diffusion gives the most faithful and most varied images, for the most work per "
            "image. The VAE finds the shape of whole images early, generates in one pass and also encodes images, but "
            "details are blurred and shapes run into each other. The GAN is the fastest, with sharp edges, but it has "
            "no likelihood, and after so short a training little variety, as its recall shows. The autoregressive "
            "model has an exact likelihood and the fewest bits per dimension, but generates pixel by pixel, and "
            "textures come right before shapes.",
            *(f"## {name}\n\n![Samples from {name}](images/comparison/{name}.png)" for name in names),
            "## Real\n\n![Held-out images](images/comparison/real.png)\n",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Column]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for title, meaning, cells in rows:
        figures = (f"{cell.value} ({cell.interval})" if cell.interval else cell.value for cell in cells)
        lines.append(f"| {title}: {meaning} | {' | '.join(figures)} |{' |' * (len(head) - 1 - len(cells))}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
