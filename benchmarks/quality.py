"""How good pictures are after ten minutes of training: Darkroom, diffusers and denoising-diffusion-pytorch.

    python benchmarks/quality.py --trainers-python /tmp/trainers/bin/python

Each trains on the same pictures for the same time on the same cores, alone, and draws as many. What counts is the
Fréchet distance to all the real pictures, on EfficientNet-Lite0's features at 64 px; the floor is that of as many real
ones. What was measured lies in ``--scratch`` under a name of its own and is not measured again: kill it, and go on.
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from loading import FASHION, prepare, run
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from diffusion.evaluation.features import EfficientNetLite0
from diffusion.files import digest_of
from diffusion.grids import grid, save_png
from diffusion.model import load_model
from diffusion.sampling import sample
from flows.params import load_params

FEATURES_AT = 64
PEERS = ("diffusers", "denoising-diffusion-pytorch")
SHOWN = 64
SET = "32 px grey"
"""Of ``loading.py``: nine tenths of it are trained on."""


def fashion() -> np.ndarray:
    """Fashion-MNIST's training pictures padded to 32×32: (60000, 1, 32, 32) uint8."""
    if not FASHION.is_dir():
        raise SystemExit(f"no Fashion-MNIST in {FASHION}: apt-get install dataset-fashion-mnist")
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as packed:
        pictures = np.frombuffer(packed.read()[16:], np.uint8).reshape(-1, 1, 28, 28)
    return np.pad(pictures, ((0, 0), (0, 0), (2, 2), (2, 2)))


def darkroom(
    scratch: Path, seconds: float, seed: int, samples: int, settings: list[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """``darkroom stage train`` as it is configured by default, but for ``settings``, told of no classes."""
    workspace = prepare(scratch, SET).parents[1]
    output = f"runs/{time.time_ns()}"
    chosen = {"training.minutes": seconds / 60, "training.images": "null", "training.seed": seed}
    chosen |= {"training.output": output, "model.conditional": "false"}
    words = [f"{key}={value}" for key, value in chosen.items()] + settings
    command = [str(Path(sys.executable).with_name("darkroom")), "stage", "train", "--json"]
    done = json.loads(run([*command, *(part for word in words for part in ("--set", word))], workspace))
    model = load_model(workspace / done["final"])
    sampling = load_params(workspace / "params.yaml", words).sampling
    began = time.perf_counter()
    drawn = sample(model, range(samples), seed, sampling)
    figures = {
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "images": done["images"],
        "drawing_seconds": time.perf_counter() - began,
    }
    return drawn.numpy(), figures


def peer(
    name: str, python: Path, scratch: Path, seconds: float, seed: int, samples: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The recipe ``name`` of ``trainers.py``."""
    pictures, drawn = scratch / "pictures.npy", scratch / "drawn.npy"
    if not pictures.is_file():
        np.save(pictures, fashion())
    script = Path(__file__).with_name("trainers.py")
    options = ["--seconds", seconds, "--samples", samples, "--seed", seed]
    done = subprocess.run(
        [python, script, name, pictures, drawn, *map(str, options)], stdout=subprocess.PIPE, check=True
    )
    return np.load(drawn), json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers-python", type=Path, help="Python of the peers' venv (trainers.txt); none: no peers")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Darkroom's, to compare"
    )
    parser.add_argument("--name", default="darkroom", help="what to call Darkroom with those settings")
    args = parser.parse_args()

    args.scratch.mkdir(parents=True, exist_ok=True)
    extractor = EfficientNetLite0(FEATURES_AT)
    real = _kept(args.scratch / "real.npy", lambda: extractor(torch.from_numpy(fashion())).numpy())
    moments = fid_features_to_statistics(torch.from_numpy(real))
    works: dict[str, Callable[[int], tuple[np.ndarray, dict[str, Any]]]] = {
        args.name: lambda seed: darkroom(args.scratch, args.seconds, seed, args.samples, args.set)
    }
    for name in PEERS if args.trainers_python else ():
        works[name] = lambda seed, name=name: peer(  # type: ignore[misc]
            name, args.trainers_python, args.scratch, args.seconds, seed, args.samples
        )
    for seed in range(args.seeds):
        for name, work in works.items():
            measured = args.scratch / f"{_stem(name, args)}-{seed}.json"
            if measured.is_file():
                continue
            drawn, figures = work(seed)
            fd = distance(extractor(torch.from_numpy(drawn)), moments)
            save_png(measured.with_suffix(".png"), grid(torch.from_numpy(drawn[:SHOWN])))
            measured.write_text(json.dumps(figures | {"fd": fd}))
            print(measured.stem, json.dumps(figures), f"fd {fd:.1f}", flush=True)

    chosen = np.random.default_rng(0).permutation(len(real))[: args.samples]
    floor = distance(torch.from_numpy(real[chosen]), moments)
    print(
        f"\n{args.seconds:g} s of training, {args.samples} pictures, Fréchet distance; real pictures have {floor:.0f}\n"
    )
    for name in works:
        stem = _stem(name, args)
        found = [json.loads(path.read_text()) for path in args.scratch.glob(f"{stem}-*.json")]
        fds = [each["fd"] for each in found]
        spread = f"± {stdev(fds):.0f}" if len(fds) > 1 else ""
        rate = mean(each["images"] for each in found) / args.seconds
        print(f"{name:32} {mean(fds):7.0f} {spread:7} {rate:6.0f} pictures/s {found[0]['parameters'] / 1e6:6.2f} M")


def _stem(name: str, args: argparse.Namespace) -> str:
    """What the files of a contestant begin with: other settings have other files."""
    chosen = digest_of(args.set)[:8] if name not in PEERS else "own"
    return f"{name}-{chosen}-{args.seconds:g}s-{args.samples}"


def distance(features: torch.Tensor, moments: dict[str, np.ndarray]) -> float:
    """Fréchet distance of ``features`` (N, 1280) from real ones with these ``moments``."""
    return float(fid_statistics_to_metric(fid_features_to_statistics(features), moments, verbose=False)[KEY_METRIC_FID])


def _kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not path.is_file():
        np.save(path, make())
    return np.load(path)


if __name__ == "__main__":
    main()
