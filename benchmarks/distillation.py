"""Students of a model, by evaluations: distance to real images, and images per second beside the teacher's.

    python benchmarks/distillation.py data/digits runs/digits/final.safetensors --seeds 0 1 2

Distils the model with each seed as ``darkroom distill`` does, in ``--scratch``; a repeated command goes on from there.
The teacher samples in 16 steps, with ``--guidance`` or ``--autoguidance``. Features are those of evaluation, and the
reference all images of the data set.
"""

import argparse
import time
from pathlib import Path

import torch

from diffusion.checkpoints import load_model, read_model_header
from diffusion.data.dataset import Dataset
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.kid import compute_kid
from diffusion.families.config import ModelConfig
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config
from diffusion.training.config import DistillationConfig, TrainingConfig, student_training
from diffusion.training.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=DistillationConfig().images, help="that a student sees")
    parser.add_argument("--count", type=int, default=500, help="images generated for each figure")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--interval", type=float, nargs=2)
    parser.add_argument("--autoguidance", type=float)
    parser.add_argument("--scratch", type=Path, default=Path("runs/students"))
    arguments = parser.parse_args()
    dataset, header = Dataset.open(arguments.dataset), read_model_header(arguments.model)
    extract = make_extractor(EvaluationConfig())
    rows = [*dataset.rows("train"), *dataset.rows("held_out")]
    real = torch.cat([extract(dataset.images(rows[at : at + 500])) for at in range(0, len(rows), 500)])
    moments = compute_moments(real)
    sampling = sampling_config(
        guidance=arguments.guidance, guidance_interval=arguments.interval, autoguidance=arguments.autoguidance
    )

    def report(name: str, path: Path, config: SamplingConfig) -> None:
        model, start = load_model(path), time.perf_counter()
        images = sample(model, range(arguments.count), 1, model.header.sampling(config))
        rate, features = arguments.count / (time.perf_counter() - start), extract(images)
        distance = frechet_distance(compute_moments(features), moments)
        print(
            f"{name:24} FD {distance:6.1f}  KID {compute_kid(features, real)[0]:6.3f}  {rate:6.1f} images/s", flush=True
        )

    report("teacher, 16 steps", arguments.model, sampling)
    assert isinstance(header.model, ModelConfig)
    for seed in arguments.seeds:
        training = TrainingConfig(images=1, seed=seed, output=arguments.scratch / str(seed))
        config = DistillationConfig(steps=2, images=arguments.images)
        training = student_training(training, config, sampling, str(arguments.model), header)
        student = train(arguments.dataset, arguments.scratch / str(seed), header.model, training, sampling).final
        for steps in (1, 2, 4, 8):
            report(f"seed {seed}, {steps} evaluations", student, sampling_config(sampler="consistency", steps=steps))


if __name__ == "__main__":
    main()
