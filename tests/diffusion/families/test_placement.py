"""Where the components of an imported pipeline are, on a simulated device whose memory is counted.

Each test runs in a process of its own, as the device changes torch for good.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("peft")

START = """
import gc, json, sys
from pathlib import Path
from tests.builders.simulated_device import register
state = register()  # before other modules read ``inference_mode``
import torch
from diffusion.checkpoints import load_model
from diffusion.common.device import resolve_device
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.header import Origin
from diffusion.families.pretrained.placement import weight_bytes
from diffusion.generation.config import Conditions
from diffusion.generation.generate import encode_prompts, sample
from diffusion.process.samplers import sampling_config
from tests.builders.flow_pipelines import FLOW_MAKERS
torch.set_num_threads(1)
folder = Path(sys.argv[1])
path = folder / "model.safetensors"
import_pipeline(FLOW_MAKERS["flux"](folder / "pipeline"), path, Origin(source="flux"))
model, device = load_model(path).with_size((16, 16)), resolve_device("auto")
sizes = {name: weight_bytes(part) for name, part in model.network.named_children()}
config = sampling_config(steps=2, compute_batch=2, precision="fp32", device="cpu")

def live():
    gc.collect()
    return state.live
"""
SAMPLING = """
conditions, answer = Conditions(prompts=("a red circle", "a blue circle")), {"sizes": sizes}
expected = sample(model, range(4), 0, config, conditions=conditions)
encoders = sizes["text_encoder"] + sizes["text_encoder_2"]
for name, memory in (("much", 2**34), ("little", int(max(sizes["transformer"], encoders) * 1.6))):
    torch.get_device_module(device).memory = memory
    before, placed = live(), model.to(device)
    encodings = encode_prompts(placed, conditions)
    encoded = live() - before - sum(value.nbytes for each in encodings.values() for value in each.values())
    actual = sample(placed, range(4), 0, config.model_copy(update={"device": "auto"}), conditions=conditions)
    del encodings
    answer[name] = {"encoded": encoded, "sampled": live() - before, "equal": torch.equal(actual, expected)}
    del placed
    answer[name]["left"] = live() - before
print(json.dumps(answer))
"""
ENCODING = """
expected = model.encode_prompt("a red circle")
torch.get_device_module(device).memory = sizes["text_encoder"] + sizes["text_encoder_2"]
placed, before = model.to(device), live()
state.peak = before
actual = placed.encode_prompt("a red circle")
weights = state.peak - before - sum(value.nbytes for value in actual.values())
answer = {
    "weights": weights,
    "equal": all(torch.equal(value.cpu(), expected[name]) for name, value in actual.items()),
    "device": next(iter(actual.values())).device.type,
}
print(json.dumps(answer))
"""
TRAINING = """
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.families.config import DiffusersConfig
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.logging import Validation
from diffusion.training.setup import make_setup
from diffusion.training.trainer import Trainer
from tests.builders.small_datasets import random_images, write_dataset

captions = [f"a {('red', 'blue')[number % 2]} circle" for number in range(8)]
write_dataset(folder / "data", random_images(8, 3, 16), 6, captions=captions)

def validate(place, base_weights):
    training = TrainingConfig.model_validate({
        "init_from": str(path), "adapter": {"rank": 2, "base_weights": base_weights}, "images": 8, "batch_size": 4,
        "weighting": "plain", "timestep_sampling": "scheduler", "precision": "fp32", "device": place,
        "learning_rate": 1e-2, "warmup_images": 0, "cpu_threads": 1,
    })
    before = live()
    with worker_threads(1) as readers:
        dataset = Dataset.open(folder / "data")
        setup = make_setup(dataset, DiffusersConfig(), training, config, SINGLE_PROCESS, readers.map)
        encoded = live() - before
        trainer = Trainer(setup, readers)
        trainer.total = 8
        trained = live() - before
        with trainer.loader:
            trainer.train_step(1e-2)
            trainer.check_finite()
        validation = Validation(setup, trainer.objective, readers, trainer.state.network)
        held = live()
        tensors = trainer.checkpoint_tensors(trainer.checkpoint_header())
        model, metrics = validation.evaluate(tensors, 4)
        images = validation.generate(model, config.model_copy(update={"device": place}))
        beside = live() - held
        adapter = sum(value.nbytes for value in trainer.state.network.parameters())
    return {"encoded": encoded, "trained": trained, "beside": beside, "adapter": adapter}, metrics, images

answer = {"sizes": sizes}
for kind in (None, "int8"):
    _, expected_metrics, expected = validate("cpu", kind)
    answer[str(kind)], metrics, images = validate("auto", kind)
    answer[str(kind)] |= {"equal": torch.equal(images, expected), "metrics": metrics == expected_metrics}
print(json.dumps(answer))
"""


def run(script: str, folder: Path) -> Any:
    """The JSON that a process of its own prints."""
    process = subprocess.run(
        [sys.executable, "-c", START + script, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.long
def test_components_take_turns_where_not_all_fit(tmp_path: Path) -> None:
    answer = run(SAMPLING, tmp_path)
    sizes, much, little = (answer[name] for name in ("sizes", "much", "little"))
    encoders = sizes["text_encoder"] + sizes["text_encoder_2"]
    for each in (much, little):
        assert each["equal"]
        assert encoders <= each["encoded"] < encoders + sizes["vae"]
        assert each["left"] <= 0
    assert much["sampled"] >= sum(sizes.values())
    assert little["sampled"] < sizes["transformer"]  # the autoencoder, which was last


@pytest.mark.long
@pytest.mark.slow
def test_training_has_the_denoiser_alone_on_the_device(tmp_path: Path) -> None:
    answer = run(TRAINING, tmp_path)
    sizes, full, rounded = (answer[name] for name in ("sizes", "None", "int8"))
    for each in (full, rounded):
        assert each["encoded"] <= 64
        assert each["equal"]
        assert each["metrics"]
        assert each["beside"] <= 0
    assert sizes["transformer"] <= full["trained"] <= sizes["transformer"] + 2 * full["adapter"] + 4096
    assert rounded["trained"] < 0.6 * sizes["transformer"] + 2 * rounded["adapter"]


@pytest.mark.slow
@pytest.mark.long
def test_prompts_are_encoded_on_the_cpu_where_text_encoders_exceed_the_device(tmp_path: Path) -> None:
    answer = run(ENCODING, tmp_path)
    assert answer == {"weights": 0, "equal": True, "device": "simulated"}
