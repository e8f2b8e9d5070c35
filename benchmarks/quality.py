"""Image quality after ten minutes of training: Darkroom, diffusers and denoising-diffusion-pytorch.

    python benchmarks/quality.py --trainers-python /tmp/trainers/bin/python
    python benchmarks/quality.py --trainers-python … --images FOLDER --samples 1024 --seeds 1

First, on an otherwise idle machine, it measures how many images each trains on per second, each alone, taking turns;
from then on ten minutes are that many images, and what else the machine does makes no difference. Then each trains on
the same images and generates as many. The metric is the Fréchet distance to all the real images, on
EfficientNet-Lite0's features at 64 px; the real baseline is that of as many real ones. Results are kept in
``--scratch`` and not measured again, so that it resumes after a kill.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Protocol

import numpy as np
import torch
from loading import prepare, run
from matplotlib.figure import Figure
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from diffusion.checkpoints import load_model
from diffusion.common.files import digest_of, write_json
from diffusion.common.image_grids import figure_png, grid, save_png
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.generation.generate import sample
from flows.config import load_params

FEATURES_AT = 64
PEERS = ("diffusers", "denoising-diffusion-pytorch")
SHOWN = 64
GAP = 20
"""Pixels between grids that lie side by side."""
ROUNDS = 3
"""Times that each rate is measured."""
CURVE_SAMPLES = 512
"""Images drawn of the first seed before its end, for the curve."""
CHECKPOINTS = 6
"""The default: the curve has a point at each second one."""


@dataclass(frozen=True)
class RunResult:
    """What a contestant made of its time."""

    images: np.ndarray
    """(N, C, H, W) uint8."""
    figures: dict[str, Any]
    on_the_way: dict[int, np.ndarray]
    """Images drawn after so many images, before the end."""


class Contestant(Protocol):
    """Who trains and draws."""

    name: str
    workspace: Path

    @property
    def stem(self) -> str:
        """What the files of its results begin with."""

    def rate(self, seconds: float) -> float:
        """Images per second of training that takes ``seconds``, with all that belongs to it."""

    def work(self, seed: int, images: int, samples: int, curve: bool) -> RunResult:
        """Train on so many ``images`` and draw ``samples``; for a ``curve`` also on the way."""


@dataclass(frozen=True)
class Darkroom:
    """``darkroom train --local`` as it is configured by default, but for ``settings``."""

    name: str
    workspace: Path
    settings: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Other settings have other files, whatever they are called."""
        return f"darkroom-{digest_of(self.settings)[:8]}" if self.settings else "darkroom"

    def rate(self, seconds: float) -> float:
        """As the dry run says, with its pauses for sample grids."""
        words = [*self.settings, "training.images=null", f"training.minutes={seconds / 60}"]
        done = darkroom(self.workspace, "train", "--dry-run", words=words)
        return float(done["images"]) / seconds

    def train(self, seed: int, images: int) -> Path:
        """Train on so many ``images``, or go on; the final model."""
        training = [setting for setting in self.settings if not setting.startswith("sampling.")]
        # Where the same training goes on, or is found, whatever the sampler.
        output = f"runs/{digest_of([training, images, seed])[:8]}"
        chosen = {"training.minutes": "null", "training.images": images, "training.seed": seed}
        chosen |= {"training.output": output, "training.checkpoints": CHECKPOINTS, "training.keep": CHECKPOINTS}
        words = [*self.settings, *(f"{key}={value}" for key, value in chosen.items())]
        done = darkroom(self.workspace, "train", "--local", words=words)
        return self.workspace / str(done["final"])

    def work(self, seed: int, images: int, samples: int, curve: bool) -> RunResult:
        """Train, and draw with the default sampler."""
        final = self.train(seed, images)
        sampling = load_params(self.workspace / "params.yaml", list(self.settings)).sampling

        def drawn(path: Path, count: int) -> np.ndarray:
            return sample(load_model(path), range(count), seed, sampling).numpy()

        checkpoints = sorted((final.parent / "checkpoints").glob("*.safetensors"))[1:-1:2] if curve else []
        began = time.perf_counter()
        generated = drawn(final, samples)
        figures = {
            "parameters": sum(each.numel() for each in load_model(final).network.parameters()),
            "drawing_seconds": time.perf_counter() - began,
        }
        return RunResult(generated, figures, {int(path.stem): drawn(path, CURVE_SAMPLES) for path in checkpoints})


