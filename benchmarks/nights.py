"""Ten nights of a set that grows by 5 % each and changes its style once: warm starts against trainings from nothing.

    PYTHONPATH=. python benchmarks/nights.py --set fashion --images 40000
    PYTHONPATH=. python benchmarks/nights.py --set faces --first pixel-art/ --second open-peeps/
    PYTHONPATH=. python benchmarks/nights.py --plot docs/images/nights.png

Each night, or those in ``--fresh``, trains from nothing on ``--images``; each of ARMS goes on from its own model of the
night before, on a share of that. All are judged by the same real images, as many of each style as the night's set has.
What was measured lies in ``--scratch``, in NAME.json, and is not measured again.
"""

import argparse
import json
import resource
from collections.abc import Sequence
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusion.api import engine
from diffusion.api.config import ExperimentConfig
from diffusion.checkpoints import load_model
from diffusion.common.files import write_bytes, write_json
from diffusion.common.image_grids import figure_png, make_grid, save_png
from diffusion.data.dataset import Dataset
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.copies import detect_memorization, shifted_thumbnails
from diffusion.evaluation.metrics.neighbours import find_nearest
from diffusion.evaluation.metrics.pixel_metrics import compare_appearance, measure_appearance
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.generation.generate import sample
from tests.builders.real_images import clothes

NIGHTS, CHANGE = 10, 6
"""Nights, and the one before which the other style arrives: a quarter of the set, and all that is added later."""
GROWTH, ARRIVAL = 0.05, 0.25


@dataclass(frozen=True)
class Arm:
    """A chain of warm starts."""

    share: float
    """Of the images that a training from nothing sees."""
    rate: float
    """Factor of the learning rate."""
    state: bool = True
    """Whether it goes on with raw weights and moments; False: with the averaged weights alone."""


ARMS = {
    "1/4, rate 1": Arm(1 / 4, 1),
    "1/4, rate 1/2": Arm(1 / 4, 1 / 2),
    "1/4, rate 1/4": Arm(1 / 4, 1 / 4),
    "1/8, rate 1/2": Arm(1 / 8, 1 / 2),
    "1/4, rate 1/2, weights alone": Arm(1 / 4, 1 / 2, state=False),
}
FRESH = "from nothing"


class Simulation:
    """The nights of one set, in the folder ``scratch/NAME`` with its images and runs."""

    def __init__(self, name: str, styles: Sequence[np.ndarray], args: argparse.Namespace) -> None:
        self.folder, self.args, self.styles = args.scratch / name, args, styles
        self.results = args.scratch / f"{name}.json"
        self.measured: dict[str, dict[str, Any]] = json.loads(self.results.read_text()) if self.results.exists() else {}
        self.extract = make_extractor(EvaluationConfig())
        self.folder.mkdir(parents=True, exist_ok=True)

    def counts(self, night: int) -> tuple[int, int]:
        """Images of each style that the set has in a ``night`` (1, 2, …)."""
        before = round(self.args.start * (1 + GROWTH) ** (min(night, CHANGE - 1) - 1))
        if night < CHANGE:
            return before, 0
        return before, round(before * ((1 + ARRIVAL) * (1 + GROWTH) ** (night - CHANGE) - 1))

    def config(self, fields: dict[str, Any], output: str) -> ExperimentConfig:
        """The configuration of a training in runs/``output``; ``fields`` are those of the section training."""
        training = {"dataset": "images", "cpu_threads": 1, "workers": 1, "checkpoints": 2, "output": f"runs/{output}"}
        ingest = {"source": "images", "size": self.args.size, "held_out": 0.05}
        return ExperimentConfig.parse(
            {"ingest": ingest, "training": training | fields, "model": {"conditional": False}}
        )

    def run(self) -> None:
        """Train and judge, night by night."""
        for night in range(1, NIGHTS + 1):
            arms = [*([FRESH] if night in self.args.fresh else []), *(self.args.arms if night > 1 else [])]
            if all(f"{night} {arm}" in self.measured for arm in arms):
                continue
            self.ingest(night)
            for arm in arms:
                if f"{night} {arm}" not in self.measured:
                    before = resource.getrusage(resource.RUSAGE_SELF)
                    path = self.train(night, arm)
                    after = resource.getrusage(resource.RUSAGE_SELF)
                    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    self.measured[f"{night} {arm}"] = self.judge(night, arm, path) | {"seconds": seconds}
                    write_json(self.results, self.measured)
                    print(night, arm, self.measured[f"{night} {arm}"], flush=True)

    def ingest(self, night: int) -> None:
        """Add the images of a ``night`` to the set."""
        for style, count in enumerate(self.counts(night)):
            for number in range(count):
                path = self.folder / "images" / f"{style}-{number:05}.png"
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    Image.fromarray(self.styles[style][number]).save(path)
        if len(list((self.folder / "images").iterdir())) > sum(self.counts(night)):
            raise SystemExit(f"{self.folder} has the images of later nights: measure new arms in another --scratch")
        with chdir(self.folder):
            engine.ingest(self.config({"images": 64}, "none"))

    def train(self, night: int, name: str) -> Path:
        """Train one arm; returns its last checkpoint."""
        fields: dict[str, Any] = {"images": self.args.images}
        if name != FRESH:
            arm = ARMS[name]
            earlier = self.folder / "runs" / self.run_name(night - 1, name if night > 2 else FRESH)
            last = sorted((earlier / "checkpoints").glob("*.safetensors"))[-1]
            start = last if arm.state else earlier / "final.safetensors"
            fields = {"images": round(self.args.images * arm.share), "learning_rate": 4e-3 * arm.rate}
            fields |= {"init_from": str(start), "warm_start": True, "warmup_images": self.args.warmup}
        with chdir(self.folder):
            return engine.train(self.config(fields, self.run_name(night, name))).final.absolute()

    @staticmethod
    def run_name(night: int, name: str) -> str:
        return f"{night:02}-{name.replace('/', ':').replace(' ', '-').replace(',', '')}"

    def judge(self, night: int, name: str, path: Path) -> dict[str, float]:
        """Measure the quality of a model by real images that none was trained on, and by those of the set."""
        model, config = load_model(path), self.config({"images": 64}, "none").sampling
        images = sample(model, range(self.args.samples), 0, config, at_once=1)
        if name in (FRESH, "1/4, rate 1/2"):
            save_png(self.folder / f"{self.run_name(night, name)}.png", make_grid(images[:64], 8))
        first, second = self.counts(night)
        share = second / (first + second)
        real = self.unseen(1 - share, 0, self.args.samples), self.unseen(share, 1, self.args.samples)
        reference = torch.cat([part for part in real if len(part)])
        with closing(Dataset.open(self.folder / "data" / "images")) as dataset:
            training = dataset.images(dataset.rows("train"))
        scores = compute_scores(self.features(images), self.features(reference), "efflite0")
        known = shifted_thumbnails(training)[0]
        near = {"pixels": find_nearest(shifted_thumbnails(images), [known])}
        memorization = detect_memorization(near, {"pixels": find_nearest(shifted_thumbnails(reference), [known])})
        drift = compare_appearance(measure_appearance(images), measure_appearance(reference)).metrics()
        return {
            **{figure: getattr(scores, figure) for figure in ("kid", "kid_se", "fd", "precision", "recall")},
            "copies": memorization.share,
            "drift": max(map(abs, drift.values())),
        }

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extract(batch) for batch in torch.split(images, 128)])

    def unseen(self, share: float, style: int, samples: int) -> Tensor:
        """The last images of a style, resized as the set's are."""
        count = round(share * samples)
        side = self.args.size
        resized = [
            np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.LANCZOS))
            for x in self.styles[style][len(self.styles[style]) - count :]
        ]
        if not resized:
            return torch.zeros(0, 1 if self.styles[style].ndim == 3 else 3, side, side, dtype=torch.uint8)
        return torch.from_numpy(np.stack(resized).reshape(count, side, side, -1)).permute(0, 3, 1, 2)


