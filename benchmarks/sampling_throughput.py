"""Sampling throughput of Darkroom and of diffusers pipelines with the same weights, exported.

    python benchmarks/sampling_throughput.py --model runs/faces/final.safetensors
    python benchmarks/sampling_throughput.py --seconds 600

Without a model, the default one is trained first, on Fashion-MNIST in 32×32, as ``quality.py`` does. First, images per
second with the same network, sampler and steps. Then, with Darkroom's samplers, the fewest steps whose images are no
further from the real ones than those of DDIM with 50 steps in diffusers, and images per second of both. Distances are
Fréchet distances on EfficientNet-Lite0's features at 64 px to all the real images; the real baseline is that of as many
real ones. Rates are measured in turns, on an otherwise idle machine, and the median counts. diffusers' pipelines run as
they are loaded, and with weights loaded in bfloat16. What was measured lies in ``--scratch`` and is not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from quality import Darkroom, FrechetScorer, measure_rates, rate_of, workspace_of

from diffusion.checkpoints import load_model
from diffusion.common.files import digest_of, sha256_file, write_json
from diffusion.data.dataset import Dataset
from diffusion.diffusers_format import DarkroomUNet
from diffusion.diffusers_format.pipeline import scheduler_of
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.model import to_uint8
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config

BATCH = 64
"""Images that a pipeline generates at once, as many as Darkroom computes by default."""
DIFFUSERS_CONFIG = sampling_config(sampler="ddim", steps=50)
EQUAL_CONFIGS = (sampling_config(), DIFFUSERS_CONFIG)
"""Equal settings of both sides: our default, and theirs."""
CANDIDATES: tuple[str, ...] = ("dpmpp_2m_sde", "dpmpp_2m", "deis", "unipc")
LEAST_STEPS, MAX_STEPS = 5, 16
TYPES = {"diffusers": torch.float32, "diffusers, bf16": torch.bfloat16}


class Contestant(Protocol):
    """A sampler of images."""

    def generate(self, count: int) -> np.ndarray:
        """So many images, (N, C, H, W) uint8."""


@dataclass(frozen=True)
class DarkroomSampler:
    """Darkroom's sampler."""

    model: DDPMModel
    config: SamplingConfig

    def generate(self, count: int) -> np.ndarray:
        return sample(self.model, range(count), 0, self.config).numpy()


