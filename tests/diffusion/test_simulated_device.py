"""On a simulated device: the bits of the CPU, nothing mixed, and nothing waits but the log.

Each test runs in a process of its own, as the device changes torch for good.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import ROOT
from tests.builders.device_models import TRAININGS
from tests.builders.device_workloads import WORKLOADS

COMPUTE = """
from tests.builders.simulated_device import register
register()  # before other modules read ``inference_mode``
from tests.builders.device_workloads import main
main()
"""
FAST = ("train ddpm", "waits ddpm")
RULES = """
import json, torch
from tests.builders.simulated_device import register
state = register()
device = torch.device("simulated", 0)
matrix = torch.arange(6.0).view(2, 3)
there = matrix.to(device)

def refuses(work):
    try:
        work()
    except (RuntimeError, TypeError):
        return True
    return False

def waits(work):
    state.waited.clear()
    work()
    return len(state.waited)

rules = {
    "tensors of both devices": refuses(lambda: there + matrix),
    "tensors of both devices in a list": refuses(lambda: torch.stack([there, matrix])),
    "numbers of the CPU in a matrix product": refuses(lambda: there @ matrix.T),
    "a CPU tensor as a target": refuses(lambda: matrix.add_(there)),
    "CPU tensors indexed by the device's": refuses(lambda: matrix[torch.tensor([1], device=device)]),
    "a pinned copy of repeated elements": refuses(matrix[:, :1].expand(2, 3).pin_memory),
    "NumPy": refuses(there.numpy),
    "the CPU's generator": refuses(lambda: torch.randn(2, device=device, generator=torch.Generator())),
    "no CPU scalar": not refuses(lambda: there * matrix[1, 1] + 1),
    "no CPU indices": not refuses(lambda: there[torch.tensor([1])]),
}
torch.manual_seed(0)
numbers = torch.rand(8, device=device).cpu()
torch.manual_seed(0)
rules["random numbers of the CPU"] = not torch.equal(torch.rand(8), numbers)
copy = there.to("cpu", non_blocking=True)
event = torch.get_device_module(device).current_stream(device).record_event()
rules["a copy before its event"] = bool(copy.isnan().all())
event.synchronize()
rules["no copy after its event"] = torch.equal(copy, matrix)
counts = {
    "item": waits(lambda: there.sum().item()),
    "bool": waits(lambda: bool((there > 0).any())),
    "cpu": waits(there.cpu),
    "tolist": waits(there.tolist),
    "nonzero": waits(there.nonzero),
    "mask": waits(lambda: there[there > 1]),
    "to the device": waits(lambda: matrix.to(device)),
    "not pinned": waits(lambda: matrix.to(device, non_blocking=True)),
    "new tensor": waits(lambda: torch.tensor([1.0, 2.0], device=device)),
}
silent = {
    "arithmetic": waits(lambda: (there * 2 + 1).sum()),
    "pinned": waits(lambda: matrix.pin_memory().to(device, non_blocking=True)),
    "non-blocking": waits(lambda: there.to("cpu", non_blocking=True)),
    "zeros": waits(lambda: torch.zeros(3, device=device)),
}
print(json.dumps({"refused": rules, "waits": counts, "silent": silent}))
"""

ENCODE = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import json, torch
from tests.builders.simulated_device import register
register()
from diffusion.common.progress import ignore_progress
from diffusion.data.dataset import Dataset
from diffusion.training.config import TrainingConfig
from diffusion.training.data import encode_latents
from tests.builders.small_datasets import random_images, write_dataset

class Autoencoder:
    inside = most = 0
    def encode(self, images):
        assert images.device.type == "simulated"
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.1)
        self.inside -= 1
        return images * 2

model, folder = Autoencoder(), Path(sys.argv[1]) / "data"
write_dataset(folder, random_images(48, 3, 8), 48)
dataset, config = Dataset.open(folder), TrainingConfig(images=8)
with ThreadPoolExecutor(3) as readers:
    select = encode_latents(lambda device: model, "0" * 64, (3, 8, 8), dataset, config, readers.map, ignore_progress)
print(json.dumps([model.most, list(select(dataset.rows("train")[:2]).shape)]))
"""


def run(*arguments: str) -> Any:
    """The JSON that a process of its own prints."""
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def compute(folder: Path, *names: str) -> Any:
    return run("-c", COMPUTE, str(folder), *names)


def assert_one_wait_per_log(waits: list[list[str]]) -> None:
    assert len(waits) == 3
    for waited in waits:
        assert [operation.partition(":")[0] for operation in waited] == ["copy to the CPU at training/trainer.py"]


@pytest.mark.slow
def test_the_device_has_the_rules_of_cuda() -> None:
    answer = run("-c", RULES)
    assert all(answer["refused"].values()), answer["refused"]
    assert set(answer["waits"].values()) == {1}, answer["waits"]
    assert set(answer["silent"].values()) == {0}, answer["silent"]


@pytest.mark.slow
@pytest.mark.long
def test_threads_take_turns_to_encode_latents(tmp_path: Path) -> None:
    assert run("-c", ENCODE, str(tmp_path)) == [1, [2, 3, 8, 8]]


@pytest.mark.slow
def test_training_has_the_bits_of_the_cpu_and_waits_for_the_log_alone(tmp_path: Path) -> None:
    answer = compute(tmp_path, *FAST)
    assert_one_wait_per_log(answer.pop("waits ddpm"))
    assert answer == {"train ddpm": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "latent" else pytest.mark.long)
        for name in (*TRAININGS, "latent")
        if name != "ddpm"
    ],
)
def test_training_waits_for_the_log_alone(tmp_path: Path, name: str) -> None:
    assert_one_wait_per_log(compute(tmp_path, f"waits {name}")[f"waits {name}"])


@pytest.mark.slow
@pytest.mark.long
def test_each_workload_has_the_bits_of_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    names = [name for name in WORKLOADS if name not in FAST]
    assert compute(tmp_path, *names) == {name: [] for name in names}
