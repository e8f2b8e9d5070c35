"""The job for Slurm: its shell starts torchrun, and that the command line, with arguments they take."""

import os
import re
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser
from typer.main import get_command

from flows.cli import app
from tests.builders.installation import INFRA

SLURM = INFRA / "slurm" / "train.sbatch"
PROGRAMS = {
    "torchrun": 'printf "%s\\n" "$@" > "$ARGUMENTS"',
    "darkroom": "true",
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "printf 'node-1\\nnode-2\\n'",
}
"""What the shells call, besides torchrun, whose arguments are kept."""
SLURM_SETS = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node-[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "8",
}


def test_shell_starts_training_on_all_nodes(tmp_path: Path) -> None:
    for program, text in PROGRAMS.items():
        path = tmp_path / program
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGUMENTS": str(tmp_path / "arguments")}
    command = ["bash", str(SLURM), "--dataset", "faces"]
    subprocess.run(command, env=os.environ | SLURM_SETS | paths, check=True)
    options = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines())
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node-1:29500", "7")
    assert options.nproc_per_node == "gpu"
    assert (options.no_python, options.training_script) == (True, "darkroom")
    with get_command(app).make_context("darkroom", options.training_script_args, resilient_parsing=True) as context:
        verb, train, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
    assert verb == "train"
    assert train.make_context("train", rest, parent=context).params["dataset"] == "faces"


def test_slurm_stops_training_in_time_and_starts_it_again() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text(), re.MULTILINE))
    assert "requeue" in options
    number = int(re.fullmatch(r"B:USR1@(\d+)", options["signal"])[1])  # type: ignore[index]
    timeout = re.search(r"--shutdown-timeout=(\d+)", SLURM.read_text())
    assert timeout is not None
    assert 30 < int(timeout[1]) < number
