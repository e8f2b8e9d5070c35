"""Evaluations as a report shows them."""

import torch
from torch import Tensor

from diffusion.common.fingerprint import fingerprint
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation, EvaluationConditions, RealBaseline
from diffusion.process.samplers import sampling_config


def scores(kid: float, kid_se: float = 0.02, fd: float = 123.4, samples: int = 500, **further: float) -> Scores:
    return Scores(
        extractor="efflite0",
        samples=samples,
        reference=480,
        fd=fd,
        kid=kid,
        kid_se=kid_se,
        precision=0.812,
        recall=0.745,
        **{"density": 0.7, "coverage": 0.6} | further,
    )


def an_evaluation(kids: list[float], dataset: str = "digits", baseline: Scores | None = None) -> Evaluation:
    conditions = EvaluationConditions(
        content_digest="c" * 64,
        extractor="efflite0",
        extractor_digest="e" * 64,
        preprocessing="64 pixels",
        evaluation=EvaluationConfig(),
        sampling=sampling_config(),
    )
    models = [
        CheckpointEvaluation(
            file=f"runs/{number}.safetensors",
            sha256=f"{number}" * 64,
            images=1000 * (number + 1),
            scores=scores(kid),
            fingerprint=fingerprint(64, "fp32", "cpu"),
        )
        for number, kid in enumerate(kids)
    ]
    return Evaluation(
        dataset=dataset,
        conditions=conditions,
        eval_key=conditions.key,
        real_baseline=RealBaseline(scores=baseline or scores(0.01, fd=61.2), estimates={}),
        features="a network",
        estimates={},
        best=min(models, key=lambda each: each.scores.kid),
        checkpoints=models,
    )


def images(seed: int) -> Tensor:
    return torch.randint(0, 256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
