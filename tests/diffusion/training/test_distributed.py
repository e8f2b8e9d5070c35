"""Several processes train as one would, whatever happens to them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoints import GUIDE, read_model_header, read_tensors, save_tensors
from diffusion.common.files import sha256_file
from diffusion.common.model_files import read_header
from diffusion.data.ingest.ingest import forget_encodings
from diffusion.training.checkpointing import Checkpoints
from diffusion.training.logging import read_metrics
from tests.builders import ROOT
from tests.builders.bucketed import bucketed_set
from tests.builders.captioned import needs_encoder, squares
from tests.builders.small_datasets import ingest_blobs, write_blobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """
import sys
from pathlib import Path
from diffusion.process.samplers import sampling_config
from diffusion.families.config import ModelConfig
from diffusion.training.config import TrainingConfig
from diffusion.training.train import train
options = dict(each.split("=") for each in sys.argv if "=" in each)
shard = int(options["shard"]) if "shard" in options else "shard" in sys.argv
model = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1, dropout=0.1, text="text" in sys.argv)
length = {"images": int(sys.argv[3]), "checkpoints": 8} if sys.argv[3] != "0" else {"minutes": 0.3, "checkpoints": 2}
config = TrainingConfig(**length, batch_size=16, warmup_images=32, keep=2, cpu_threads=2,
    learned_uncertainty=True, shard=shard, optimizer="adamw" if shard or "adamw" in sys.argv else "muon",
    micro_batch=int(options["micro"]) if "micro" in options else None, init_from=options.get("from"))
train(Path(sys.argv[1]), Path(sys.argv[2]), model, config, sampling_config(steps=2, compute_batch=36))
"""


def start(
    dataset: Path, output: Path, processes: int, images: int = 960, restarts: int = 0, *more: str
) -> subprocess.Popen[bytes]:
    script = output.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "tests.builders.forked_ranks", str(processes)]
    if restarts:
        command[2:] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), str(dataset), str(output), str(images), *more],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out.decode()[-3000:]


def wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(path.glob("*.sha256"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_all(process: subprocess.Popen[bytes], output: Path) -> None:
    """``process`` and the workers that it started for ``output``, all at once."""
    os.killpg(process.pid, signal.SIGKILL)
    for child in psutil.process_iter(["cmdline"]):
        if str(output) in " ".join(child.info["cmdline"] or ()):
            child.kill()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return ingest_blobs(write_blobs(folder / "images"), folder / "blobs")


@pytest.fixture(scope="module")
def two(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two processes that nothing happens to."""
    output = tmp_path_factory.mktemp("two") / "run"
    finish(start(dataset, output, 2))
    return output


def curve(output: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(output / "history.csv")])


@pytest.mark.drill
@pytest.mark.long
def test_two_processes_have_the_losses_of_one_also_after_a_change_between(
    dataset: Path, two: Path, tmp_path: Path
) -> None:
    finish(start(dataset, tmp_path / "one", 1))
    # Sums in another order differ in their last digits, which grow from step to step.
    np.testing.assert_allclose(curve(two)[:20], curve(tmp_path / "one")[:20], rtol=2e-2)
    np.testing.assert_allclose(curve(two), curve(tmp_path / "one"), rtol=0.3)

    process = start(dataset, tmp_path / "changed", 2)
    wait_for(tmp_path / "changed" / "checkpoints", 2)
    kill_all(process, tmp_path / "changed")
    finish(start(dataset, tmp_path / "changed", 1))
    np.testing.assert_allclose(curve(tmp_path / "changed"), curve(tmp_path / "one"), rtol=0.3)


