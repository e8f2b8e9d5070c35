"""The generated reference is that of the code, and the schema of ``params.yaml`` is that of its validation."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml

from diffusion.common.errors import UserError
from flows.config import load_params
from tests.builders import ROOT

SCHEMA = ROOT / "params.schema.json"
CONFIGURATIONS = (ROOT / "params.yaml", ROOT / "infra" / "demo_params.yaml")
INTERNAL = {"DARKROOM_STACK", "DARKROOM_SERVICE"}
"""Variables by which the local stack knows its own processes."""


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generating_again_gives_the_committed_files(generate: ModuleType) -> None:
    stale = [path.name for path, text in generate.generated().items() if path.read_text() != text]
    assert not stale, "run `make reference`"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("{}", True),
        ("training: {minutes: 3, dataset: faces}", True),
        ("training: {minuts: 3}", False),
        ("training: {batch_size: 0}", False),
        ("ingest: {fit: stretch}", False),
        ("model: {width: 64}", True),
        ("model: {family: gan}", True),
        ("model: {family: vae, schedule: edm}", False),
        ("sampling: {sampler: heun, churn: {amount: 1}}", True),
        ("sampling: {sampler: ddim, churn: {amount: 1}}", False),
        ("sampling: {sampler: consistency, steps: 1}", True),
        ("sampling: {steps: 1}", False),
    ],
)
def test_editors_and_darkroom_accept_the_same(text: str, valid: bool, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).is_valid(yaml.safe_load(text)) == valid
    try:
        load_params(path, [])
    except UserError:
        assert not valid
    else:
        assert valid


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_of_the_checkout_name_the_schema_and_fulfil_it(path: Path) -> None:
    match = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert match is not None
    assert (path.parent / match[1]).resolve() == SCHEMA
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))
    load_params(path, [])


def test_the_environment_page_has_each_variable_of_darkroom() -> None:
    code = "".join(path.read_text() for folder in ("flows", "diffusion") for path in (ROOT / folder).rglob("*.py"))
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    for name in set(re.findall(r"""["'](DARKROOM_[A-Z]+)["']""", code)) - INTERNAL:
        assert f"`{name}`" in page


def test_the_mlflow_page_has_each_tag_of_darkroom() -> None:
    code = "".join(path.read_text() for path in (ROOT / "flows").rglob("*.py"))
    page = (ROOT / "docs" / "reference" / "mlflow.md").read_text()
    for name in set(re.findall(r"""["'`](darkroom\.[a-z_0-9.]*[a-z0-9])["'`]""", code)):
        if not name.startswith(
            ("darkroom.dataset.", "darkroom.model.", "darkroom.py", "darkroom.registry")
        ):  # events, files
            assert f"`{name}`" in page


def test_the_page_of_names_has_only_fields_that_exist() -> None:
    reference = ROOT / "docs" / "reference"
    fields = set(re.findall(r"^\| `([a-z_]+\.[a-z_.]+)`", (reference / "configuration.md").read_text(), re.MULTILINE))
    fields |= {"sampling.sampler"}  # a heading there, as its choices have fields of their own
    sections = "ingest|model|training|sampling|registry"
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?=[`:])", (reference / "names.md").read_text())
    assert len(named) > 20
    assert set(named) <= fields