class DiffusersPipeline:
    """A stock pipeline with the scheduler of our ``config`` and weights of a ``dtype``."""

    def __init__(self, model: DDPMModel, config: SamplingConfig, dtype: torch.dtype, scratch: Path) -> None:
        kind: Any = DDIMPipeline if config.sampler == "ddim" else DDPMPipeline
        folder = scratch / f"exported-{digest_of(config.model_dump(mode='json'))[:8]}"
        kind(DarkroomUNet.from_model(model, config), scheduler_of(model, config)).save_pretrained(folder)
        self.pipe = kind.from_pretrained(folder).to(dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = config.steps

    def generate(self, count: int) -> np.ndarray:
        generator, batches = torch.Generator().manual_seed(0), -(-count // BATCH)
        images = [
            self.pipe(BATCH, generator, num_inference_steps=self.steps, output_type="pt").images for _ in range(batches)
        ]
        return to_uint8(torch.cat(images)[:count] * 2 - 1).numpy()


@dataclass(frozen=True)
class MeasurementCache:
    """Results under ``folder`` that are not measured twice."""

    folder: Path

    def __call__(self, inputs: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What ``measure`` found for ``inputs``, now or earlier."""
        path = self.folder / f"{digest_of(inputs)[:16]}.json"
        if not path.is_file():
            write_json(path, {"measured": dict(inputs), "found": measure()})
            print(path.read_text().replace("\n", " "), flush=True)
        return json.loads(path.read_text())["found"]


def rates(contestants: Mapping[str, Contestant], count: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each, in so many turns, none of which is its first."""
    for each in contestants.values():
        each.generate(BATCH)
    rates_by_name: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, each in contestants.items():
            start = time.perf_counter()
            each.generate(count)
            rates_by_name[name].append(count / (time.perf_counter() - start))
    return rates_by_name


def train_default(workspace: Path, seconds: float) -> Path:
    """The default network after so many seconds, or as many images as an idle machine sees in them."""
    darkroom = Darkroom("darkroom", workspace, ())
    measure_rates([darkroom], seconds)
    return darkroom.train(0, round(rate_of(darkroom, seconds) * seconds))


@dataclass(frozen=True)
class Comparison:
    """One model on both sides; ``inputs`` are what its results depend on."""

    model: DDPMModel
    scorer: FrechetScorer
    cache: MeasurementCache
    inputs: Mapping[str, Any]

    def pipeline(self, config: SamplingConfig, name: str) -> DiffusersPipeline:
        """The pipeline called ``name``."""
        return DiffusersPipeline(self.model, config, TYPES[name], self.cache.folder)

    def rates(self, ours: SamplingConfig, theirs: SamplingConfig, count: int, rounds: int) -> dict[str, float]:
        """Images per second of all, with so many images a turn."""

        def measure() -> dict[str, list[float]]:
            others = {name: self.pipeline(theirs, name) for name in TYPES}
            return rates({"Darkroom": DarkroomSampler(self.model, ours), **others}, count, rounds)

        settings = {"ours": short(ours), "theirs": short(theirs), "count": count, "rounds": rounds}
        return {name: median(each) for name, each in self.cache({**self.inputs, **settings}, measure).items()}

    def distance(self, name: str, config: SamplingConfig, samples: int) -> float:
        """Of so many images of the contestant called ``name``."""

        def measure() -> float:
            contestant = DarkroomSampler(self.model, config) if name == "Darkroom" else self.pipeline(config, name)
            return self.scorer.distance(contestant.generate(samples))

        return float(self.cache({**self.inputs, "samples": samples, name: short(config)}, measure))

    def fewest(self, bar: float, samples: int) -> SamplingConfig | None:
        """The sampler that needs the fewest steps to come as near as ``bar``; None: none does."""
        best: SamplingConfig | None = None
        for sampler in CANDIDATES:
            for steps in range(LEAST_STEPS, best.steps if best else MAX_STEPS + 1):
                config = sampling_config(sampler=sampler, steps=steps)
                if self.distance("Darkroom", config, samples) <= bar:
                    best = config
                    break
        return best


def short(config: SamplingConfig) -> str:
    return f"{config.sampler}, {config.steps} steps"


def print_rates(rates_by_name: Mapping[str, float], words: Mapping[str, str]) -> None:
    for name, rate in rates_by_name.items():
        ratio = "" if name == "Darkroom" else f"{rates_by_name['Darkroom'] / rate:6.2f}×"
        print(f"{name:16} {words[name]:36} {rate:8.1f} images/s {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="final.safetensors of Fashion-MNIST; default: one is trained")
    parser.add_argument("--seconds", type=float, default=600, help="of that training")
    parser.add_argument("--samples", type=int, default=2048, help="images of which a distance is measured")
    parser.add_argument("--count", type=int, default=256, help="images generated in each turn; 64 for each core")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, None, 32)
    weights = args.model or train_default(workspace, args.seconds)
    inputs = {"weights": sha256_file(weights), "threads": torch.get_num_threads()}
    scorer = FrechetScorer(Dataset.open(workspace / "data" / "images"), workspace)
    model = load_model(weights)
    assert isinstance(model, DDPMModel)
    comparison = Comparison(model, scorer, MeasurementCache(workspace / "sampling"), inputs)
    compare_rates = partial(comparison.rates, count=args.count, rounds=args.rounds)
    for config in EQUAL_CONFIGS:
        rates_by_name = compare_rates(config, config)
        print()
        print_rates(rates_by_name, dict.fromkeys(rates_by_name, short(config)))

    distances = {name: comparison.distance(name, DIFFUSERS_CONFIG, args.samples) for name in TYPES}
    best = comparison.fewest(distances["diffusers"], args.samples)
    print(f"\n{args.samples} images, Fréchet distance; real ones have {scorer.real_baseline(args.samples):.0f}")
    if best is None:
        print(f"no sampler of ours comes to {distances['diffusers']:.0f} in {MAX_STEPS} steps")
        return
    distances["Darkroom"] = comparison.distance("Darkroom", best, args.samples)
    configs = dict.fromkeys(TYPES, DIFFUSERS_CONFIG) | {"Darkroom": best}
    words = {name: f"{short(each)}: {distances[name]:.0f}" for name, each in configs.items()}
    print_rates(compare_rates(best, DIFFUSERS_CONFIG), words)


if __name__ == "__main__":
    main()