@pytest.mark.long
@pytest.mark.drill
def test_a_worker_that_is_killed_is_started_again_and_the_end_is_the_same(
    dataset: Path, two: Path, tmp_path: Path
) -> None:
    process = start(dataset, tmp_path / "cut", 2, restarts=3)
    wait_for(tmp_path / "cut" / "checkpoints", 2)
    workers = [child for child in psutil.Process(process.pid).children() if "script.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    finish(process)
    whole, cut = (load_file(output / "final.safetensors") for output in (two, tmp_path / "cut"))
    assert all(np.array_equal(value.numpy(), cut[name].numpy()) for name, value in whole.items())


@pytest.mark.long
@pytest.mark.drill
def test_sharded_training_matches_unsharded_training(dataset: Path, tmp_path: Path) -> None:
    finish(start(dataset, tmp_path / "whole", 2, 640, 0, "adamw"))
    finish(start(dataset, tmp_path / "shared", 2, 640, 0, "shard"))
    np.testing.assert_allclose(curve(tmp_path / "shared")[:20], curve(tmp_path / "whole")[:20], rtol=2e-2)
    final = load_file(tmp_path / "shared" / "final.safetensors")
    assert {name: value.shape for name, value in final.items()} == {
        name: value.shape for name, value in load_file(tmp_path / "whole" / "final.safetensors").items()
    }

    process = start(dataset, tmp_path / "cut", 2, 640, 0, "shard")
    wait_for(tmp_path / "cut" / "checkpoints", 2)
    kill_all(process, tmp_path / "cut")
    shutil.copytree(tmp_path / "cut", tmp_path / "changed")
    finish(start(dataset, tmp_path / "cut", 2, 640, 0, "shard"))
    assert all(
        torch.equal(value, final[name]) for name, value in load_file(tmp_path / "cut" / "final.safetensors").items()
    )
    # One process alone goes on from what two had in shares.
    finish(start(dataset, tmp_path / "changed", 1, 640, 0, "adamw"))
    np.testing.assert_allclose(curve(tmp_path / "changed"), curve(tmp_path / "whole"), rtol=0.3)


@pytest.mark.long
@pytest.mark.drill
def test_a_checkpoint_of_any_mesh_continues_on_any_other(dataset: Path, tmp_path: Path) -> None:
    hybrid = (4, 320, 0, "shard=2", "micro=2")
    finish(start(dataset, tmp_path / "one", 1, 320, 0, "adamw", "micro=2"))
    finish(start(dataset, tmp_path / "whole", *hybrid))
    np.testing.assert_allclose(curve(tmp_path / "whole"), curve(tmp_path / "one"), rtol=2e-2)
    newest = Checkpoints(tmp_path / "whole" / "checkpoints").paths()[-1]
    # The file that one process would have written of these tensors.
    alone = save_tensors(tmp_path / "alone.safetensors", load_file(newest), read_header(newest))
    assert sha256_file(newest) == alone

    process = start(dataset, tmp_path / "cut", *hybrid)
    wait_for(tmp_path / "cut" / "checkpoints", 2)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob(".*.partial")):
        assert time.monotonic() < deadline
    kill_all(process, tmp_path / "cut")
    shutil.copytree(tmp_path / "cut", tmp_path / "changed")
    finish(start(dataset, tmp_path / "cut", *hybrid))
    final = load_file(tmp_path / "whole" / "final.safetensors")
    assert all(
        torch.equal(value, final[name]) for name, value in load_file(tmp_path / "cut" / "final.safetensors").items()
    )
    assert not list((tmp_path / "cut").rglob("*.partial"))
    finish(start(dataset, tmp_path / "changed", 2, 320, 0, "shard", "micro=2"))
    np.testing.assert_allclose(curve(tmp_path / "changed"), curve(tmp_path / "one"), rtol=2e-2)


@pytest.mark.long
def test_sharded_training_that_begins_with_a_model_keeps_its_guide(dataset: Path, tmp_path: Path) -> None:
    finish(start(dataset, tmp_path / "first", 1, 320, 0, "adamw"))
    final = tmp_path / "first" / "final.safetensors"
    finish(start(dataset, tmp_path / "warm", 2, 160, 0, "shard", f"from={final}"))
    warm = tmp_path / "warm" / "final.safetensors"
    ours, theirs = read_tensors(warm, GUIDE), read_tensors(final, GUIDE)
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert read_model_header(warm).guide_images == read_model_header(final).guide_images


@pytest.mark.long
def test_sharded_training_supports_a_length_in_minutes(dataset: Path, tmp_path: Path) -> None:
    finish(start(dataset, tmp_path / "run", 2, 0, 0, "shard"))
    assert (tmp_path / "run" / "final.safetensors").is_file()


@pytest.mark.long
def test_sharding_over_one_process_is_an_error(dataset: Path, tmp_path: Path) -> None:
    process = start(dataset, tmp_path / "alone", 1, 640, 0, "shard")
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "training.shard shares the network out among processes, and there is one" in out.decode()


@pytest.mark.long
@needs_encoder
def test_captions_encoded_by_one_rank_reach_both(tmp_path: Path) -> None:
    squares(tmp_path / "squares")
    for name, processes in (("one", 1), ("two", 2)):
        finish(start(tmp_path / "squares", tmp_path / name, processes, 320, 0, "text"))
        forget_encodings(tmp_path / "squares")
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=2e-2)


@pytest.mark.long
@pytest.mark.drill
def test_batches_of_one_bucket_are_shared_out_and_resumed(tmp_path: Path) -> None:
    data = bucketed_set(tmp_path)
    for name, processes in (("one", 1), ("two", 2), ("four", 4)):
        finish(start(data, tmp_path / name, processes, 320))
    for name in ("two", "four"):
        np.testing.assert_allclose(curve(tmp_path / name)[:20], curve(tmp_path / "one")[:20], rtol=2e-2)
    process = start(data, tmp_path / "cut", 2, 320)
    wait_for(tmp_path / "cut" / "checkpoints", 2)
    kill_all(process, tmp_path / "cut")
    finish(start(data, tmp_path / "cut", 2, 320))
    whole, cut = (load_file(tmp_path / name / "final.safetensors") for name in ("two", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
