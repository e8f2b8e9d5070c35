"""Low-rank adaptation against training from scratch, after equal minutes on few images of another style.

    python benchmarks/fine_tuning.py --images FOLDER --base examples/emoji.safetensors --image plate.png

FOLDER has captions (metadata.csv). First it measures how many images each way of training sees per second, on an
otherwise idle machine and in turns; from then on ``--seconds`` are that many images. Each model then generates for the
captions of the held-out images and is evaluated on them; the plate shows held-out images and, below, what each made of
their captions. What is there in ``--scratch`` is not done again.
"""

import argparse
import json
from pathlib import Path

import torch
from quality import Darkroom, darkroom, measure_rates, rate_of

from diffusion.checkpoints import load_model
from diffusion.common.image_grids import make_grid, save_png
from diffusion.data.dataset import Dataset
from diffusion.evaluation.reports.evaluation_report import describe_kid
from diffusion.evaluation.results import Evaluation
from diffusion.generation.generate import conditions_of, sample
from flows.config import load_params

SHOWN = 10
"""Columns of the plate."""
GUIDED = ["sampling.guidance=3", "sampling.guidance_interval=[0.4,10]"]
"""How all models sample: the guidance that evaluation chose for the base."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a source of images with captions")
    parser.add_argument("--held-out", type=float, default=0.645, help="share that training never sees")
    parser.add_argument("--base", type=Path, default=Path("examples/emoji.safetensors"), help="a model of captions")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the adapter")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/fine-tuning"))
    parser.add_argument("--image", type=Path, help="where to draw the plate (PNG)")
    args = parser.parse_args()

    model = load_model(args.base)
    network = model.config.model_dump(mode="json", exclude_defaults=True)
    shared = [f"model.{name}={json.dumps(value)}" for name, value in network.items()] + ["training.batch_size=64"]
    adapted = [f"training.init_from={args.base.resolve()}", f"training.adapter.rank={args.rank}"]
    settings_by_way = {
        "from scratch": shared,
        "LoRA": [*shared, *adapted, f"training.learning_rate={args.learning_rate}"],
    }
    workspace = args.scratch
    data = workspace / "data" / "images"
    if not data.exists():
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / "params.yaml").write_text("training:\n  dataset: images\n")
        source = [f"ingest.source={args.images.resolve()}", f"ingest.size={model.header.size}"]
        darkroom(workspace, "ingest", "--local", words=[*source, f"ingest.held_out={args.held_out}"])
    contestants = [Darkroom(name, workspace, tuple(settings)) for name, settings in settings_by_way.items()]
    measure_rates(contestants, args.seconds)

    models = {"the base": args.base}
    print(f"{'the base':16} {kid_of(workspace, args.base)}", flush=True)
    for contestant in contestants:
        images = round(rate_of(contestant, args.seconds) * args.seconds)
        for seed in range(args.seeds):
            final = contestant.train(seed, images)
            models.setdefault(contestant.name, final)
            print(f"{contestant.name:16} seed {seed}, {images:,} images: {kid_of(workspace, final)}", flush=True)
    if args.image:
        dataset = Dataset.open(data)
        rows = dataset.rows("held_out")[:SHOWN]
        sampling = load_params(workspace / "params.yaml", GUIDED).sampling
        generated = [
            sample(load_model(path), range(SHOWN), 0, sampling, conditions=conditions_of(dataset, rows, []))
            for path in models.values()
        ]
        save_png(args.image, make_grid(torch.cat([dataset.images(rows), *generated]), SHOWN))


def kid_of(workspace: Path, model: Path) -> str:
    """KID on the held-out images by their captions, with its 95 % interval and that of real images, in words."""
    summary = darkroom(workspace, "evaluate", "--local", "--model", str(model.resolve()), words=GUIDED)
    return describe_kid(Evaluation.read((workspace / summary["report"]).with_name("evaluation.json")))


if __name__ == "__main__":
    main()
