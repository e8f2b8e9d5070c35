"""Processes that sample are killed at random moments, two of them at one batch: the same bytes are there in the end.

Without orchestration, so that most moments fall into drawing and uploading; test_sampling_stack.py has it around.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.storage.s3 import Location, Store
from tests.builders import ROOT
from tests.builders.sampling_batches import batch, stored_files
from tests.builders.small_models import write_model

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

BATCH = batch(4096, format="tar", chunk=3584)
"""In tars of several megabytes."""
SAMPLE_SCRIPT = """
import sys
from pathlib import Path
from flows.sampling import generate_batch
from flows.sampling.batch_format import SamplingBatch
from flows.storage.s3 import Location, Store
store, batch, place = Store(), SamplingBatch.model_validate_json(sys.argv[1]), Location.parse(sys.argv[2])
print("begins", flush=True)
for chunk in generate_batch.list_unfinished_chunks(store, batch, place):
    generate_batch.generate_chunk(store, batch, place, Path(sys.argv[3]), chunk, None, 1)
generate_batch.finish(store, batch, place)
"""


def start(place: Location, weights: Path) -> subprocess.Popen[str]:
    """A process that samples, which has just begun to."""
    command = [sys.executable, "-c", SAMPLE_SCRIPT, BATCH.json_bytes().decode(), str(place), str(weights)]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


@pytest.mark.drill
def test_killed_and_doubled_sampling_gives_identical_bytes(
    store: Store, bucket: str, tmp_path: Path, kills: int
) -> None:
    weights = write_model(tmp_path / "weights.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    undisturbed, killed = Location(bucket, "undisturbed"), Location(bucket, "killed")
    process, start_time = start(undisturbed, weights), time.monotonic()
    assert process.wait(600) == 0
    seconds = time.monotonic() - start_time
    moments = random.Random(1)
    for _ in range(kills):
        process = start(killed, weights)
        time.sleep(moments.uniform(0.1, 0.9) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    both = [start(killed, weights) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    assert stored_files(store, killed) == stored_files(store, undisturbed)
    names = {f"samples-0000{n}.tar" for n in range(2)} | {f"manifest/part-0000{n}.jsonl" for n in range(2)}
    assert set(stored_files(store, killed)) == {*names, "manifest.parquet", "_SUCCESS"}
