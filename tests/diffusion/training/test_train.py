"""Training: exact resume, refusal of what does not belong together, and a model that learns."""

import copy
import json
import logging
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.checkpoints import load_model
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import read_manifest, write_manifest
from diffusion.families.config import ModelConfig
from diffusion.families.model import to_float
from diffusion.generation.generate import sample
from diffusion.process.schedules import make_schedule
from diffusion.training.checkpointing import Checkpoints, CheckpointWriter
from diffusion.training.config import TrainingConfig, earlier_runs
from diffusion.training.ema import models_to_evaluate
from diffusion.training.logging import MetricsFile, TrainingMonitor, read_metrics
from diffusion.training.preflight import count_flops
from diffusion.training.run_folder import discard
from diffusion.training.train import preflight, train
from diffusion.training.trainer import scheduled_learning_rate
from tests.builders import ROOT
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Away, Stop, StopAt, run


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
@pytest.mark.drill(
    "training is killed",
    "SIGKILL at random moments, each time with other loader settings",
    "the same bytes",
)
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
    resumed_run = run(dataset, tmp_path / "cut")
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    assert newest.name in caplog.text


def test_leftovers_of_a_killed_training_are_removed_on_resume(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    begun = [f".0000000008.safetensors.{'0' * 32}.partial", ".tmpA1b2C3", "0000000003.safetensors"]
    for name in (*begun, "0000000004.safetensors.sha256"):
        (folder / name).write_bytes(b"half of it")
    run(dataset, tmp_path / "run")
    assert len(list(folder.iterdir())) == 2 * CONFIG.keep


def test_old_checkpoints_are_pruned_and_the_newest_kept(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"{images:010d}.safetensors{suffix}" for images in (240, 320) for suffix in ("", ".sha256")]


def test_changed_configuration_is_an_error_unless_restarted(dataset: Path, tmp_path: Path) -> None:
    first = run(dataset, tmp_path / "run").final.read_bytes()
    other = CONFIG.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(UserError, match=r"training\.learning_rate.*--restart"):
        run(dataset, tmp_path / "run", other)
    assert run(dataset, tmp_path / "run", other, restart="if_different").final.read_bytes() != first


def test_the_default_batch_is_in_the_file_and_a_run_of_that_number_is_the_same(dataset: Path, tmp_path: Path) -> None:
    unset = CONFIG.model_copy(update={"images": 128, "checkpoints": 1, "batch_size": None})
    first = train(dataset, tmp_path / "run", MODEL, unset, SAMPLING)
    assert load_model(first.final).header.training["batch_size"] == 64
    explicit = unset.model_copy(update={"batch_size": 64})
    assert train(dataset, tmp_path / "run", MODEL, explicit, SAMPLING).train_key == first.train_key
    with pytest.raises(UserError, match=r"differs in training\.batch_size"):
        train(dataset, tmp_path / "run", MODEL, explicit.model_copy(update={"batch_size": 32}), SAMPLING)


def test_discarded_run_restarts_with_the_same_result(dataset: Path, tmp_path: Path) -> None:
    first = run(dataset, tmp_path / "run").final
    bits, modification_time = first.read_bytes(), first.stat().st_mtime_ns
    assert run(dataset, tmp_path / "run").final.stat().st_mtime_ns == modification_time
    assert run(dataset, tmp_path / "run", restart="if_different").final.stat().st_mtime_ns == modification_time
    (tmp_path / "run" / "notes.txt").write_text("mine")
    discard(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics_buffer", "notes.txt"]
    assert [path.name for path in (tmp_path / "run" / "metrics_buffer").iterdir()] == ["restarted"]
    again = run(dataset, tmp_path / "run").final
    assert again.stat().st_mtime_ns != modification_time
    assert again.read_bytes() == bits


def test_finished_run_is_set_aside_and_taken_back(dataset: Path, tmp_path: Path) -> None:
    short, output = CONFIG.model_copy(update={"images": 32, "checkpoints": 1}), tmp_path / "run"
    other = short.model_copy(update={"seed": 1})
    first = run(dataset, output, short).final.stat()
    run(dataset, output, other, restart="set_aside")
    [aside] = earlier_runs(output)
    assert (aside / "final.safetensors").stat().st_ino == first.st_ino
    taken_back = run(dataset, output, short, restart="set_aside").final.stat()
    assert (taken_back.st_ino, taken_back.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    [aside] = earlier_runs(output)
    assert read_header(aside / "final.safetensors")["model_header"]["training"]["seed"] == 1


def test_unfinished_run_is_not_set_aside(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", track=lambda _: StopAt(16))
    run(dataset, tmp_path / "run", CONFIG.model_copy(update={"images": 32}), restart="set_aside")
    assert earlier_runs(tmp_path / "run") == []


@pytest.mark.slow
def test_minutes_are_converted_to_images_once(dataset: Path, tmp_path: Path) -> None:
    config = TrainingConfig(dataset="blobs", minutes=0.1, batch_size=16, checkpoints=2)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", config, track=lambda _: StopAt(1))
    first = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))[0]
    planned = read_header(first)["total"]
    images = run(dataset, tmp_path / "run", config).images
    assert images == planned
    assert images % 16 == 0


def test_slow_machine_gets_fewer_checkpoints_and_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.1)
    folder = tmp_path / "run"
    config = TrainingConfig(dataset="blobs", minutes=0.02, batch_size=16, checkpoints=1000, keep=1000)
    with pytest.raises(Stop), caplog.at_level(logging.WARNING):
        run(dataset, folder, config, track=lambda _: StopAt(1))
    planned = json.loads((folder / "preflight.json").read_bytes())
    assert 1 <= planned["checkpoints"] < 1000
    assert any("instead of 1000" in record.getMessage() for record in caplog.records)
    total = run(dataset, folder, config).images
    grids = sorted(int(path.stem) for path in (folder / "samples").iterdir())
    assert len(grids) <= planned["checkpoints"]
    # A resumption keeps their distance.
    assert grids[-1] == total
    assert len(set(np.diff([0, *grids[:-1]]))) <= 1


def test_single_sample_grid_slower_than_the_budget_still_trains(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.1)
    config = TrainingConfig(dataset="blobs", minutes=1e-6, batch_size=16, checkpoints=6)
    assert run(dataset, tmp_path / "run", config).images == 16
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


EDM = {"weighting": "edm", "learned_uncertainty": True, "timestep_sampling": "lognormal", "ema_stds": [0.05, 0.1]}


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
def test_whatever_is_chosen_from_the_menu_learns_and_resumes_to_the_same_bits(
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


def test_two_trainings_in_one_folder_are_rejected(dataset: Path, tmp_path: Path) -> None:
    class Nested(StopAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            with pytest.raises(UserError, match="another process trains"):
                run(dataset, tmp_path / "run")
            raise Stop

    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", track=lambda _: Nested(0))


def test_training_length_is_set_once_and_defaults_to_ten_minutes() -> None:
    with pytest.raises(ValueError, match=r"either training\.images or training\.minutes"):
        TrainingConfig(images=10, minutes=1.0)
    assert (TrainingConfig().minutes, TrainingConfig().images) == (10, None)
    assert TrainingConfig(images=10).minutes is None


def test_the_share_of_time_spent_waiting_for_images_is_recorded(dataset: Path, tmp_path: Path) -> None:
    logged: list[float] = []

    class Listener(StopAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            logged.extend(value for name, value in metrics.items() if name == "data_wait")

    run(dataset, tmp_path / "run", track=lambda _: Listener(0))
    shares = [row["data_wait"] for row in read_metrics(tmp_path / "run" / "history.csv")]
    assert shares == logged
    assert len(shares) == 20
    assert all(0 < share < 1 for share in shares)


def test_resumed_history_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    lines = "images,loss,data_wait\n16,0.5,0\n32,0.4,0\n40,0.3,0\n48,0."
    (tmp_path / "history.csv").write_text(lines)
    history = MetricsFile(tmp_path / "history.csv", ("loss", "data_wait"))
    history.rewind(32)
    history.append(48, {"loss": 0.25, "data_wait": 0.125})
    assert (tmp_path / "history.csv").read_text() == "images,loss,data_wait\n16,0.5,0\n32,0.4,0\n48,0.25,0.125\n"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A data set of 64 images in 8 shards, a quarter of it held out."""
    write_dataset(tmp_path / "data" / "sharded", random_images(64), per_shard=8)
    return tmp_path / "data" / "sharded"


@pytest.mark.parametrize("window", [None, 2])
def test_streamed_shards_give_the_weights_of_local_ones(sharded: Path, tmp_path: Path, window: int | None) -> None:
    config = CONFIG.model_copy(update={"window": window})
    local = run(sharded, tmp_path / "local", config).final.read_bytes()
    shards = read_manifest(sharded).shards
    room = sum(shard.bytes for shard in shards[:4] if window) or sum(shard.bytes for shard in shards)
    store = Away(sharded, tmp_path / "remote")
    streaming = config.model_copy(update={"stream_bytes": room, "cache_bytes": 0})
    with pytest.raises(Stop):
        run(sharded, tmp_path / "streamed", streaming, store=store, track=lambda _: StopAt(112))
    streamed = run(sharded, tmp_path / "streamed", streaming, store=store)
    assert streamed.final.read_bytes() == local
    assert sum(path.stat().st_size for path in (sharded.parent / ".shards").glob("*.tar")) <= room


def test_shuffle_window_changes_the_order_and_the_run(sharded: Path, tmp_path: Path) -> None:
    whole = run(sharded, tmp_path / "run").final.read_bytes()
    windowed = CONFIG.model_copy(update={"window": 2})
    with pytest.raises(UserError, match=r"differs in training\.window"):
        run(sharded, tmp_path / "run", windowed)
    assert run(sharded, tmp_path / "run", windowed, restart="if_different").final.read_bytes() != whole


def test_in_windows_other_shards_of_the_same_images_are_another_run(tmp_path: Path) -> None:
    folders = {}
    for per_shard in (8, 16):
        folder = tmp_path / str(per_shard) / "sharded"
        manifest = write_dataset(folder, random_images(64), per_shard)
        folders[per_shard] = folder
        write_manifest(folder, manifest.model_copy(update={"content_digest": "0" * 64}))
    whole = run(folders[8], tmp_path / "plain").final.read_bytes()
    assert run(folders[16], tmp_path / "plain").final.read_bytes() == whole
    windowed = CONFIG.model_copy(update={"window": 2})
    run(folders[8], tmp_path / "windowed", windowed)
    with pytest.raises(UserError, match="differs in the data set's shards"):
        run(folders[16], tmp_path / "windowed", windowed)


def test_a_cache_too_small_is_rejected_with_what_would_fit(sharded: Path, tmp_path: Path) -> None:
    sizes = sorted((shard.bytes for shard in read_manifest(sharded).shards), reverse=True)
    store = Away(sharded, tmp_path / "remote")

    def error_of(**loading: int) -> str:
        with pytest.raises(UserError) as error:
            run(sharded, tmp_path / "run", CONFIG.model_copy(update=loading), store=store)
        return str(error.value)

    words = error_of(stream_bytes=sum(sizes) - 1)
    assert f"raise training.stream_bytes to {sum(sizes)}, or set training.window to 3 or less" in words
    words = error_of(stream_bytes=sum(sizes[:4]), window=3)
    assert f"raise training.stream_bytes to {sum(sizes[:6])}, or set training.window to 2 or less" in words
    assert "training.window to" not in error_of(stream_bytes=sum(sizes[:2]) - 1, window=1)


def test_streaming_without_a_remote_is_rejected(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.stream_bytes is set, and there is no remote"):
        run(sharded, tmp_path / "run", CONFIG.model_copy(update={"stream_bytes": 2**20}))


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


def test_dry_run_describes_the_run_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    about = preflight(dataset, MODEL, CONFIG, SAMPLING)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (about.train + about.held_out, about.shape, about.images) == (48, (1, 8, 8), 320)
    result = run(dataset, tmp_path / "run")
    weights = load_model(result.final).network.state_dict()
    assert about.parameters == sum(value.numel() for value in weights.values())
    checkpoint_bytes = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert about.disk_bytes / 3 < checkpoint_bytes < about.disk_bytes * 1.5
    assert 0 < about.seconds < 600
    words = dict(about.lines())
    assert words["length"] == f"320 images, {320 / about.train:.1f} epochs"
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert about.checkpoint_bytes == pytest.approx(largest, rel=0.3)


def test_work_grows_with_width_and_size_as_convolutions_do() -> None:
    # Nearly all of it is convolutions, whose work grows with the square of the channels and with the positions.
    small, twice = (count_flops(MODEL.model_copy(update={"width": width}), (1, 8, 8), 0) for width in (16, 32))
    assert 3.5 < twice / small < 4
    assert count_flops(MODEL, (1, 16, 16), 0) / small == pytest.approx(4, rel=0.02)


def test_a_disk_too_small_for_the_checkpoints_is_an_error_before_the_first(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No test may fill the disk of the machine it runs on.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"checkpoints in .* and its disk has 1000 Bytes free: .* lower training\.keep"):
        run(dataset, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"keep": 1}, [320]),
        ({"keep": 2}, [288, 320]),
        ({"keep": 1, "keep_every": 3}, [144, 288, 320]),
        ({"keep": 1, "keep_best": 2}, None),
    ],
)
def test_checkpoint_policy_decides_which_checkpoints_are_kept(
    dataset: Path, tmp_path: Path, policy: dict[str, int], expected: list[int] | None
) -> None:
    run(dataset, tmp_path / "run", CONFIG.model_copy(update={"checkpoints": 8} | policy))
    numbers = [int(path.stem) for path in Checkpoints(tmp_path / "run" / "checkpoints").paths()]
    if expected is None:
        rows = read_metrics(tmp_path / "run" / "losses.csv")
        best = sorted(rows, key=lambda row: row["held_out_loss_ema"])[:2]
        expected = sorted({int(row["images"]) for row in best} | {320})
    assert numbers == expected


def test_background_checkpoint_error_stops_training(dataset: Path, tmp_path: Path) -> None:
    with worker_threads(1) as pool:
        trainer = make_trainer(dataset, MODEL, CONFIG, pool)
    (tmp_path / "file").write_text("no folder")
    writer = CheckpointWriter(Checkpoints(tmp_path / "file" / "checkpoints"))
    writer.save(trainer.state.tensors(), trainer.checkpoint_header(), 1)
    with pytest.raises((FileExistsError, NotADirectoryError)):
        writer.save(trainer.state.tensors(), trainer.checkpoint_header(), 1)


def test_checkpoint_is_a_snapshot_while_training_continues(dataset: Path, tmp_path: Path) -> None:
    with worker_threads(1) as pool:
        trainer = make_trainer(dataset, MODEL, CONFIG, pool, 320)
        take_step(trainer)
        expected = {name: value.clone() for name, value in trainer.state.tensors().items()}
        with CheckpointWriter(Checkpoints(tmp_path)) as writer:
            writer.save(trainer.state.tensors(), trainer.checkpoint_header(), 1)
            for _ in range(5):
                take_step(trainer)
    tensors = load_file(tmp_path / "0000000016.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


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
