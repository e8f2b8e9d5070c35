"""Write the lock files: every package with its version and hashes, from the ranges of pyproject.toml.

The lock of the checkout is what `make install` installs: all but PyTorch and what comes with it, as the machine decides
which build is wanted. The images have the same versions: ``requirements.lock`` beside this file is what both have;
``torch-cuda.lock`` what depends on the accelerator. PyTorch's builds without CUDA are not on PyPI: ``torch-cpu.lock``
is kept by hand, and pins the versions for both.
"""

import re
import subprocess
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_28"
EXTRAS = ("pipeline", "servers", "text", "diffusers", "ray")
WITH_TORCH = re.compile(r"(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")
"""Packages that come with PyTorch's build for CUDA, and not with the one for processors."""
PINNED = re.compile(r"/(torch|torchvision)-([0-9.]+)%2Bcpu-", re.MULTILINE)
EVERYWHERE = r"\(\(platform_machine == 'arm64' and sys_platform == 'darwin'\) or sys_platform == 'linux'\)"
ENVIRONMENT = re.compile(rf"( ;| and)(?: python_full_version < '3\.15' and)? {EVERYWHERE}")
"""What uv says of each package that every environment of ``tool.uv`` has."""


def resolved(extras: tuple[str, ...], *options: str) -> list[str]:
    """Return an entry for each package of ``extras``, as uv writes it: a line with the version, then its hashes."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--generate-hashes", "--no-annotate", "--no-header"]
    # It has no wheel, and without it DVC's hydra-core would be a release candidate.
    command += ["--only-binary", ":all:", "--no-binary", "antlr4-python3-runtime"]
    command += options
    command += [f"--extra={extra}" for extra in extras]
    text = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT).stdout
    return re.split(r"\n(?=\S)", text.strip())


def write(path: Path, environment: str, entries: list[str]) -> None:
    """Write a lock file."""
    path.write_text(
        f"# Made by `make lock` for {environment}; ranges are in pyproject.toml.\n" + "\n".join(entries) + "\n"
    )


def main() -> None:
    """Resolve for all machines, then for the images, and sort what was found into the files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    entries = resolved(("dev",), "--universal", "--python-version", oldest)
    entries = [ENVIRONMENT.sub("", entry, count=1) for entry in entries if not WITH_TORCH.match(entry)]
    write(ROOT / "requirements.lock", f"Python {oldest} and newer on Linux and macOS, without PyTorch", entries)
    with TemporaryDirectory() as folder:
        torch = Path(folder, "torch.txt")
        pins = PINNED.findall((HERE / "torch-cpu.lock").read_text())
        torch.write_text("".join(f"{name}=={version}\n" for name, version in pins))
        limits = ("--constraints", str(ROOT / "requirements.lock"), "--constraints", str(torch))
        entries = resolved(EXTRAS, "--python-version", PYTHON, "--python-platform", PLATFORM, *limits)
    for name, wanted in (("requirements.lock", False), ("torch-cuda.lock", True)):
        chosen = [entry for entry in entries if bool(WITH_TORCH.match(entry)) is wanted]
        write(HERE / name, f"Python {PYTHON} on x86-64", chosen)


if __name__ == "__main__":
    main()
