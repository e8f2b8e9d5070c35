"""What is computed on the CPU and on another device, and compared: each family's training, sampling, edits, evaluation.

A workload is a function of a folder, shared by all of them, and the name of a device; it returns the digests of what it
computed. Models that it starts from were trained on the CPU.
"""

import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import diffusion
from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.config import DeviceName
from diffusion.common.device import resolve_device
from diffusion.data.dataset import Dataset
from diffusion.evaluation.comparison import compare_with_champion
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.gate import GateConfig
from diffusion.families import family_of
from diffusion.families.config import AutoregressiveConfig, DiffusersConfig, GANConfig, ModelConfig
from diffusion.generation.config import Conditions, make_request
from diffusion.generation.generate import reconstruct_images, sample
from diffusion.generation.requests import answer
from diffusion.process.samplers import SAMPLERS, sampling_config, with_sampler
from diffusion.training.config import DistillationConfig, TrainingConfig, student_training
from diffusion.training.logging import read_metrics
from diffusion.training.train import preflight, train
from tests.builders.device_models import (
    FEW,
    SHAPE,
    TRAINING,
    TRAININGS,
    TUNED,
    UNET,
    digest,
    imported,
    png,
    sampling_of,
    settings,
    to_tensor,
    trained,
    write_data,
)
from tests.builders.masked import read_masked, write_masked
from tests.builders.shapes import blob
from tests.builders.simulated_device import STATE
from tests.builders.small_datasets import write_dataset
from tests.builders.training_runs import Stop, StopAt

Workload = Callable[[Path, DeviceName], dict[str, str]]

EVALUATED = ("ddpm", "learned variance", "latent", "vae", "autoregressive")
PIPELINES = ("ddpm", "class_conditional", "latent", "dit", "stable_diffusion", "stable_diffusion_3")


def training(name: str) -> Workload:
    """The workload of a training: weights, and the measurements of each checkpoint."""

    def work(folder: Path, device: DeviceName) -> dict[str, str]:
        final = trained(folder, name, device)
        columns = ("loss", "gradient_norm", "train_loss", "held_out_loss", "held_out_loss_ema")
        rows = read_metrics(final.parent / "history.csv")
        curves = {each: repr([row[each] for row in rows if each in row]) for each in columns}
        return curves | {key: digest(value) for key, value in sorted(load_file(final).items())}

    return work


def resumption(folder: Path, device: DeviceName) -> dict[str, str]:
    """A training that is cut off, and goes on from its checkpoint."""
    output, (data, network, options) = folder / "runs" / device / "cut off", settings(folder, "ddpm dropout")
    config = TrainingConfig.model_validate(TRAINING | options | {"dataset": data, "device": device})
    arguments = folder / "data" / data, output, network, config, sampling_config(**FEW | {"device": device})
    with suppress(Stop):
        train(*arguments, track=lambda _: StopAt(40))
        raise AssertionError("it was not cut off")
    return {name: digest(value) for name, value in sorted(load_file(train(*arguments).final).items())}


def distillation(guidance: dict[str, float]) -> Workload:
    """The workload of a student of the first model, which samples with this guidance."""

    def work(folder: Path, device: DeviceName) -> dict[str, str]:
        teacher, (data, network, _) = trained(folder, "ddpm", "cpu"), settings(folder, "ddpm")
        sampling = sampling_config(**FEW | guidance | {"device": device})
        config = TrainingConfig.model_validate(TRAINING | {"dataset": data, "device": device, "guide": None})
        config = student_training(
            config, DistillationConfig(steps=2, images=32), sampling, str(teacher), read_model_header(teacher)
        )
        output = folder / "runs" / device / f"student {guidance}"
        final = train(folder / "data" / data, output, network, config, sampling).final
        images = sample(
            load_model(final), range(2), 0, sampling_config(compute_batch=2, precision="fp32", device=device)
        )
        return {name: digest(value) for name, value in load_file(final).items()} | {"images": digest(images)}

    return work


