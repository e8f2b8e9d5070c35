"""The folder of a run: which run and which checkpoints are in it, after kills, restarts and at the end."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.training.checkpointing import Checkpoints, CheckpointWriter
from diffusion.training.config import earlier_runs
from diffusion.training.logging import read_metrics
from diffusion.training.run_folder import discard
from diffusion.training.train import train
from tests.builders.small_trainers import make_trainer, take_step
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt, run


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


def test_default_batch_size_is_recorded_and_equals_the_explicit_one(dataset: Path, tmp_path: Path) -> None:
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


def test_two_trainings_in_one_folder_are_rejected(dataset: Path, tmp_path: Path) -> None:
    class Nested(StopAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            with pytest.raises(UserError, match="another process trains"):
                run(dataset, tmp_path / "run")
            raise Stop

    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", track=lambda _: Nested(0))


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
