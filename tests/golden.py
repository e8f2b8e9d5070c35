"""Golden values: what fixed small inputs and seeds give, from shards to the ledger, to hold a rewrite against.

``python -m tests.golden write`` computes them all and puts them into ``tests/golden_values.json``; ``python -m
tests.golden compare`` computes them again and prints what differs. Values in ``exact`` are the same on every machine
whose codecs are of equal versions. Those in ``close`` are floating-point sums and are compared to within 1e-9. Those in
``machine`` (weights, generated images, metrics of them) have equal bits within one fingerprint only, and are compared
where the fingerprint in the file is that of this machine.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow
import torch
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.fingerprint import fingerprint
from diffusion.common.model_files import read_header
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.comparison import compare_with_champion, distance_headline
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.gate import GateConfig, decide
from diffusion.evaluation.gate_metrics import ComparisonMetrics, CopyShare, Cost
from diffusion.families.config import AutoregressiveConfig, FamilyConfig, GANConfig, ModelConfig, VAEConfig
from diffusion.generation.config import Conditions, make_request
from diffusion.generation.generate import sample
from diffusion.generation.requests import answer
from diffusion.process.samplers import sampling_config, with_sampler
from diffusion.training.config import TrainingConfig
from diffusion.training.train import train
from flows.registry.ledger import Approval, Evidence, History, LedgerEntry
from tests.builders.one_metric import compute_replicates

VALUES = Path(__file__).with_name("golden_values.json")
IMAGES = 2_000
"""Seen by each network in training."""
SIZE = 16
TRAINING = {"images": IMAGES, "batch_size": 50, "warmup_images": 200, "checkpoints": 2, "precision": "fp32"}
SHAPE: dict[str, Any] = {"width": 16, "channel_mult": (1, 2), "blocks": 1, "attention": (1,), "patch": 2}
SAMPLING = sampling_config(steps=6, compute_batch=8, precision="fp32")
EVALUATION = EvaluationConfig(samples=48, extractor_size=32, finalists=2)
Values = dict[str, Any]
"""Nested by section, with digests, numbers and words at the leaves."""


def main() -> None:
    """Write or compare; exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "compare"))
    parser.add_argument("--file", type=Path, default=VALUES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        values = compute(Path(scratch))
    if arguments.verb == "write":
        arguments.file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        return
    differing = differences(json.loads(arguments.file.read_text()), values)
    print("\n".join(differing) or "equal")
    sys.exit(bool(differing))


def compute(scratch: Path) -> Values:
    """All golden values; ``scratch`` is an empty folder."""
    torch.set_num_threads(1)
    data = data_sets(scratch)
    models = trained_models(scratch)
    return {
        "codecs": codecs(),
        "fingerprint": fingerprint(SAMPLING.compute_batch, "fp32", "cpu").model_dump(mode="json"),
        "exact": {"data": data, "ledger": ledger_entries()},
        "close": {"gate": gate_verdicts()},
        "machine": {
            "weights": {name: weights_digest(path) for name, path in models.items()},
            "images": dict(generated_images(models)),
            "metrics": metrics(scratch, models),
        },
    }


def differences(before: Values, now: Values) -> list[str]:
    """What differs, as ``path: before → now``; sections that depend on another machine or codec are left out."""
    sections = ["exact"] if before["codecs"] == now["codecs"] else []
    sections += ["close", *(["machine"] if before["fingerprint"] == now["fingerprint"] else [])]
    return [line for section in sections for line in _differences(section, before[section], now[section])]


def _differences(path: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            yield from _differences(f"{path}/{name}", before.get(name), now.get(name))
    elif isinstance(before, float) and isinstance(now, float):
        if not math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-9):
            yield f"{path}: {before!r} → {now!r}"
    elif before != now:
        yield f"{path}: {before!r} → {now!r}"


def codecs() -> dict[str, str]:
    """Versions of the libraries whose output is part of stored bytes."""
    return {"pillow": PIL.__version__, "pyarrow": pyarrow.__version__, "numpy": np.__version__}


def image_of(number: int, size: int = 24) -> Image.Image:
    """A disc in a colour of its class, (size, size, 3), somewhere on a dark ground; by number."""
    random = np.random.default_rng(number)
    x, y = random.uniform(size / 3, 2 * size / 3, 2)
    rows, columns = np.mgrid[:size, :size]
    inside = np.clip(size / 4 + 0.5 - np.hypot(rows - y, columns - x), 0, 1)[..., None]
    colour = np.array([(230, 60, 40), (40, 90, 220)][number % 2]) + random.integers(-20, 21, 3)
    ground = random.integers(0, 40, (size, size, 3))
    return Image.fromarray((inside * colour.clip(0, 255) + (1 - inside) * ground).round().astype(np.uint8))


def write_images(folder: Path, numbers: range) -> None:
    """Images with classes and captions; two of them are the same, and one is none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,label,text"]
    for number in numbers:
        image_of(number).save(folder / f"{number:03d}.png")
        name = ("red", "blue")[number % 2]
        lines.append(f"{number:03d}.png,{name},a {name} disc")
    image_of(numbers.start).save(folder / "copy.png")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "metadata.csv").write_text("\n".join([*lines, "copy.png,red,a copy", "broken.png,red,broken"]) + "\n")


def data_sets(scratch: Path) -> Values:
    """Digests of a data set ``scratch/data/discs`` as it grows and loses an image, and of a grey one made of it."""
    folder, source = scratch / "data" / "discs", scratch / "source"
    config = IngestConfig(source=str(source), size=SIZE, held_out=0.3, shard_bytes=2**16)
    versions: Values = {}
    for step, last in (("first", 120), ("grown", 200)):
        write_images(source, range(last))
        result = ingest(folder, config)
        versions[step] = version(folder) | {"kept": result.kept, "duplicates": result.duplicates}
        versions[step]["quarantined"] = {each.source: each.reason for each in result.quarantined}
    grey = scratch / "data" / "grey"
    ingest(grey, config.model_copy(update={"mode": "grey"}))
    versions["grey"] = version(grey)
    smaller = scratch / "data" / "smaller"
    ingest(smaller, config)
    remove(smaller, Selection(sources=["007.png"]), "a golden value")
    versions["taken down"] = version(smaller)
    return versions


def version(folder: Path) -> Values:
    """What the data set in ``folder`` is known by, and its files."""
    manifest = read_manifest(folder)
    return {
        "content_digest": manifest.content_digest,
        "layout_digest": manifest.layout_digest,
        "manifest": manifest.digest,
        "files": {entry.name: entry.sha256 for entry in manifest.files},
    }


def trained_models(scratch: Path) -> dict[str, Path]:
    """The final model of a short training of each family and task."""
    networks: dict[str, tuple[str, FamilyConfig, dict[str, Any]]] = {
        "ddpm": ("discs", ModelConfig(**SHAPE), {}),
        "ddpm learned variance": (
            "grey",
            ModelConfig(**SHAPE, schedule="cosine", prediction="epsilon", variance="learned_range"),
            {"timestep_sampling": "uniform", "weighting": "min_snr", "stratified_timesteps": False},
        ),
        "ddpm v": (
            "grey",
            ModelConfig(**SHAPE, schedule="linear", prediction="v_prediction", zero_terminal_snr=True, dropout=0.1),
            {"weighting": "plain", "timestep_sampling": "uniform", "flip": True, "ema_stds": (0.05, 0.1)},
        ),
        "text": ("discs", ModelConfig(**SHAPE, text=True, text_tokens=0), {"learned_uncertainty": True}),
        "text tokens": ("discs", ModelConfig(**SHAPE, text=True), {}),
        "super-resolution": ("discs", ModelConfig(**SHAPE, low_resolution=8), {}),
        "vae": ("discs", VAEConfig(width=16, channel_mult=(1, 1), latent_channels=3), {}),
        "gan": ("discs", GANConfig(width=8, channel_mult=(1, 2, 4)), {}),
        "autoregressive": ("grey", AutoregressiveConfig(width=8, layers=4), {}),
    }
    models: dict[str, Path] = {}
    for name, (dataset, network, options) in networks.items():
        models[name] = trained(scratch, name, dataset, network, options)
    latent = ModelConfig(**SHAPE | {"patch": 1, "channel_mult": (1,), "attention": ()}, autoencoder=str(models["vae"]))
    models["latent"] = trained(scratch, "latent", "discs", latent, {})
    models["warm start"] = trained(
        scratch, "warm start", "discs", ModelConfig(**SHAPE), {"init_from": str(models["ddpm"])}
    )
    return models


def trained(scratch: Path, name: str, dataset: str, network: FamilyConfig, options: dict[str, Any]) -> Path:
    """The final model of ``network`` trained on the data set of that name."""
    config = TrainingConfig.model_validate(TRAINING | options | {"dataset": dataset})
    sampling = sampling_config(steps=2, compute_batch=8, precision="fp32") if network.family == "ddpm" else SAMPLING
    if network.family != "ddpm":
        sampling = sampling_config(compute_batch=8, precision="fp32")
    return train(scratch / "data" / dataset, scratch / "runs" / name, network, config, sampling).final


def weights_digest(path: Path) -> str:
    """SHA-256 of the tensors' names and bytes, free of the header."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + b"\0" + tensor.numpy().tobytes())
    return digest.hexdigest()


def digest_of_images(images: Tensor) -> str:
    """SHA-256 of the shape and the pixels, (N, C, H, W) uint8."""
    return hashlib.sha256(str(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Files:
    """Images as files, as a request has them."""

    image: bytes
    mask: bytes
    small: bytes


def request_files() -> Files:
    """An image, a mask with a hole in its middle, and a small image."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:12, 4:12] = 255
    images = image_of(900, SIZE), Image.fromarray(mask), image_of(901, SIZE).resize((12, 10))
    files = []
    for image in images:
        image.save(buffer := BytesIO(), "PNG")
        files.append(buffer.getvalue())
    return Files(*files)


def generated_images(models: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Digests of what each sampler, option, family and task gives, by a name for it."""
    ddpm = load_model(models["ddpm"])
    samplers: dict[str, dict[str, Any]] = {
        "ddpm": {},
        "ddpm larger variance": {"sampler": "ddpm", "variance": "fixed_large"},
        "ddim": {},
        "ddim eta": {"sampler": "ddim", "eta": 0.5},
        "euler": {},
        "euler churn": {"sampler": "euler", "churn": {"amount": 0.3, "noise_std": 1.01}},
        "heun": {},
        "dpmpp_2m": {},
        "dpmpp_2m_sde": {},
        "deis": {},
        "unipc": {},
        "guided": {"sampler": "dpmpp_2m", "guidance": 2.5, "guidance_interval": (0.2, 5.0), "guidance_rescale": 0.7},
        "whole schedule": {"sampler": "ddim", "sigma_max": None, "sigma_min": None},
    }
    for name, options in samplers.items():
        config = with_sampler(SAMPLING, options.get("sampler", name)).with_changes(options)
        yield f"sampler/{name}", digest_of_images(sample(ddpm, range(3, 9), 7, config))
    plain = sampling_config(compute_batch=8, precision="fp32")
    conditions = {
        "ddpm learned variance": Conditions(),
        "ddpm v": Conditions(labels=("blue",)),
        "text": Conditions(labels=("red",), prompts=("a blue disc", None)),
        "text tokens": Conditions(labels=("red",), prompts=("a blue disc", None)),
        "latent": Conditions(labels=("red", "blue")),
        "vae": Conditions(),
        "gan": Conditions(labels=("red",)),
        "autoregressive": Conditions(labels=("blue",)),
    }
    for name, what in conditions.items():
        config = plain if name in ("vae", "gan", "autoregressive") else SAMPLING
        if name == "ddpm learned variance":
            config = with_sampler(SAMPLING, "ddpm")
        yield f"family/{name}", digest_of_images(sample(load_model(models[name]), range(5), 1, config, conditions=what))
    files = request_files()
    hole = {"task": "inpaint", "image": files.image, "mask": files.mask}
    tasks: dict[str, dict[str, Any]] = {
        "sample": {"task": "sample", "count": 3, "seed": 4, "label": "red"},
        "inpaint": hole | {"count": 2},
        "inpaint repaint": {
            "task": "inpaint",
            "image": files.image,
            "mask": files.mask,
            "method": "repaint",
            "resample_steps": 2,
        },
        "inpaint pigdm": hole | {"method": "pigdm"},
        "img2img": {"task": "img2img", "count": 2, "image": files.image, "strength": 0.5},
        "interpolate": {"task": "interpolate", "count": 4, "seed": 2, "to_seed": 3, "label": "red"},
    }
    for name, fields in tasks.items():
        yield f"task/{name}", digest_of_images(answer(ddpm, [make_request(fields)], SAMPLING)[0])
    upscale = make_request({"task": "upscale", "image": files.small, "seed": 1})
    images = answer(load_model(models["super-resolution"]), [upscale], SAMPLING)[0]
    yield "task/upscale", digest_of_images(images)


def metrics(scratch: Path, models: Mapping[str, Path]) -> Values:
    """Every metric with its interval: of checkpoints, and of a candidate beside a champion."""
    data, checkpoints = scratch / "data" / "discs", sorted((scratch / "runs" / "ddpm" / "checkpoints").glob("*"))
    checkpoints = [path for path in checkpoints if path.suffix == ".safetensors"]
    evaluation = evaluate(data, checkpoints, EVALUATION, SAMPLING, scratch / "reports" / "evaluation")
    checkpoint_metrics = {f"{each.images}": each.metrics() for each in evaluation.checkpoints}
    compared, _ = compare_with_champion(
        models["warm start"], models["ddpm"], data, EVALUATION, SAMPLING, GateConfig(), scratch / "reports" / "trial"
    )
    autoencoder, _ = compare_with_champion(
        models["vae"], models["vae"], data, EVALUATION, sampling_config(compute_batch=8), GateConfig(), scratch / "vae"
    )
    enlarged = evaluate(data, [models["super-resolution"]], EVALUATION, SAMPLING, scratch / "reports" / "enlarged")
    return {
        "checkpoints": checkpoint_metrics,
        "real baseline": evaluation.real_baseline.metrics(),
        "intervals": {name: each.model_dump() for name, each in evaluation.estimates.items()},
        "comparison": compared.metrics(),
        "decision": json.loads(compared.decision.model_dump_json()),
        "autoencoder": autoencoder.metrics(),
        "super-resolution": enlarged.checkpoints[0].metrics(),
        "steps": read_header(checkpoints[0])["model_header"]["images"],
    }


def features(seed: int, count: int, shift: float) -> Tensor:
    """Stand-ins for features, (count, 16) float32: Gaussian of a spread that falls by dimension."""
    scales = 1 / np.arange(1, 17)
    samples = np.random.default_rng(seed).standard_normal((count, 16)) * scales + shift
    return torch.from_numpy(samples.astype(np.float32))


def gate_verdicts() -> Values:
    """Metrics with errors, and what the gate decides, of candidates that are better, equal, worse, and copies."""
    reference, real, champion = features(0, 400, 0), features(1, 400, 0), features(2, 400, 0.3)
    verdicts: Values = {}
    for name, shift, copies in (("better", 0.1, 0.0), ("equal", 0.3, 0.0), ("worse", 0.5, 0.0), ("copies", 0.1, 0.4)):
        candidate = features(3, 400, shift)
        ours, theirs, baseline = compute_replicates([candidate, champion, real], reference, 20)
        for key, metric, config in (
            ("auto", "kid", GateConfig()),
            ("fd", "fd", GateConfig(delta=0.2, recall_loss=None)),
        ):
            compared = ComparisonMetrics(
                basis="generated",
                samples=400,
                reference=400,
                has_champion=True,
                headline=distance_headline(ours, theirs, baseline, "stored", metric),
                recall=difference(ours["recall"], theirs["recall"]),
                memorized=CopyShare(share=copies, expected=0, p_value=1e-9 if copies else 0.7),
                cost=Cost(candidate=1.0, champion=1.0, unit="GFLOP"),
            )
            decision = decide(compared, config)
            verdicts[f"{name}/{key}"] = json.loads(decision.model_dump_json()) | {
                "metrics": {metric: each.estimate.model_dump() for metric, each in ours.items()}
            }
    return verdicts


def ledger_entries() -> Values:
    """Digests of a short history: two promotions, a hold, a manual override, a rollback."""
    when, history = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), History("discs")
    figures, gate = {"kid": 0.25}, {"delta": 0.05}
    promoted = Evidence(verdict="promote", reason="better", figures=figures, eval_key="e", gate=gate)
    hold_evidence = Evidence(verdict="hold", reason="perhaps", figures={"kid": 0.5})
    approval = Approval(approved=True, by="somebody", note="looked at")
    steps: list[tuple[Any, int, dict[str, Any]]] = [
        ("promote", 1, {"evidence": promoted}),
        ("promote", 2, {"evidence": promoted, "approval": approval}),
        ("hold", 3, {"evidence": hold_evidence}),
        ("promote", 3, {"by_hand": True, "reason": "a person's", "evidence": hold_evidence}),
        ("rollback", 2, {"by_hand": True, "reason": "worse in use"}),
    ]
    entries: Values = {}
    for what, number, options in steps:
        entry = history.next_entry(what, number, f"{number:064x}", **options)
        # Who wrote it and when differ between machines; a parent's digest follows from what was fixed before.
        entry = LedgerEntry.model_validate(entry.model_dump() | {"who": "who@where", "when": when})
        history = History("discs", (*history.entries, entry))
        entries[f"{entry.number}"] = {"sha256": entry.digest, "text": str(entry)}
    return entries


if __name__ == "__main__":
    main()