def masked(folder: Path, device: DeviceName) -> dict[str, str]:
    """A training whose loss is weighted by masks, with buckets of several shapes of images left out."""
    data = folder / "data" / "masked"
    if not data.is_dir():
        read_masked(data, write_masked(folder / "masked"), size=8)
    config = TrainingConfig.model_validate(
        TRAINING | {"dataset": "masked", "device": device, "mask": {"min_weight": 0.1}, "images": 16}
    )
    final = train(data, folder / "runs" / device / "masked", UNET, config, sampling_config(**FEW, device=device)).final
    return {name: digest(value) for name, value in load_file(final).items()}


def planned(folder: Path, device: DeviceName) -> dict[str, str]:
    """What a dry run measures; times are left out."""
    config = TrainingConfig.model_validate(TRAINING | {"dataset": "colours", "device": device, "images": 16})
    result = preflight(folder / "data" / "colours", UNET, config, sampling_config(**FEW, device=device))
    return {"parameters": str(result.parameters), "flops": str(result.flops)}


def samplers(folder: Path, device: DeviceName) -> dict[str, str]:
    """Each sampler, and guidance of each kind."""
    model, config = load_model(trained(folder, "ddpm", "cpu")), sampling_config(**FEW | {"device": device})
    configs = {
        each.model_fields["sampler"].default: with_sampler(config, each.model_fields["sampler"].default)
        for each in SAMPLERS
        if each.model_fields["sampler"].default not in ("consistency", "scheduler")
    }
    configs["churn"] = sampling_config(**FEW, sampler="heun", churn={"amount": 1}, device=device)
    configs["eta"] = sampling_config(**FEW, sampler="ddim", eta=0.5, device=device)
    configs["interval"] = config.with_changes(
        {"guidance": 2.0, "guidance_interval": (0.2, 5.0), "guidance_rescale": 0.7}
    )
    configs["autoguidance"] = config.with_changes({"autoguidance": 2.0})
    conditions = Conditions(labels=("even",))
    return {
        name: digest(sample(model, range(1, 6), 3, each, conditions=conditions)) for name, each in configs.items()
    } | {"of the data": digest(sample(model, range(3), 3, config))}


def families(folder: Path, device: DeviceName) -> dict[str, str]:
    """Images of each family and task."""
    plain, few = ({**FEW, "device": device} for _ in range(2))
    del plain["steps"]
    conditions = {
        "vae": Conditions(),
        "gan": Conditions(labels=("odd",)),
        "autoregressive": Conditions(),
        "latent": Conditions(labels=("odd", None)),
        "latent lora": Conditions(),
        "lora": Conditions(),
        "learned variance": Conditions(),
        "zero snr": Conditions(),
        "text": Conditions(prompts=("a green blob", None), negative_prompt="an odd blob"),
    }
    images = {}
    for name, condition in conditions.items():
        config = sampling_config(**(plain if name in ("vae", "gan", "autoregressive") else few))
        if name == "learned variance":
            config = with_sampler(config, "ddpm")
        if name == "text":
            config = config.with_changes({"guidance": 2.0})
        images[name] = digest(
            sample(load_model(trained(folder, name, "cpu")), range(3), 1, config, conditions=condition)
        )
    dataset = Dataset.open(folder / "data" / "colours")
    vae = load_model(trained(folder, "vae", "cpu")).to(resolve_device(device))
    held_out = dataset.images(dataset.rows("held_out")[:5])
    images["reconstruction"] = digest(reconstruct_images(vae, held_out, sampling_config(**plain)))
    return images