@dataclass(frozen=True)
class Peer:
    """The recipe ``name`` of ``trainers.py``."""

    name: str
    workspace: Path
    python: Path

    @property
    def stem(self) -> str:
        """Its own name."""
        return self.name

    def rate(self, seconds: float) -> float:
        """Of its steps alone: nothing belongs to it but steps."""
        return float(self._trainers("--rate", 12)["images_per_second"])

    def work(self, seed: int, images: int, samples: int, curve: bool) -> RunResult:
        """Train, and draw with its own sampler."""
        folder = self.workspace / f"drawn-{self.name}"
        options = ["--folder", folder, "--images", images, "--samples", samples, "--seed", seed]
        if curve:
            options += ["--on-the-way", CURVE_SAMPLES]
        figures = self._trainers(*options)
        generated = {int(path.stem): np.load(path) for path in folder.glob("*.npy")}
        return RunResult(generated.pop(images), figures, generated)

    def _trainers(self, *options: object) -> dict[str, Any]:
        script = Path(__file__).with_name("trainers.py")
        command = [self.python, script, self.name, self.workspace / "images.npy", *map(str, options)]
        done: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return done


def darkroom(workspace: Path, *verb: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """What ``darkroom VERB --json`` says in ``workspace``, with the settings in ``words``."""
    command = [str(Path(sys.executable).with_name("darkroom")), *verb, "--json"]
    done: dict[str, Any] = json.loads(run([*command, *(part for word in words for part in ("--set", word))], workspace))
    return done


def workspace_of(scratch: Path, source: Path | None, size: int) -> Path:
    """A workspace with the images of ``source``, and all of them in one array for the peers; None: Fashion-MNIST."""
    workspace = scratch / f"{source.stem}-{size}" if source else prepare(scratch, "32 px grey").parents[1]
    if source and not (workspace / "data").exists():
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / "params.yaml").write_text("training:\n  dataset: images\n")
        darkroom(workspace, "ingest", "--local", words=[f"ingest.source={source.resolve()}", f"ingest.size={size}"])
    if not (workspace / "images.npy").is_file():
        dataset = Dataset.open(workspace / "data" / "images")
        np.save(workspace / "images.npy", dataset.images(np.arange(len(dataset))).numpy())
    return workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers-python", type=Path, help="Python of the peers' venv (trainers.txt); none: no peers")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--images", type=Path, help="a source to train on; default: Fashion-MNIST, padded to 32×32")
    parser.add_argument("--size", type=int, default=64, help="of its images")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Darkroom's")
    parser.add_argument("--name", default="darkroom", help="what to call Darkroom with those settings")
    parser.add_argument("--image", type=Path, help="where to draw the curve over minutes (PNG), and NAME_grids")
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.images, args.size)
    contestants: list[Contestant] = [Darkroom(args.name, workspace, tuple(args.set))]
    if args.trainers_python:
        contestants += [Peer(name, workspace, args.trainers_python) for name in args.peers]
    judge = Judge(Dataset.open(workspace / "data" / "images"), workspace)
    measure_rates(contestants, args.seconds)
    for seed in range(args.seeds):
        for contestant in contestants:
            race(contestant, seed, judge, args.seconds, args.samples, curve=seed == 0 and args.image is not None)
    tell(contestants, judge, args)


def measure_rates(contestants: Sequence[Contestant], seconds: float) -> None:
    """Write down the median rate of each in trainings of so many ``seconds``, measured in turns."""
    missing = [each for each in contestants if not _rate_file(each, seconds).is_file()]
    rounds = [[each.rate(seconds) for each in missing] for _ in range(ROUNDS)]
    for contestant, rates in zip(missing, zip(*rounds, strict=True), strict=True):
        write_json(_rate_file(contestant, seconds), {"images_per_second": median(rates), "measured": rates})
        print(f"{contestant.name}: {median(rates):.1f} images/s", flush=True)


