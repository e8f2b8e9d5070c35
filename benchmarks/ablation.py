"""Ablation of the default preset: trainings of equal length that differ in one choice.

    python benchmarks/ablation.py --seconds 180

Each has as many images as it can see in that time on an otherwise idle machine; that is measured first, for all of
them in turns. Then each trains and samples as in ``quality.py``. What was measured lies in ``--scratch`` and is not
measured again.
"""

import argparse
import json
from pathlib import Path

from quality import Darkroom, FrechetScorer, measure_rates, rate_of, result_of, train_and_score, workspace_of

from diffusion.data.dataset import Dataset

CHOICES: dict[str, list[str]] = {
    "the default": [],
    "v and cosine, plain": [
        "model.schedule=cosine",
        "model.prediction=v_prediction",
        "training.weighting=plain",
        "training.timestep_sampling=uniform",
    ],
    "v and cosine, min-SNR": [
        "model.schedule=cosine",
        "model.prediction=v_prediction",
        "training.weighting=min_snr",
        "training.timestep_sampling=uniform",
    ],
    "noise and linear, plain (DDPM)": [
        "model.schedule=linear",
        "model.prediction=epsilon",
        "training.weighting=plain",
        "training.timestep_sampling=uniform",
    ],
    "soft min-SNR": ["training.weighting=soft_min_snr"],
    "learned uncertainty": ["training.learned_uncertainty=true"],
    "independent noise levels": ["training.stratified_timesteps=false"],
    "no average of the weights": ["training.ema_decay=0"],
    "learning rate 2e-3": ["training.learning_rate=2e-3"],
    "learning rate 8e-3": ["training.learning_rate=8e-3"],
    "batches of 32": ["training.batch_size=32"],
    "batches of 128": ["training.batch_size=128"],
    "whole pixels, no patches": ["model.patch=1"],
    "64 channels": ["model.width=64"],
    "32 channels, and 64 at the lower resolution": ["model.width=32", "model.channel_mult=[1,2]"],
    "three resolutions": ["model.channel_mult=[1,1,1]"],
    "two blocks": ["model.blocks=2"],
    "no attention": ["model.attention=[]"],
    "attention in all blocks of the lowest resolution": ["model.channel_mult=[1,1]", "model.attention=[1]"],
    "float32": ["training.precision=fp32"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    args = parser.parse_args()
    workspace = workspace_of(args.scratch, None, 0)
    scorer = FrechetScorer(Dataset.open(workspace / "data" / "images"), workspace)
    contestants = [Darkroom(name, workspace, tuple(settings)) for name, settings in CHOICES.items()]
    measure_rates(contestants, args.seconds)
    for seed in range(args.seeds):
        for contestant in contestants:
            train_and_score(contestant, seed, scorer, args.seconds, args.samples)
    print(f"\nreal images: {scorer.real_baseline(args.samples):.0f}\n")
    print("| | Fréchet distance | images/s | parameters |")
    print("|---|---:|---:|---:|")
    for contestant in contestants:
        results = [
            json.loads(result_of(contestant, args.seconds, args.samples, seed).read_text())
            for seed in range(args.seeds)
        ]
        fd = sum(result["fd"] for result in results) / len(results)
        rate = rate_of(contestant, args.seconds)
        print(f"| {contestant.name} | {fd:.0f} | {rate:.0f} | {results[0]['parameters'] / 1e6:.2f} M |")


if __name__ == "__main__":
    main()
