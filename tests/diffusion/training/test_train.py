"""Training: exact resume, refusal of what does not belong together, and a model that learns."""

import copy
import logging
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.checkpoints import load_model
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import read_manifest
from diffusion.families.config import ModelConfig
from diffusion.families.model import to_float
from diffusion.generation.generate import sample
from diffusion.process.schedules import make_schedule
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import models_to_evaluate
from diffusion.training.logging import MetricsFile, TrainingMonitor, read_metrics
from diffusion.training.train import train
from diffusion.training.trainer import Trainer, scheduled_learning_rate
from tests.builders import ROOT
from tests.builders.small_datasets import write_dataset
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt, run


@pytest.mark.parametrize(
    ("low_resolution", "words"), [(None, "of plain are one flat tone"), (4, "show all that they have at 4×4")]
)
def test_constant_images_are_an_error(tmp_path: Path, low_resolution: int | None, words: str) -> None:
    write_dataset(tmp_path / "plain", np.full((40, 1, 8, 8), 90, np.uint8), per_shard=40)
    model = MODEL.model_copy(update={"low_resolution": low_resolution, "conditional": False})
    with pytest.raises(UserError, match=words):
        train(tmp_path / "plain", tmp_path / "run", model, CONFIG, SAMPLING)


def test_same_inputs_give_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    first, second = run(dataset, tmp_path / "a"), run(dataset, tmp_path / "b")
    assert first.final.read_bytes() == second.final.read_bytes()
    assert first.images == 320