def race(contestant: Contestant, seed: int, judge: "Judge", seconds: float, samples: int, curve: bool = False) -> None:
    """Let ``contestant`` train and draw, and write down how far its images are from real ones."""
    measured = result_of(contestant, seconds, samples, seed)
    if measured.is_file():
        return
    images = round(rate_of(contestant, seconds) * seconds)
    drawn = contestant.work(seed, images, samples, curve)
    on_the_way = drawn.on_the_way | ({images: drawn.images[:CURVE_SAMPLES]} if curve else {})
    figures = drawn.figures | {
        "images": images,
        "fd": judge.distance(drawn.images),
        "curve": {at / images * seconds / 60: judge.distance(each) for at, each in sorted(on_the_way.items())},
    }
    save_png(measured.with_suffix(".png"), grid(torch.from_numpy(drawn.images[:SHOWN])))
    write_json(measured, figures)
    print(measured.stem, json.dumps(figures), flush=True)


def tell(contestants: list[Contestant], judge: "Judge", args: argparse.Namespace) -> None:
    """Print the table, and draw the curve if there is to be one."""
    floor = judge.floor(args.samples)
    print(f"\n{args.seconds:g} s of training, {args.samples} images, Fréchet distance; real ones have {floor:.0f}\n")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for contestant in contestants:
        found = [
            json.loads(result_of(contestant, args.seconds, args.samples, seed).read_text())
            for seed in range(args.seeds)
        ]
        fds = [each["fd"] for each in found]
        spread = f"± {stdev(fds):.0f}" if len(fds) > 1 else ""
        rate, parameters = rate_of(contestant, args.seconds), found[0]["parameters"] / 1e6
        print(f"{contestant.name:32} {mean(fds):7.0f} {spread:7} {rate:6.0f} images/s {parameters:6.2f} M")
        curve = {float(minutes): fd for minutes, fd in found[0]["curve"].items()}
        axes.plot(list(curve), list(curve.values()), marker="o", label=contestant.name)
    axes.axhline(judge.floor(CURVE_SAMPLES), color="grey", linestyle=":", label="real images")
    axes.set(xlabel="minutes of training", ylabel=f"Fréchet distance, {CURVE_SAMPLES} images", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    if args.image:
        args.image.write_bytes(figure_png(figure))
        grids = [result_of(each, args.seconds, args.samples, 0).with_suffix(".png") for each in contestants]
        side_by_side(grids).save(args.image.with_stem(f"{args.image.stem}_grids"))


def side_by_side(paths: Sequence[Path]) -> Image.Image:
    """Grids of equal size, the first half of each."""
    grids = [Image.open(path) for path in paths]
    width, height = grids[0].width, grids[0].height // 2
    sheet = Image.new(grids[0].mode, (len(grids) * width + (len(grids) - 1) * GAP, height), "white")
    for number, each in enumerate(grids):
        sheet.paste(each.crop((0, 0, width, height)), (number * (width + GAP), 0))
    return sheet


class Judge:
    """Knows the real images of ``dataset``, and keeps their features in ``folder``."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.extractor = EfficientNetLite0(FEATURES_AT)
        kept = folder / f"features-{dataset.manifest.content_digest[:16]}.npy"
        if not kept.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(kept, self.extractor(dataset.images(np.arange(len(dataset)))).numpy())
        self.real = np.load(kept)
        self.moments = fid_features_to_statistics(torch.from_numpy(self.real))

    def distance(self, images: np.ndarray) -> float:
        """Fréchet distance of ``images`` (N, C, H, W) from the real ones."""
        return self._distance(self.extractor(torch.from_numpy(images)))

    def floor(self, count: int) -> float:
        """That of so many real ones."""
        chosen = np.random.default_rng(0).permutation(len(self.real))[:count]
        return self._distance(torch.from_numpy(self.real[chosen]))

    def _distance(self, features: torch.Tensor) -> float:
        moments = fid_features_to_statistics(features)
        return float(fid_statistics_to_metric(moments, self.moments, verbose=False)[KEY_METRIC_FID])


def rate_of(contestant: Contestant, seconds: float) -> float:
    """Images per second, as it was measured."""
    return float(json.loads(_rate_file(contestant, seconds).read_text())["images_per_second"])


def _rate_file(contestant: Contestant, seconds: float) -> Path:
    return contestant.workspace / f"{contestant.stem}-{seconds:g}s-rate.json"


def result_of(contestant: Contestant, seconds: float, samples: int, seed: int) -> Path:
    """Where the result of a race lies."""
    return contestant.workspace / f"{contestant.stem}-{seconds:g}s-{samples}-{seed}.json"


if __name__ == "__main__":
    main()
