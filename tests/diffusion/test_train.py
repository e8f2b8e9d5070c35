"""Training: exact resume, refusal of what does not belong together, and a model that learns."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.model import load_model, read_header, to_float
from diffusion.models.config import ModelConfig
from diffusion.process import make_schedule
from diffusion.training.config import TrainingConfig
from diffusion.training.run import learning_rate
from diffusion.training.train import TrainResult, discard, train

MODEL = ModelConfig(width=16, multipliers=(1,), blocks=1, attention=(), patch=1)
CONFIG = TrainingConfig(dataset="blobs", images=320, batch_size=16, warmup_images=32, checkpoints=4, keep=2, flip=True)
SAMPLING = SamplingConfig(steps=2, compute_batch=36)
KILLS = int(os.environ.get("KILLS", "3"))


class Stop(Exception):
    pass


class StopAt:
    """A tracker that ends the run when the given number of images is logged, as a kill between steps would."""

    def __init__(self, images: int) -> None:
        self.images = images

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if images >= self.images:
            raise Stop

    def log_picture(self, name: str, picture: Image.Image, images: int) -> None:
        assert picture.width > 0


def run(dataset: Path, output: Path, config: TrainingConfig = CONFIG, **options: object) -> TrainResult:
    return train(dataset, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


def test_same_inputs_give_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    first, second = run(dataset, tmp_path / "a"), run(dataset, tmp_path / "b")
    assert first.final.read_bytes() == second.final.read_bytes()
    assert first.images == 320


@pytest.mark.parametrize("stop", [16, 112, 240, 320])
def test_a_stopped_run_goes_on_to_the_same_bits(dataset: Path, tmp_path: Path, stop: int) -> None:
    whole = run(dataset, tmp_path / "whole")
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", track=lambda _: StopAt(stop))
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    resumed = run(dataset, tmp_path / "cut")
    assert resumed.final.read_bytes() == whole.final.read_bytes()
    for name in ("losses.csv", "samples/0000000320.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    images = [line.split(",")[0] for line in (tmp_path / "cut" / "history.csv").read_text().splitlines()]
    assert images == [line.split(",")[0] for line in (tmp_path / "whole" / "history.csv").read_text().splitlines()]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.diffusion.test_train import run, CONFIG
run(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG.model_copy(update={{"images": 3200, "checkpoints": 20}}))
"""


@pytest.mark.slow
def test_resume_is_bit_identical_after_kills(dataset: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])

    def start(output: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=root), str(dataset), str(output)], cwd=root)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        try:
            process.wait(moments.uniform(0.2, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(tmp_path / "killed").wait() == 0
    final = "final.safetensors"
    assert (tmp_path / "killed" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.parametrize("how", ["changed", "cut short"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    whole = run(dataset, tmp_path / "whole")
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", track=lambda _: StopAt(240))
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data if how == "changed" else data[:100])
    resumed = run(dataset, tmp_path / "cut")
    assert resumed.final.read_bytes() == whole.final.read_bytes()
    assert newest.name in caplog.text


def test_old_checkpoints_are_pruned_and_the_newest_kept(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"{images:010d}.safetensors{suffix}" for images in (240, 320) for suffix in ("", ".sha256")]


def test_another_configuration_is_refused_and_named_unless_restarted(dataset: Path, tmp_path: Path) -> None:
    first = run(dataset, tmp_path / "run").final.read_bytes()
    other = CONFIG.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(UserError, match=r"training\.learning_rate.*--restart"):
        run(dataset, tmp_path / "run", other)
    assert run(dataset, tmp_path / "run", other, restart="if_different").final.read_bytes() != first


def test_a_discarded_run_begins_anew_with_the_same_end(dataset: Path, tmp_path: Path) -> None:
    first = run(dataset, tmp_path / "run").final
    bits, written = first.read_bytes(), first.stat().st_mtime_ns
    assert run(dataset, tmp_path / "run").final.stat().st_mtime_ns == written
    assert run(dataset, tmp_path / "run", restart="if_different").final.stat().st_mtime_ns == written
    (tmp_path / "run" / "notes.txt").write_text("mine")
    discard(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    again = run(dataset, tmp_path / "run").final
    assert again.stat().st_mtime_ns != written
    assert again.read_bytes() == bits


def test_minutes_are_turned_into_images_once(dataset: Path, tmp_path: Path) -> None:
    config = TrainingConfig(dataset="blobs", minutes=0.1, batch_size=16, checkpoints=2)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", config, track=lambda _: StopAt(1))
    first = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))[0]
    planned = read_header(first)["total"]
    images = run(dataset, tmp_path / "run", config).images
    assert images == planned
    assert images % 16 == 0


def test_averaged_weights_move_and_differ_from_the_raw_ones(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    before, after = (load_file(path) for path in checkpoints)
    moved = [name for name in after if name.startswith("ema.") and not torch.equal(before[name], after[name])]
    assert len(moved) == sum(name.startswith("ema.") for name in after)
    assert any(not torch.equal(after[f"network.{name[4:]}"], after[name]) for name in moved)


def test_training_beats_the_best_constant_prediction_by_far(dataset: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"images": 4800, "learning_rate": 1e-2, "min_snr_gamma": None})
    run(dataset, tmp_path / "run", config)
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), map(float, rows[-1].split(",")), strict=True))
    data = Dataset.open(dataset)
    x0 = to_float(data.pictures(data.rows("held_out")))
    # v = √ᾱ ε − √(1−ᾱ) x_0 has mean 0 over the noise, so a constant 0 costs E[ᾱ + (1−ᾱ) x_0²].
    alpha_bar = make_schedule(MODEL).alphas_cumprod
    constant = (alpha_bar + (1 - alpha_bar) * x0.square().mean()).mean().item()
    assert last["held_out_loss_ema"] < constant / 2.5


def test_the_final_model_holds_the_last_checkpoints_averaged_weights(dataset: Path, tmp_path: Path) -> None:
    result = run(dataset, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "0000000320.safetensors"
    final, checkpoint = load_model(result.final), load_model(last)
    assert final.header == checkpoint.header
    assert final.header.content_digest == result.content_digest
    weights = checkpoint.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in final.network.state_dict().items())


def test_learning_rate_rises_and_falls_by_images_seen() -> None:
    config = CONFIG.model_copy(update={"warmup_images": 64, "learning_rate": 1.0})
    rates = [learning_rate(config, images, 320) for images in range(0, 336, 16)]
    assert rates.index(max(rates)) == 3
    assert rates[0] < rates[1] < rates[2]
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    half = CONFIG.model_copy(update={"warmup_images": 64, "learning_rate": 1.0, "batch_size": 1})
    assert learning_rate(half, 160, 320) == pytest.approx(rates[10])


def test_two_trainings_in_one_folder_are_refused(dataset: Path, tmp_path: Path) -> None:
    class Nested(StopAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            with pytest.raises(UserError, match="another process trains"):
                run(dataset, tmp_path / "run")
            raise Stop

    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", track=lambda _: Nested(0))


def test_exactly_one_length_is_asked_for() -> None:
    for wrong in ({}, {"images": 10, "minutes": 1.0}):
        with pytest.raises(ValueError, match=r"either training\.images or training\.minutes"):
            TrainingConfig(**wrong)