@pytest.mark.parametrize(
    ("stop", "loading"),
    [
        (16, {}),
        pytest.param(112, {"workers": 1, "prefetch": 1}, marks=pytest.mark.slow),
        (240, {"workers": 3, "prefetch": 5, "cache_bytes": 0}),
        pytest.param(320, {"prefetch": 30}, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes_bit_for_bit_with_every_loader(
    dataset: Path, tmp_path: Path, stop: int, loading: dict[str, int]
) -> None:
    whole = run(dataset, tmp_path / "whole")
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", track=lambda _: StopAt(stop))
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    resumed_run = run(dataset, tmp_path / "cut", CONFIG.model_copy(update=loading))
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
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
from tests.builders.training_runs import run, CONFIG
loading = {{"workers": int(sys.argv[3]), "prefetch": int(sys.argv[4]), "cache_bytes": int(sys.argv[5])}}
run(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG.model_copy(update={{"images": 1600, "checkpoints": 10}} | loading))
"""


@pytest.mark.slow
@pytest.mark.drill
def test_resume_is_bit_identical_after_kills(dataset: Path, tmp_path: Path, kills: int) -> None:
    root = str(ROOT)

    def start(output: Path, *loading: int) -> subprocess.Popen[bytes]:
        """Train with other workers, prefetch and cache_bytes each time: they must not matter."""
        command = [sys.executable, "-c", SCRIPT.format(root=root), str(dataset), str(output), *map(str, loading)]
        return subprocess.Popen(command, cwd=root)

    start_time = time.monotonic()
    assert start(tmp_path / "whole", 2, 4, 2**30).wait() == 0
    seconds = time.monotonic() - start_time
    moments = random.Random(0)
    for _ in range(kills):
        workers = moments.randint(1, 4)
        prefetch, cache_bytes = moments.randint(workers, 8), moments.choice((0, 2**30))
        process = start(tmp_path / "killed", workers, prefetch, cache_bytes)
        try:
            process.wait(moments.uniform(0.2, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(tmp_path / "killed", 1, 1, 0).wait() == 0
    final = "final.safetensors"
    assert (tmp_path / "killed" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


EDM = {"weighting": "edm", "learned_uncertainty": True, "timestep_sampling": "lognormal", "ema_stds": [0.05, 0.1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"schedule": "edm", "prediction": "edm"}, EDM),
        ({"schedule": "sigmoid", "zero_terminal_snr": True, "prediction": "sample"}, {"weighting": "soft_min_snr"}),
        (
            {"prediction": "epsilon", "dropout": 0.1},
            {"weighting": "min_snr", "stratified_timesteps": False, "gradient_checkpointing": True},
        ),
    ],
    ids=["edm", "sigmoid", "linear"],
)
def test_all_objectives_learn_and_resume_to_the_same_bits(
    dataset: Path, tmp_path: Path, model: dict[str, object], settings: dict[str, object]
) -> None:
    shape = ModelConfig.model_validate(MODEL.model_dump() | model)
    config = TrainingConfig.model_validate(CONFIG.model_dump(exclude={"learning_rate"}) | settings)
    whole = train(dataset, tmp_path / "whole", shape, config, SAMPLING)
    with pytest.raises(Stop):
        train(dataset, tmp_path / "cut", shape, config, SAMPLING, track=lambda _: StopAt(240))
    resumed_run = train(dataset, tmp_path / "cut", shape, config, SAMPLING)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    losses = [row["held_out_loss"] for row in read_metrics(tmp_path / "whole" / "losses.csv")]
    assert losses[-1] < losses[0]
    for path in (tmp_path / "whole").glob("averages/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / "averages" / path.name).read_bytes()


def test_post_hoc_ema_of_other_stds_generates_images(dataset: Path, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(CONFIG.model_dump() | {"ema_stds": [0.05, 0.1], "checkpoints": 8})
    result = run(dataset, tmp_path / "run", config)
    *checkpoints, shorter, same = models_to_evaluate(tmp_path / "run", tmp_path / "report", [0.04, 0.05])
    assert len(checkpoints) == config.keep
    final, post_hoc = (load_model(path).network.state_dict() for path in (result.final, same))
    for name, value in post_hoc.items():
        torch.testing.assert_close(value, final[name], atol=1e-5, rtol=0)
    assert any(
        not torch.equal(value, post_hoc[name]) for name, value in load_model(shorter).network.state_dict().items()
    )
    first = min((tmp_path / "run" / "averages").glob("[0-9]*.safetensors"))
    first.write_bytes(b"half of")
    with pytest.raises(UserError, match=f"{first.stem}.* is damaged"):
        models_to_evaluate(tmp_path / "run", tmp_path / "report", [0.04])


def test_averaged_weights_move_and_differ_from_the_raw_ones(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    before, after = (load_file(path) for path in checkpoints)
    changed_names = [name for name in after if name.startswith("ema.") and not torch.equal(before[name], after[name])]
    assert len(changed_names) == sum(name.startswith("ema.") for name in after)
    assert any(not torch.equal(after[f"network.{name[4:]}"], after[name]) for name in changed_names)


@pytest.mark.slow
def test_training_beats_the_best_constant_prediction_by_far(dataset: Path, tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"schedule": "cosine", "prediction": "v_prediction"})
    config = CONFIG.model_copy(
        update={"images": 4800, "learning_rate": 1e-2, "weighting": "plain", "timestep_sampling": "uniform"}
    )
    train(dataset, tmp_path / "run", model, config, SAMPLING)
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), map(float, rows[-1].split(",")), strict=True))
    data = Dataset.open(dataset)
    x0 = to_float(data.images(data.rows("held_out")))
    # v = √ᾱ ε − √(1−ᾱ) x_0 has mean 0 over the noise, so a constant 0 costs E[ᾱ + (1−ᾱ) x_0²].
    alpha_bar = make_schedule(model, (1, 28, 28)).alphas_cumprod
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
    rates = [scheduled_learning_rate(config, images, 320) for images in range(0, 336, 16)]
    assert rates.index(max(rates)) == 3
    assert rates[0] < rates[1] < rates[2]
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    half = CONFIG.model_copy(update={"warmup_images": 64, "learning_rate": 1.0, "batch_size": 1})
    assert scheduled_learning_rate(half, 160, 320) == pytest.approx(rates[10])


def test_training_length_is_set_once_and_defaults_to_ten_minutes() -> None:
    with pytest.raises(ValueError, match=r"either training\.images or training\.minutes"):
        TrainingConfig(images=10, minutes=1.0)
    assert (TrainingConfig().minutes, TrainingConfig().images) == (10, None)
    assert TrainingConfig(images=10).minutes is None


def test_waiting_time_and_peak_of_memory_are_recorded(dataset: Path, tmp_path: Path) -> None:
    logged: list[tuple[float, float]] = []

    class Listener(StopAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            if "data_wait" in metrics:
                logged.append((metrics["data_wait"], metrics["peak_memory"]))

    run(dataset, tmp_path / "run", track=lambda _: Listener(0))
    rows = read_metrics(tmp_path / "run" / "history.csv")
    assert [(row["data_wait"], row["peak_memory"]) for row in rows] == logged
    assert len(logged) == 20
    shares, peaks = zip(*logged, strict=True)
    assert all(0 < share < 1 for share in shares)
    assert 10**8 < peaks[0] <= peaks[-1] < 10**11
    assert [*peaks] == sorted(peaks)


def test_step_beyond_the_gpu_s_memory_is_one_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(UserError, match=r"^a training step .*: set training\.micro_batch below 16, .*$"):
        run(dataset, tmp_path / "run")


def test_resumed_history_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    lines = "images,loss,data_wait\n16,0.5,0\n32,0.4,0\n40,0.3,0\n48,0."
    (tmp_path / "history.csv").write_text(lines)
    history = MetricsFile(tmp_path / "history.csv", ("loss", "data_wait"))
    history.rewind(32)
    history.append(48, {"loss": 0.25, "data_wait": 0.125})
    assert (tmp_path / "history.csv").read_text() == "images,loss,data_wait\n16,0.5,0\n32,0.4,0\n48,0.25,0.125\n"


def test_workers_need_prefetched_batches() -> None:
    with pytest.raises(ValueError, match=r"raise training\.prefetch, or lower training\.workers"):
        TrainingConfig(images=1, workers=3, prefetch=2)


def test_nonfinite_steps_are_skipped_and_counted(dataset: Path) -> None:
    with worker_threads(1) as pool:
        trainer = make_trainer(dataset, MODEL, CONFIG, pool, 320)
        broken = {16, 48, 64}

        def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            return output * (math.nan if trainer.state.images in broken else 1.0)

        trainer.state.network.register_forward_hook(spoil)
        for images in range(0, 96, 16):
            before = copy.deepcopy(trainer.state.network.state_dict())
            loss, _ = take_step(trainer)
            has_changed = any(
                not torch.equal(value, before[name]) for name, value in trainer.state.network.state_dict().items()
            )
            assert bool(loss.isnan()) == (images in broken) == (not has_changed)
        assert (trainer.state.images, trainer.state.skipped, trainer.state.skipped_in_a_row) == (96, 3, 0)


def test_delayed_loss_checks_skip_the_same_steps(dataset: Path) -> None:
    # As on a GPU, which nobody waits for after each step.
    counts, weights = [], []
    for lag in (0, 1):
        with worker_threads(1) as pool:
            trainer = make_trainer(dataset, MODEL, CONFIG, pool, 320)
            trainer.lag = lag
            # In the forward pass the number of images is that of the steps before.
            trainer.state.network.register_forward_hook(
                lambda _m, _i, output, state=trainer.state: output * (math.nan if state.images in {16, 48, 64} else 1.0)
            )
            for _ in range(6):
                take_step(trainer)
            trainer.check_finite()
            counts.append((trainer.state.images, trainer.state.skipped, trainer.state.skipped_in_a_row))
            weights.append(trainer.state.tensors())
    assert counts == [(96, 3, 0)] * 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_diverged_run_stops_and_saves_the_batch(dataset: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "max_nonfinite_steps": 3})
    with pytest.raises(DarkroomError, match=r"not finite in 3 steps in a row.*lower training\.learning_rate.*lies in"):
        run(dataset, tmp_path / "run", config)
    batch = load_file(tmp_path / "run" / "not_finite.safetensors")
    images = Dataset.open(dataset).images(batch["rows"].numpy())
    assert batch["images"].shape == images.shape
    assert len(batch["t"]) == CONFIG.batch_size


def test_training_monitor_warns_once_per_problem(caplog: pytest.LogCaptureFixture) -> None:
    monitor = TrainingMonitor()
    with caplog.at_level(logging.WARNING):
        for images in range(20):
            monitor.check_loss(0.1 + 0.01 * (images % 3), images)
        for train_loss, held_out in ((0.3, 0.4), (0.2, 0.3), (0.1, 0.35), (0.09, 0.3)):
            monitor.check_validation({"train_loss_ema": train_loss, "held_out_loss_ema": held_out}, 0)
        assert not caplog.messages
        monitor.check_loss(0.9, 20)
        for train_loss, held_out in ((0.08, 0.31), (0.07, 0.32), (0.06, 0.33)):
            monitor.check_validation({"train_loss_ema": train_loss, "held_out_loss_ema": held_out}, 30)
        network, average = torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)}
        monitor.check_weights(dict(network.named_parameters()), average, 40)
        torch.nn.init.zeros_(network.weight)
        monitor.check_weights(dict(network.named_parameters()), average, 50)
    words = [
        "leapt to 0.9 after 20",
        "30 images the loss on held-out images has risen",
        "average of the weights has not",
    ]
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))


@pytest.mark.slow
def test_run_logs_losses_per_noise_level_drift_and_samples(dataset: Path, tmp_path: Path) -> None:
    figures: dict[str, float] = {}
    logged: list[tuple[str, int]] = []

    class Record:
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            figures.update(metrics)

        def log_image(self, name: str, image: Image.Image, images: int) -> None:
            logged.append((name, images))

        def sync(self) -> None:
            pass

    run(dataset, tmp_path / "run", track=lambda _: Record())
    levels = [figures[f"held_out_loss_ema_level_{number}"] for number in range(1, 9)]
    assert sum(levels) / 8 == pytest.approx(figures["held_out_loss_ema"], rel=0.2)
    samples = sample(load_model(tmp_path / "run" / "final.safetensors"), range(36), 0, SAMPLING).double() / 127.5 - 1
    manifest = read_manifest(dataset)
    expected = (samples.mean().item() - manifest.mean[0]) / manifest.std[0]
    assert figures["sample_drift_grey"] == pytest.approx(expected, abs=1e-4)
    assert logged[-2:] == [("samples", 320), ("reverse", 320)]
    assert [name for name, _ in logged].count("reverse") == 1
