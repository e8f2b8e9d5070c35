"""What no machine without a GPU can show, in about ten minutes on one with CUDA: speed, equal bits, and memory.

    make gpu                        # or python benchmarks/gpu.py; writes benchmarks/gpu.md and gpu.json
    make gpu DEVICE=cpu             # the rehearsal: the same parts with tiny networks, written to gpu-rehearsal.*
    python benchmarks/gpu.py --parts resume sampling

Each part runs in a process of its own, so that one that fails, crashes or hangs stops no other, and the peak of memory
is its own. A row of the table is a measurement with its result, its ratio to what it is compared with, and ``ok``, or
why it failed. Networks, data sets and pipelines are random: nothing is downloaded. The exit code is 1 if a row failed,
and 2 without CUDA.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_bench import FULL, REDUCED, Bench, Measurement
from gpu_results import adapters, evaluation, resume, sampling
from gpu_speed import beside_diffusers, matrix_products, sdxl, transformer, unet_part

from diffusion.common.device import device_name, resolve_device
from diffusion.common.files import write_bytes, write_json
from diffusion.common.threads import cores

ROOT = Path(__file__).parents[1]
PART_MINUTES = 10
"""After which a part hangs."""
logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of the table."""

    part: str
    what: str
    result: str
    ratio: float | None
    failure: str | None
    """Why there is no result, or why it is wrong, in a line; None: it is ok."""

    @property
    def line(self) -> str:
        """The row for the screen."""
        ratio = "" if self.ratio is None else f" ({self.ratio:.2f}×)"
        return f"{self.part} | {self.what} | {self.result}{ratio} | {self.failure or 'ok'}"


class Part(NamedTuple):
    """A part of the table."""

    measure: Callable[[Bench], Iterable[Measurement]]
    seconds: float
    """About how long it takes on an H100, from which the time left is estimated."""


PARTS: Mapping[str, Part] = {
    "products": Part(matrix_products, 8),
    "resume": Part(resume, 90),
    "sampling": Part(sampling, 30),
    "evaluation": Part(evaluation, 30),
    "adapters": Part(adapters, 50),
    "unet-small": Part(unet_part(0), 70),
    "unet-large": Part(unet_part(1), 70),
    "transformer": Part(transformer, 70),
    "sdxl": Part(sdxl, 120),
    "diffusers": Part(beside_diffusers, 80),
}


def describe(error: BaseException) -> str:
    """Describe ``error`` in a line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300]


def run_part(name: str, bench: Bench, report: Callable[[Row], None], parts: Mapping[str, Part] = PARTS) -> None:
    """Measure a part, and ``report`` each row as soon as it is known; an error is the reason in its row."""
    measurements = iter(parts[name].measure(bench))
    while True:
        what = "set up"
        try:
            if (measurement := next(measurements, None)) is None:
                return
            what, work = measurement
            result, ratio = work()
            report(Row(name, what, result, ratio, None))
        except Exception as error:  # whatever it is, the next one may be fine
            logger.exception("%s, %s", name, what)
            report(Row(name, what, "", None, describe(error)))
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()


def run_child(name: str, args: argparse.Namespace, scratch: Path, log: Path, report: Callable[[Row], None]) -> None:
    """Measure a part in a process of its own, whose other output goes to the file ``log``."""
    command = [sys.executable, __file__, "--device", args.device, "--scratch", str(scratch), "--run", name]
    environment = os.environ | {
        # tests/builders write small data sets and pipelines.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        # Read at the first product of matrices, which need not be Darkroom's.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
    ):
        timer = threading.Timer(60 * PART_MINUTES, child.kill)
        timer.daemon = True
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('["'):
                report(Row(*json.loads(line)))
        hung = not timer.is_alive()
        timer.cancel()
    if child.returncode:
        why = f"took over {PART_MINUTES} minutes" if hung else f"ended with code {child.returncode}"
        report(Row(name, "the rest of this part", "", None, f"its process {why}: see {log}"))


def describe_machine(device: torch.device) -> dict[str, str]:
    """Describe what results depend on."""
    facts = {
        "device": device_name(device),
        "machine": f"{platform.system()} {platform.release()}, {cores()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("darkroom-diffusion", "diffusers", "transformers", "peft", "triton"):
        with suppress(PackageNotFoundError):
            facts[name] = version(name)
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        facts["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    facts["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
    facts["compute capability"] = f"{properties.major}.{properties.minor}"
    facts["CUDA"] = str(torch.version.cuda)
    facts["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    with suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return facts


def write_tables(stem: Path, facts: Mapping[str, str], rows: Sequence[Row], minutes: float) -> None:
    """Write ``stem``.md and ``stem``.json."""
    failed = [row for row in rows if row.failure]
    head = f"{len(rows)} rows in {minutes:.1f} minutes, {len(failed)} failed. `make gpu` writes this page."
    lines = ["# A GPU's first ten minutes", "", head, "", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
    lines += ["| part | what | result | ratio | |", "|---|---|---|---:|---|"]
    for row in rows:
        cells = (row.part, row.what, row.result, "" if row.ratio is None else f"{row.ratio:.2f}", row.failure or "ok")
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    write_bytes(stem.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    content = {"machine": dict(facts), "minutes": round(minutes, 2), "rows": [row._asdict() for row in rows]}
    write_json(stem.with_suffix(".json"), content)


def run_all(args: argparse.Namespace, stem: Path, scratch: Path) -> list[Row]:
    """Measure the parts that ``args`` name, and write the tables after each; returns the rows."""
    rows, start, done = list[Row](), time.perf_counter(), 0.0
    log, facts = stem.with_suffix(".log"), describe_machine(resolve_device(args.device))
    total = sum(PARTS[name].seconds for name in args.parts)
    stem.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)

    def report(row: Row) -> None:
        rows.append(row)
        passed = time.perf_counter() - start
        # As fast as the parts before, of which the first says little.
        left = (total - done) * (passed / done if done > 30 else 1.0)
        print(f"[{passed / 60:4.1f} min, about {left / 60:.0f} left] {row.line}", flush=True)

    for name in args.parts:
        run_child(name, args, scratch, log, report)
        done += PARTS[name].seconds
        write_tables(stem, facts, rows, (time.perf_counter() - start) / 60)
    if not any(row.failure for row in rows):
        log.unlink(missing_ok=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal at reduced size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, help="the tables without their endings; default: benchmarks/gpu")
    parser.add_argument("--scratch", type=Path, help="for data sets and models, 40 GB; default: a temporary folder")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU with CUDA: DEVICE=cpu rehearses all of it at reduced size", file=sys.stderr)
        sys.exit(2)
    if args.run:
        bench = Bench(args.device, FULL if args.device == "cuda" else REDUCED, args.scratch)
        run_part(args.run, bench, lambda row: print(json.dumps(row), flush=True))
        return
    stem = args.output or ROOT / "benchmarks" / ("gpu" if args.device == "cuda" else "gpu-rehearsal")
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        rows = run_all(args, stem, args.scratch or Path(temporary))
    failed = sum(row.failure is not None for row in rows)
    print(f"{len(rows)} rows, {failed} failed: {stem.with_suffix('.md')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
