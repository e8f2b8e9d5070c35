"""Image quality of each sampler over the number of network evaluations, and of DDPM in a thousand steps.

    python benchmarks/evaluations.py runs/digits/final.safetensors data/digits --image docs/images/evaluations.png

The metric is the Fréchet distance of the generated images to all the real ones, as in ``quality.py``; the real baseline
is that of as many real ones. The aim is ten evaluations within a tenth of a thousand steps of DDPM. What was measured
lies in ``--scratch`` and is not measured again.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from quality import FrechetScorer

from diffusion.checkpoints import load_model
from diffusion.common.files import digest_of, sha256_file, write_json
from diffusion.common.image_grids import figure_png
from diffusion.data.dataset import Dataset
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config

EVALUATIONS = (5, 8, 10, 12, 16, 20, 30, 50)
SAMPLERS = ("dpmpp_2m_sde", "dpmpp_2m", "unipc", "deis", "heun", "ddim", "ddpm")
BY_THE_BOOK = sampling_config(sampler="ddpm", steps=1000, sigma_max=None, sigma_min=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality/evaluations"))
    parser.add_argument("--image", type=Path, help="where to draw the curves (PNG)")
    args = parser.parse_args()

    model, dataset = load_model(args.model), Dataset.open(args.dataset)
    scorer = FrechetScorer(dataset, args.scratch)
    model_digest = sha256_file(args.model)[:8]

    def distance(config: SamplingConfig) -> float:
        """Measured, or as it was."""
        digest = digest_of([config.model_dump(mode="json"), args.samples])[:8]
        cache_file = args.scratch / f"{model_digest}-{config.sampler}{config.steps}-{digest}.json"
        if not cache_file.is_file():
            images = sample(model, range(args.samples), 0, config)
            write_json(cache_file, {"fd": scorer.distance(images.numpy())})
        return float(json.loads(cache_file.read_text())["fd"])

    curves = {
        name: {
            steps * (2 if name == "heun" else 1) - (name == "heun"): distance(
                sampling_config(sampler=name, steps=steps)
            )
            for steps in ((count + 1) // 2 if name == "heun" else count for count in EVALUATIONS)
        }
        for name in args.samplers
    }
    book, real_baseline = distance(BY_THE_BOOK), scorer.real_baseline(args.samples)
    print(f"{args.samples} images, Fréchet distance; DDPM in 1,000 steps {book:.0f}; real images {real_baseline:.0f}\n")
    print("| evaluations |" + "".join(f" {count} |" for count in EVALUATIONS) + "\n|---|" + "---:|" * len(EVALUATIONS))
    for name, curve in curves.items():
        print(f"| {name} |" + "".join(f" {fd:.0f} |" for fd in curve.values()))
    if args.image:
        args.image.write_bytes(figure_png(draw_curves(curves, book, real_baseline)))


def draw_curves(curves: dict[str, dict[int, float]], book: float, real_baseline: float) -> Figure:
    """Distance over evaluations, a line for each sampler."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=name)
    axes.axhline(book, color="black", linestyle="--", label="DDPM, 1,000 steps")
    axes.axhline(real_baseline, color="grey", linestyle=":", label="real images")
    axes.set(xlabel="evaluations of the network", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.set_xticks(EVALUATIONS, [str(count) for count in EVALUATIONS])
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
