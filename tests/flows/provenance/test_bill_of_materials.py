"""The bill of materials of each kind of export is valid CycloneDX, says what is recorded, and is always the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from diffusion.checkpoints import read_model_header
from diffusion.data.manifest import read_manifest
from diffusion.diffusers_format.adapter import export_adapter
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.diffusers_format.import_model import import_file
from diffusion.process.samplers import SAMPLING_ADAPTER
from flows.provenance.bill_of_materials import write_bom
from flows.signing.keys import signature_path
from tests.builders import pipelines
from tests.builders.command_line import CommandLine
from tests.builders.signing_keys import identity
from tests.builders.small_models import write_lora, write_model

SAMPLING = SAMPLING_ADAPTER.validate_python({"steps": 4})
METRICS = {"kid_efflite0": 0.02, "kid_se_efflite0": 0.001, "copies_share": 0.1, "copies_share_low": 0.05}
METRICS |= {"copies_share_high": 0.2, "fd_efflite0": float("nan"), "samples": 64.0, "champion_kid": 1.0}


def valid(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom: dict[str, Any] = json.loads(text)
    references = [bom["metadata"]["component"]["bom-ref"], *(each["bom-ref"] for each in bom["components"])]
    assert len(set(references)) == len(references)
    assert {name for each in bom["dependencies"] for name in (each["ref"], *each["dependsOn"])} == set(references)
    return bom


def of_type(bom: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each for each in bom["components"] if each["type"] == kind]


def test_a_trained_model_names_data_metrics_libraries_and_files(dataset: Path, tmp_path: Path) -> None:
    weights, data = write_model(tmp_path / "final.safetensors", seed=0, images=64), read_manifest(dataset)
    export = export_to_diffusers(weights, tmp_path / "ex" / "faces", SAMPLING, "models:/faces/3", "f" * 32)
    arguments = data.model_copy(update={"licence": "cc-by-4.0"}), METRICS, ["torch==2.9.0", "safetensors==0.6"], "Ours"
    path = write_bom(weights, export, *arguments)
    assert path == tmp_path / "ex" / "faces.cdx.json"
    bom, text = valid(path), path.read_bytes()
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "faces", "3")
    assert model["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(weights.read_bytes()).hexdigest()}]
    assert model["licenses"] == [{"license": {"name": "Ours"}}]
    card = model["modelCard"]
    assert card["modelParameters"]["task"] == "unconditional-image-generation"
    rows = {each["type"]: each for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert set(rows) == {"kid_efflite0", "copies_share", "samples"}
    low, high = (float(rows["kid_efflite0"]["confidenceInterval"][f"{end}Bound"]) for end in ("lower", "upper"))
    assert (low, high) == pytest.approx((0.02 - 1.96 * 0.001, 0.02 + 1.96 * 0.001), abs=1e-6)
    assert rows["copies_share"]["confidenceInterval"] == {"lowerBound": "0.05", "upperBound": "0.2"}
    [trained_on] = of_type(bom, "data")
    assert card["modelParameters"]["datasets"] == [{"ref": trained_on["bom-ref"]}]
    assert trained_on["hashes"][0]["content"] == read_model_header(weights).content_digest
    assert trained_on["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert [each["purl"] for each in of_type(bom, "library")] == ["pkg:pypi/safetensors@0.6", "pkg:pypi/torch@2.9.0"]
    files = {each["name"]: each["hashes"][0]["content"] for each in of_type(bom, "file")}
    folder = tmp_path / "ex" / "faces"
    assert files == {
        each.relative_to(folder).as_posix(): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in folder.rglob("*")
        if each.is_file()
    }
    again = export_to_diffusers(weights, folder, SAMPLING, "models:/faces/3", "f" * 32)
    assert write_bom(weights, again, *arguments).read_bytes() == text
    assert not any(each["name"] == "darkroom:records" for each in trained_on.get("properties", ()))
    # Without the data set here, the bill says that it is not complete.
    [unknown] = of_type(valid(write_bom(weights, again)), "data")
    assert "licenses" not in unknown
    assert any(each["name"] == "darkroom:records" for each in unknown["properties"])


def test_imported_and_fine_tuned_pipelines_name_origin_and_licence(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "made")
    base = import_file(str(folder), tmp_path / "base.safetensors", None, tmp_path / "downloads")
    digest = base.sha256
    imported = export_to_diffusers(base.file, tmp_path / "imported", SAMPLING)
    bom = valid(write_bom(base.file, imported))
    assert bom["metadata"]["component"]["modelCard"]["modelParameters"]["task"] == "text-to-image"
    assert of_type(bom, "data") == []
    [origin] = of_type(bom, "machine-learning-model")
    assert (origin["name"], origin["licenses"]) == ("made", [{"license": {"name": "openrail"}}])
    recorded = {each["name"].removeprefix("darkroom:sha256:"): each["value"] for each in origin["properties"]}
    assert recorded.items() >= {each["name"]: each["hashes"][0]["content"] for each in of_type(bom, "file")}.items()
    assert of_type(bom, "library")
    adapter = write_lora(tmp_path / "tuned.safetensors", base.file, seed=0)
    for kind, export in (("whole", export_to_diffusers), ("adapter", export_adapter)):
        options = (SAMPLING,) if kind == "whole" else ()
        bom = valid(write_bom(adapter, export(adapter, tmp_path / kind, *options)))  # type: ignore[operator]
        trained_from, origin = sorted(of_type(bom, "machine-learning-model"), key=lambda each: "hashes" not in each)
        assert trained_from["hashes"][0]["content"] == digest
        assert trained_from["licenses"] == origin["licenses"] == [{"license": {"name": "openrail"}}]
        assert len(of_type(bom, "data")) == 1


def test_the_command_line_signs_an_export_and_verifies_it_offline(
    no_servers: None, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command_line.answer
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    alice = identity(tmp_path / "alice", passphrase="open sesame")
    words = ("model", "export", "--to", "diffusers", "--model", "final.safetensors", "--out", "ex/blobs", "--json")
    monkeypatch.setenv("DARKROOM_SIGNING_KEY", str(alice.key))
    assert run(*words, "--sign")[0] == 2
    assert not (tmp_path / "ex").exists()
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "open sesame")
    code, out, errors = run(*words, "--sign")
    assert code == 0, errors
    assert json.loads(out)["bom"] == "ex/blobs.cdx.json"
    names = {path.name for path in (tmp_path / "ex").iterdir()}
    assert names == {"blobs", "blobs.cdx.json", "blobs.cdx.json.sig", "blobs.sig"}
    valid(tmp_path / "ex" / "blobs.cdx.json")
    code, out, errors = run("verify", "ex/blobs", "--key", str(alice.public), "--json")
    assert code == 0, errors
    about = json.loads(out)
    assert (about["verified"], about["trusted"]) == (True, True)
    assert [each["kind"] for each in about["checks"]] == ["model", "bill of materials"]
    bom = tmp_path / "ex" / "blobs.cdx.json"
    whole = bom.read_text()
    bom.write_text(whole.replace("machine-learning-model", "machine-learning-models"))
    code, out, errors = run("verify", "ex/blobs", "--key", str(alice.public))
    assert (code, "bill of materials" in errors) == (3, True), errors
    assert [line.split()[0] for line in out.splitlines()] == ["verified", "FAILED"]
    # Signed as well, and of another export.
    digest = next(each for each in json.loads(whole)["components"] if each["type"] == "file")["hashes"][0]["content"]
    bom.write_text(whole.replace(digest, "0" * 64))
    alice.signer(certified=False).sign(bom, signature_path(bom))
    code, out, errors = run("verify", "ex/blobs", "--key", str(alice.public))
    assert (code, "was altered" in errors) == (3, True), errors
    bom.unlink()
    assert run("verify", "ex/blobs", "--key", str(alice.public))[0] == 3
    bom.write_text(whole)
    (tmp_path / "ex" / "blobs.sig").unlink()
    for arguments, code in ((("ex/blobs", "--key", str(alice.public)), 3), (("ex/blobs",), 2), (("none",), 2)):
        assert run("verify", *arguments)[0] == code, arguments
