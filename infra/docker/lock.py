"""Write the lock files of the images: every package with its version and hashes, from the ranges of pyproject.toml.

``requirements.lock`` is what both images have; ``torch-cuda.lock`` what depends on the accelerator. PyTorch's builds
without CUDA are not on PyPI: ``torch-cpu.lock`` is kept by hand, and pins the versions for both.
"""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_28"
EXTRAS = ("pipeline", "servers", "text", "diffusers", "ray")
WITH_TORCH = re.compile(r"(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")
"""Packages that come with PyTorch's build for CUDA, and not with the one for processors."""
PINNED = re.compile(r"/(torch|torchvision)-([0-9.]+)%2Bcpu-", re.MULTILINE)


def resolved(constraints: str) -> str:
    """All packages under ``constraints``, as uv writes them: a line with the version, then its hashes."""
    with TemporaryDirectory() as folder:
        limits = Path(folder, "constraints.txt")
        limits.write_text(constraints)
        command = [
            "uv",
            "pip",
            "compile",
            "pyproject.toml",
            "--quiet",
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
        ]
        command += ["--python-version", PYTHON, "--python-platform", PLATFORM, "--constraints", str(limits)]
        # Without the one that has no wheel, DVC's hydra-core would be a release candidate.
        command += ["--only-binary", ":all:", "--no-binary", "antlr4-python3-runtime"]
        command += [f"--extra={extra}" for extra in EXTRAS]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=HERE.parents[1]).stdout


def main() -> None:
    """Resolve, and sort what was found into the two files."""
    pins = PINNED.findall((HERE / "torch-cpu.lock").read_text())
    entries = re.split(r"\n(?=\S)", resolved("".join(f"{name}=={version}\n" for name, version in pins)).strip())
    head = f"# Made by `make lock` for Python {PYTHON} on x86-64; ranges are in pyproject.toml.\n"
    for name, wanted in (("requirements.lock", False), ("torch-cuda.lock", True)):
        chosen = [entry for entry in entries if bool(WITH_TORCH.match(entry)) is wanted]
        (HERE / name).write_text(head + "\n".join(chosen) + "\n")


if __name__ == "__main__":
    main()