def edits(folder: Path, device: DeviceName) -> dict[str, str]:
    """Each task of editing, on pixels and on latents, and enlarging by tiles."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 255
    image, hole, small = (png(each) for each in (blob(90, 8, "RGB"), Image.fromarray(mask), blob(91, 7, "RGB")))
    fields: dict[str, dict[str, Any]] = {
        "img2img": {"task": "img2img", "image": image, "strength": 0.5},
        "interpolate": {"task": "interpolate", "count": 3, "to_seed": 3, "label": "even"},
        "replace": {"task": "inpaint", "image": image, "mask": hole, "count": 2},
        "repaint": {"task": "inpaint", "image": image, "mask": hole, "method": "repaint", "resample_steps": 2},
        "pigdm": {"task": "inpaint", "image": image, "mask": hole, "method": "pigdm", "strength": 0.8},
    }
    sampling = sampling_config(**FEW | {"device": device})
    images = {}
    for name in ("ddpm", "latent"):
        model = load_model(trained(folder, name, "cpu"))
        for task, request in fields.items():
            images[f"{task} {name}"] = digest(answer(model, [make_request(request)], sampling)[0])
    enlarger = load_model(trained(folder, "low resolution", "cpu"))
    noisy = sampling.with_changes({"low_resolution_noise": 0.05})
    for name, config in (("enlarge", sampling), ("enlarge noisy", noisy)):
        images[name] = digest(answer(enlarger, [make_request({"task": "upscale", "image": small})], config)[0])
    return images


def evaluation(name: str) -> Workload:
    """The workload of evaluating a model beside itself as the champion: each metric of the comparison."""

    def work(folder: Path, device: DeviceName) -> dict[str, str]:
        data, network, _ = settings(folder, name)
        output, model = folder / "reports" / device / name, trained(folder, name, "cpu")
        config = EvaluationConfig(samples=12, reference=24, extractor_size=32, guidance=None)
        sampling = sampling_of(network, device)
        evaluated = evaluate(folder / "data" / data, [model], config, sampling, output / "evaluation")
        compared, _ = compare_with_champion(
            model, model, folder / "data" / data, config, sampling, GateConfig(looks=1), output / "comparison"
        )
        return {key: repr(value) for key, value in (evaluated.checkpoints[0].metrics() | compared.metrics()).items()}

    return work


def pipeline(kind: str) -> Workload:
    """The workload of an imported pipeline: images by its scheduler and by Darkroom's samplers, and edits."""

    def work(folder: Path, device: DeviceName) -> dict[str, str]:
        model = load_model(imported(folder, kind))
        conditions = {
            "dit": Conditions(labels=("ape",)),
            "class_conditional": Conditions(labels=("1",)),
            "stable_diffusion": Conditions(prompts=("a red circle",), negative_prompt="blue"),
            "stable_diffusion_3": Conditions(prompts=("a red circle",)),
        }.get(kind, Conditions())
        fields: dict[str, Any] = {"precision": "fp32", "compute_batch": 2, "steps": 3, "device": device}
        if kind in ("dit", "stable_diffusion", "stable_diffusion_3"):
            fields["guidance"] = 3.0
        images = {}
        for name in ("scheduler", "dpmpp_2m_sde"):
            config = sampling_config(**fields, sampler=name)
            images[name] = digest(sample(model, range(2), 0, config, conditions=conditions))
        side, condition = model.shape[1], {"prompt": "a red circle"} if model.config.text else {}
        if conditions.labels:
            condition["label"] = conditions.labels[0]
        mask = np.zeros((side, side), np.uint8)
        mask[: side // 2] = 255
        mode = "L" if model.shape[0] == 1 else "RGB"
        request = {"image": png(blob(92, side, mode)), "strength": 0.6} | condition
        hole = {"task": "inpaint", "mask": png(Image.fromarray(mask))}
        for task in ({"task": "img2img"}, hole):
            fields_of_task = make_request(request | task)
            images[task["task"]] = digest(answer(model, [fields_of_task], sampling_config(**fields))[0])
        return images

    return work


def fine_tuning(kind: str, **options: Any) -> Workload:
    """The workload of fine-tuning an imported pipeline."""

    def work(folder: Path, device: DeviceName) -> dict[str, str]:
        labels = {"class_conditional": ("0", "1"), "dit": ("ape", "goldfish")}.get(kind, ("x",))
        data = folder / "data" / f"for {kind}"
        if not data.is_dir():
            images = np.stack([np.asarray(blob(number, 16, "RGB")).transpose(2, 0, 1) for number in range(16)])
            classes = [labels[number % len(labels)] for number in range(16)]
            captions = [f"a {('red', 'blue')[number % 2]} circle" for number in range(16)]
            write_dataset(data, images, 16, labels=classes, captions=captions)
        changes = {"images": 16, "weighting": "plain", "timestep_sampling": "scheduler", "warmup_images": 0}
        config = TrainingConfig.model_validate(
            TRAINING
            | changes
            | {"init_from": str(imported(folder, kind)), "device": device, "learning_rate": 1e-2}
            | options
        )
        output = folder / "runs" / device / f"{kind} {' '.join(options)}"
        final = train(data, output, DiffusersConfig(), config, sampling_config(**FEW, device=device)).final
        return {name: digest(value) for name, value in load_file(final).items()}

    return work


def exported(folder: Path, device: DeviceName) -> dict[str, str]:
    """Darkroom's pipeline in diffusers, moved to the device."""
    from diffusion.diffusers_format import DarkroomPipeline
    from diffusion.diffusers_format.export import export_to_diffusers

    images = {}
    for name, sampler, options in (
        ("ddpm", "dpmpp_2m_sde", {"labels": "even"}),
        ("text", "ddim", {"prompts": "a blob", "guidance_scale": 2.0, "eta": 0.5}),
        ("learned variance", "ddpm", {}),
    ):
        target = folder / "exported" / name
        if not target.is_dir():
            config = sampling_config(sampler=sampler, steps=3, precision="fp32")
            export_to_diffusers(trained(folder, name, "cpu"), target, config)
        pipe = DarkroomPipeline.from_pretrained(target).to(resolve_device(device))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        # The scheduler of DDPM takes noise from a generator alone.
        for source in ({}, {"generator": generator}) if sampler != "ddpm" else ({"generator": generator},):
            output = pipe(batch_size=2, output_type="np", **options, **source).images
            images[f"{name} {list(source)}"] = digest(torch.from_numpy(output))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(resolve_device(device))
    pipe = DarkroomPipeline.from_pretrained(folder / "exported" / "ddpm").to(resolve_device(device))
    with torch.no_grad():
        images["network"] = digest(pipe.unet(noise, 500, torch.full((2,), 1, device=noise.device)).sample.cpu())
    return images


class Interrupt:
    """Tracker that has a signal stop the training at the first log, unless it was stopped before."""

    def __init__(self) -> None:
        self.is_done = False

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if not self.is_done:
            self.is_done = True
            # To the thread that waits for signals, so that it wakes before the next log.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        assert image.width > 0

    def sync(self) -> None:
        pass


def interruption(folder: Path, device: DeviceName) -> dict[str, str]:
    """A training that a signal stops between two logs, and that goes on."""
    changes = {"dataset": "colours", "device": device, "images": 160, "batch_size": 4, "checkpoints": 1}
    network, tracker = ModelConfig(**SHAPE | {"channel_mult": (1,), "attention": ()}), Interrupt()
    config, output = TrainingConfig.model_validate(TRAINING | changes), folder / "runs" / device / "interrupted"
    arguments = folder / "data" / "colours", output, network, config, sampling_config(**FEW, device=device)
    with suppress(SystemExit):
        train(*arguments, track=lambda _: tracker)
        raise AssertionError("it was not stopped")
    final = train(*arguments, track=lambda _: tracker).final
    # Steps without a finite loss are known after a copy that does not wait.
    curve = [(row["loss"], row["skipped"]) for row in read_metrics(output / "history.csv") if "loss" in row]
    return {name: digest(value) for name, value in load_file(final).items()} | {"curve": repr(curve)}


def parts(folder: Path, device: DeviceName) -> dict[str, str]:
    """Networks and the Python API, called without what the program always gives them."""
    place, results = resolve_device(device), dict[str, Tensor]()
    torch.manual_seed(0)
    x, z, t = torch.randn(2, 1, 8, 8), torch.randn(2, 512), torch.tensor([3, 700])
    for config in (GANConfig(width=8, channel_mult=(1, 2)), AutoregressiveConfig(width=8, layers=2)):
        network = family_of(config).make_network(config, (1, 8, 8), 2).to(place)
        with torch.no_grad():
            inputs = x if config.family == "autoregressive" else z[:, : config.latent]
            results[config.family] = network(inputs.to(place)).cpu()
    model = load_model(trained(folder, "ddpm", "cpu"))
    results["forward process"] = model.schedule.q_sample(x.to(place), t.to(place), x.to(place)).cpu()
    generator = diffusion.load(trained(folder, "ddpm", "cpu"), **FEW).to(device)
    images = [*generator.generate(count=2), *generator.generate(seed=1)]
    return {name: digest(value) for name, value in results.items()} | {"API": digest(*map(to_tensor, images))}


class WaitsBetweenLogs:
    """Tracker that collects the operations that waited for the simulated device, and stops at the fourth log."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        self.waits.append([*STATE.waited])
        STATE.waited.clear()
        if len(self.waits) == 4:
            raise Stop

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        raise AssertionError("a checkpoint was written")

    def sync(self) -> None:
        pass


def waits_between_logs(folder: Path, name: str) -> list[list[str]]:
    """What waits for the simulated device in training, from one log to the next, which is three steps later."""
    data, network, options = settings(folder, name)
    config = TrainingConfig.model_validate(TRAINING | options | {"dataset": data, "images": 480, "checkpoints": 1})
    tracker, output = WaitsBetweenLogs(), folder / "runs" / "waits" / name
    with suppress(Stop):
        train(folder / "data" / data, output, network, config, sampling_of(network, "auto"), track=lambda _: tracker)
    return tracker.waits[1:]


WORKLOADS: Mapping[str, Workload] = {
    "parts": parts,
    "export": exported,
    **{f"pipeline {kind}": pipeline(kind) for kind in PIPELINES},
    "families": families,
    "edits": edits,
    "samplers": samplers,
    "interrupt": interruption,
    **{f"train {name}": training(name) for name in (*TRAININGS, "latent", *TUNED)},
    **{f"evaluate {name}": evaluation(name) for name in EVALUATED},
    "resume": resumption,
    "masks": masked,
    "dry run": planned,
    "distil": distillation({}),
    "distil guided": distillation({"guidance": 2.0}),
    "distil autoguided": distillation({"autoguidance": 2.0}),
    "fine-tune ddpm": fine_tuning("ddpm"),
    "fine-tune dit": fine_tuning("dit", adapter={"rank": 2, "alpha": 4}),
    "fine-tune latent": fine_tuning("latent"),
    "fine-tune stable_diffusion": fine_tuning(
        "stable_diffusion", adapter={"rank": 2, "alpha": 4, "text_encoder": True}, weighting="min_snr"
    ),
    "fine-tune stable_diffusion_3": fine_tuning("stable_diffusion_3", adapter={"rank": 2, "alpha": 4}),
}
"""All of them, the short ones first."""


def main() -> None:
    """Compute workloads in FOLDER on both devices: what differs, by workload, or what waits, by ``waits TRAINING``."""
    torch.set_num_threads(1)
    folder, answer = Path(sys.argv[1]), dict[str, list[Any]]()
    write_data(folder)
    for name in sys.argv[2:]:
        if name.startswith("waits "):
            answer[name] = waits_between_logs(folder, name.removeprefix("waits "))
            continue
        expected, actual = (WORKLOADS[name](folder, device) for device in ("cpu", "auto"))
        answer[name] = [key for key in expected if actual.get(key) != expected[key]]
    print(json.dumps(answer))
