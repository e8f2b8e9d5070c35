"""``make gpu``, which is run on a GPU rarely: its rehearsal, and parts of it that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import ROOT

pytestmark = pytest.mark.slow
PARTS = (
    *("products", "resume", "sampling", "evaluation", "adapters"),
    *("unet-small", "unet-large", "transformer", "sdxl", "diffusers"),
)
ON_SIMULATED_DEVICE = """
from tests.builders.simulated_device import register
register()
import json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "benchmarks")
import gpu
bench = replace(gpu.Bench("cpu", gpu.REDUCED, Path(sys.argv[1])), device="auto")
assert bench.place.type == "simulated"
rows = []
for part in ("sampling", "adapters"):
    gpu.run_part(part, bench, rows.append)
print(json.dumps(rows))
"""


def rehearse(folder: Path, *parts: str, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows of the table, and what was shown."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--output", str(folder / "gpu")]
    process = subprocess.run(
        [*command, *(["--parts", *parts] if parts else [])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    rows: list[dict[str, Any]] = json.loads((folder / "gpu.json").read_text())["rows"]
    table = (folder / "gpu.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in table if line.startswith("| ")][1:] == [row["what"] for row in rows]
    return process.returncode, rows, process.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_machine_without_cuda_gets_one_line() -> None:
    process = subprocess.run([sys.executable, "benchmarks/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert not process.stdout


@pytest.mark.parametrize(
    ("planted", "reasons"),
    [
        ("raise ImportError('planted')", ["ImportError: planted"] * 2),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            ["its process ended with code -9"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["error", "crash"],
)
def test_failing_part_is_a_row_and_the_others_run(tmp_path: Path, planted: str, reasons: list[str]) -> None:
    (tmp_path / "efficientnet_lite_pytorch.py").write_text(planted)
    code, rows, shown = rehearse(tmp_path, "evaluation", "products", PYTHONPATH=str(tmp_path))
    assert code == 1
    failures = [row["failure"] for row in rows if row["part"] == "evaluation"]
    assert [failure[: len(reason)] for failure, reason in zip(failures, reasons, strict=True)] == reasons
    [product] = [row for row in rows if row["part"] == "products"]
    assert product["failure"] is None
    assert product["ratio"] > 0
    assert shown.count(" left] ") == len(rows)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_rehearsal_measures_every_part(tmp_path: Path) -> None:
    code, rows, shown = rehearse(tmp_path)
    assert [row for row in rows if row["failure"]] == []
    assert code == 0
    assert [*dict.fromkeys(row["part"] for row in rows)] == [*PARTS]
    assert not (tmp_path / "gpu.log").exists()
    assert shown.count(" left] ") == len(rows) == 40


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_parts_mix_no_tensors_of_gpu_and_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_SIMULATED_DEVICE, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads(process.stdout.splitlines()[-1])
    assert [row for row in rows if row[-1]] == []
    assert {row[0] for row in rows} == {"sampling", "adapters"}
