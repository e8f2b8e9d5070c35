"""Parts of ``gpu.py`` that show whether results are right: equal bits, samplers, evaluation, adapters."""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from math import isfinite
from typing import Any

from gpu_bench import Bench, FailedCheckError, Measurement, Result

from diffusion.checkpoints import load_model
from diffusion.common.files import sha256_file
from diffusion.common.threads import cores
from diffusion.data.dataset import Dataset
from diffusion.evaluation.config import EvaluationConfig
from diffusion.families.config import DiffusersConfig
from diffusion.generation.generate import sample
from diffusion.process.samplers import SAMPLERS, sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.logging import read_metrics
from diffusion.training.train import train


def resume(bench: Bench) -> Iterator[Measurement]:
    """Train to the end, and again with a kill or a signal on the way: the same bytes."""
    from tests.builders.training_runs import Stop, StopAt

    late = bench.sizes.whole * 3 // 4  # the checkpoint before is that at half

    def whole(name: str, options: Mapping[str, Any]) -> Result:
        start = time.perf_counter()
        bench.train(f"{name} once", **options)
        seconds = time.perf_counter() - start
        return same(f"{name} once", f"{name} twice", options, f"{seconds:.0f} s; twice: ")

    def same(first: str, second: str, options: Mapping[str, Any], words: str = "") -> Result:
        digests = [sha256_file(bench.train(name, **options)) for name in (first, second)]
        if digests[0] != digests[1]:
            raise FailedCheckError(f"{words}other bytes: {digests[0][:12]} and {digests[1][:12]}")
        return f"{words}the same bytes, {digests[0][:12]}", None

    def killed(name: str, options: Mapping[str, Any]) -> Result:
        with suppress(Stop):
            bench.train(f"{name} killed", lambda _: StopAt(late), **options)
            raise FailedCheckError("the training was over before it was killed")
        return same(f"{name} once", f"{name} killed", options)

    def stopped(name: str, options: Mapping[str, Any]) -> Result:
        with suppress(SystemExit):
            bench.train(f"{name} stopped", lambda _: Terminate(late), **options)
            raise FailedCheckError("the training was over before it was stopped")
        return same(f"{name} once", f"{name} stopped", options)

    for name, options in {"fp32": {"precision": "fp32", "compile": False}, "as configured": {}}.items():
        yield f"{name}, from its beginning", partial(whole, name, options)
        yield f"{name}, killed after three quarters", partial(killed, name, options)
        yield f"{name}, SIGTERM after three quarters", partial(stopped, name, options)


class Terminate:
    """Tracker that sends this process SIGTERM once ``images`` are logged."""

    def __init__(self, images: int) -> None:
        self.images = images

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if images >= self.images:
            self.images = sys.maxsize
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def log_image(self, name: str, image: object, images: int) -> None: ...

    def sync(self) -> None: ...


def sampling(bench: Bench) -> Iterator[Measurement]:
    """Sample with each sampler, and compare images with the CPU's."""
    count, steps = bench.sizes.samples, 20 if bench.device == "cuda" else 3
    first: list[float] = []

    def work(name: str) -> Result:
        model = load_model(bench.train("as configured once")).to(bench.place)
        config = sampling_config(sampler=name, steps=steps, compute_batch=count, device=bench.device)
        sample(model, range(count), 0, config)
        start = time.perf_counter()
        images = sample(model, range(count), 1, config)
        first.append(images_per_second := count / (time.perf_counter() - start))
        if not images.float().std() > 0:
            raise FailedCheckError("all images are flat")
        return f"{images_per_second:,.1f} images/s in {steps} steps", images_per_second / first[0]

    def compare() -> Result:
        model = load_model(bench.train("as configured once"))
        configs = [
            sampling_config(steps=4, compute_batch=8, precision="fp32", device=device)
            for device in (bench.device, "cpu")
        ]
        actual, expected = (sample(model, range(8), 0, config).float() for config in configs)
        difference = (actual - expected).abs()
        words = f"{difference.mean():.2f} of 255 apart in the mean, {difference.max():.0f} at most"
        if difference.mean() > 0.5 or difference.max() > 8:  # TF32 has 10 bits
            raise FailedCheckError(words)
        return words, None

    for kind in SAMPLERS:
        if (name := kind.model_fields["sampler"].default) not in ("consistency", "scheduler"):
            yield name, partial(work, name)
    yield "images in fp32, beside those of the CPU", compare


def evaluation(bench: Bench) -> Iterator[Measurement]:
    """Evaluate a model, and extract features."""
    data, count = bench.dataset(min(bench.sizes.unets)), bench.sizes.samples
    config = EvaluationConfig(samples=min(count, 128), reference=128, guidance=None)

    def report() -> Result:
        from diffusion.evaluation.evaluate import evaluate

        output, start = bench.scratch / "reports", time.perf_counter()
        shutil.rmtree(output, ignore_errors=True)
        sampled = sampling_config(steps=4, compute_batch=64, device=bench.device)
        evaluated = evaluate(data, [bench.train("as configured once")], config, sampled, output)
        metrics = evaluated.checkpoints[0].metrics()
        return f"{time.perf_counter() - start:.1f} s for {len(metrics)} metrics", None

    def features() -> Result:
        from diffusion.evaluation.features.feature_extractor import make_extractor

        extractor, images = make_extractor(config), Dataset.open(data).images(Dataset.open(data).rows("train")[:256])
        extractor(images[:32])
        start = time.perf_counter()
        if not extractor(images).isfinite().all():
            raise FailedCheckError("features are not finite")
        return f"{len(images) / (time.perf_counter() - start):,.1f} images/s on the CPU, {cores()} cores", None

    yield "report", report
    yield "features", features


def adapters(bench: Bench) -> Iterator[Measurement]:
    """Adapt tiny pipelines, or train all their weights where they have none to adapt, and sample them."""

    def work(kind: str) -> Result:
        from tests.builders.flow_pipelines import FLOW_MAKERS
        from tests.builders.pipelines import MAKERS

        base = bench.imported(kind, {**MAKERS, **FLOW_MAKERS}[kind])
        labels = {"class_conditional": ("0", "1"), "dit": ("ape", "goldfish")}.get(kind, ("x",))
        fields: dict[str, Any] = {"init_from": str(base), "adapter": {"rank": 2, "alpha": 4}, "images": 32}
        fields |= {"weighting": "plain", "timestep_sampling": "scheduler", "batch_size": 8, "learning_rate": 1e-3}
        config = TrainingConfig.model_validate(
            fields | {"checkpoints": 1, "warmup_images": 0, "compile": False, "device": bench.device}
        )
        output, start = bench.scratch / "runs" / f"adapted {kind}", time.perf_counter()
        shutil.rmtree(output, ignore_errors=True)
        few = sampling_config(steps=2, compute_batch=4, device=bench.device)
        train(bench.dataset(16, 24, labels), output, DiffusersConfig(), config, few)
        losses = [row["loss"] for row in read_metrics(output / "history.csv")]
        if not all(map(isfinite, losses)):
            raise FailedCheckError(f"losses {losses} are not finite")
        return f"loss {losses[-1]:.3f} in {time.perf_counter() - start:.1f} s, with a sample grid", None

    for kind in bench.sizes.pipelines:
        yield f"LoRA on a tiny {kind}", partial(work, kind)
