"""The jobs for Slurm and SkyPilot: their shells start torchrun, and that the command line, with arguments they take."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from flows.cli import app
from tests.builders.installation import INFRA

SLURM, SKYPILOT = INFRA / "slurm" / "train.sbatch", INFRA / "skypilot" / "train.yaml"
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
SKYPILOT_SETS = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_IPS": "node-1\nnode-2",
    "SKYPILOT_TASK_ID": "7",
    "DATASET": "faces",
}


@pytest.mark.parametrize("name", ["slurm", "skypilot"])
def test_shell_starts_training_on_all_nodes(name: str, tmp_path: Path) -> None:
    for program, text in PROGRAMS.items():
        path = tmp_path / program
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    if name == "slurm":
        command, variables = ["bash", str(SLURM), "--dataset", "faces"], SLURM_SETS
    else:
        command, variables = ["bash", "-c", yaml.safe_load(SKYPILOT.read_text())["run"]], SKYPILOT_SETS
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGUMENTS": str(tmp_path / "arguments")}
    subprocess.run(command, env=os.environ | variables | paths, check=True)
    options = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines())
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node-1:29500", "7")
    assert options.nproc_per_node in ("gpu", "8")
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


def test_skypilot_keeps_secrets_out_of_the_file_and_runs_off_the_nodes() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert not any(task["secrets"].values())
    assert not re.search("PASSWORD|SECRET|KEY|AUTH", " ".join(task["envs"]))
    [(place, mount)] = task["file_mounts"].items()
    assert f'training.output="{place}/' in task["run"]
    assert mount["mode"] == "MOUNT_CACHED"