def read_images(folder: Path) -> np.ndarray:
    """Read the images in a folder, (N, H, W, 3), in an order of their own."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    images = []
    for number in np.random.default_rng(0).permutation(len(paths)):
        image = Image.open(paths[number]).convert("RGBA")
        images.append(np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")))
    return np.stack(images)


def styles_of(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The images of both styles, (N, H, W) or (N, H, W, 3): clothes, then shoes and bags, or two folders."""
    if args.set == "fashion":
        images, labels = clothes(20_000)
        return tuple(images[:, 0].numpy()[mask] for mask in (labels.numpy() < 5, labels.numpy() >= 5))
    return read_images(args.first), read_images(args.second)


def plot(scratch: Path, path: Path) -> None:
    """Draw KID over the nights, with the mean cost of each chain in processor seconds."""
    files = sorted(scratch.glob("*.json"))
    figure = Figure((4.2 * len(files), 3.6), layout="constrained")
    for axes, file in zip(np.atleast_1d(figure.subplots(1, len(files))), files, strict=True):
        measured = json.loads(file.read_text())
        for name in (FRESH, *ARMS):
            results = {night: measured.get(f"{night} {name}") for night in range(1, NIGHTS + 1)}
            nights = [night for night, result in results.items() if result]
            if not nights:
                continue
            seconds = fmean(result["seconds"] for result in results.values() if result)
            line = [results[night]["kid"] for night in nights]
            axes.plot(nights, line, ".-", label=f"{name}: {seconds:.0f} s a night", lw=2 if name == FRESH else 1)
        axes.axvline(CHANGE - 0.5, color="grey", lw=0.8, ls=":")
        axes.set(title=file.stem, xlabel="night", ylabel="KID", ylim=(0, None))
        axes.legend(fontsize=6)
    write_bytes(path, figure_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", help="fashion, or a name for the images in --first and --second")
    parser.add_argument("--first", type=Path, help="folder of the images of the first style")
    parser.add_argument("--second", type=Path, help="folder of the images of the second style")
    parser.add_argument("--size", type=int, default=32, help="of the images")
    parser.add_argument("--start", type=int, default=1200, help="images of the first night")
    parser.add_argument("--images", type=int, default=40_000, help="that a training from nothing sees")
    parser.add_argument("--warmup", type=int, default=1_000, help="images over which the rate of a warm start rises")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--fresh", nargs="*", type=int, default=list(range(1, NIGHTS + 1)), help="nights from nothing")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/nights"))
    parser.add_argument("--plot", type=Path, help="draw what was measured (PNG), and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plot:
        plot(args.scratch, args.plot)
        return
    Simulation(args.set, styles_of(args), args).run()


if __name__ == "__main__":
    main()
