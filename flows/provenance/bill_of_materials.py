"""Bill of materials of an exported model, in the format CycloneDX 1.6 (ML-BOM).

It is a function of the export and of the records that are available here. Where the data set's are not, it says so.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from diffusion.checkpoints import find_base, read_model_header
from diffusion.common.files import digest_of, sibling, write_json
from diffusion.data.manifest import Manifest
from diffusion.diffusers_format.export import ExportResult
from diffusion.evaluation.estimate import DEVIATIONS
from diffusion.families.header import ModelHeader

BOM = ".cdx.json"
DIGEST = re.compile("[0-9a-f]{64}")
ERROR_OR_BOUND = re.compile(r".*(_se|_error|_low|_high)|[a-z]+_se_.*|(real_baseline|champion).*")
"""Metrics that belong to another one, or to something else than the model."""
Component = dict[str, Any]


def bom_path(export: Path) -> Path:
    """Path of the bill of materials beside an export, which stays exactly what it is."""
    return sibling(export, BOM)


def write_bom(
    weights: Path,
    export: ExportResult,
    data: Manifest | None = None,
    metrics: Mapping[str, float] = {},
    libraries: Sequence[str] = (),
    licence: str | None = None,
) -> Path:
    """Write the bill of materials beside an export; equal inputs give equal bytes.

    Args:
        weights: The exported model file, with those that it is based on beside it.
        export: The export.
        data: Manifest of the data set it was trained on; None: unknown here.
        metrics: Metrics by name; of a metric with its bounds or standard error, the 95 % interval is written.
        libraries: Libraries that the version was registered with, as NAME==VERSION; empty: not recorded.
        licence: Licence of the weights; None: an imported pipeline's, if it has one.
    """
    header = read_model_header(weights)
    model, parts = _model(header, export, licence), list[Component]()
    if header.origin is None or header.images:
        parts += _datasets(header, data)
        model["modelCard"]["modelParameters"]["datasets"] = [{"ref": part["bom-ref"]} for part in parts]
    model["modelCard"] |= _performance(metrics)
    # What was fine-tuned may name the origin of its base as its own.
    parts += {part["bom-ref"]: part for part in _bases(weights, header)}.values()
    if header.origin is not None and not libraries:
        libraries = [f"{name}=={version}" for name, version in header.origin.libraries.items()]
    note = "as registered" if export.version else "as imported" if libraries else "not recorded in a model file"
    model["properties"].append(_property("libraries", note))
    parts += [
        {
            "bom-ref": f"pkg:pypi/{name.lower()}@{version}",
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower()}@{version}",
        }
        for name, version in sorted(line.split("==") for line in libraries if "==" in line)
    ]
    parts += [
        {"bom-ref": f"file:{name}", "type": "file", "name": name, "hashes": _sha256(digest)}
        for name, digest in sorted(export.files.items())
    ]
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": parts,
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": sorted(part["bom-ref"] for part in parts)}],
    }
    bom["serialNumber"] = f"urn:uuid:{uuid5(NAMESPACE_URL, digest_of(bom))}"
    path = bom_path(export.folder)
    write_json(path, bom)
    return path


def read_bom_files(path: Path) -> dict[str, str]:
    """Read the SHA-256 of the files by their paths in a bill of materials; raises ValueError for another file."""
    try:
        components = json.loads(path.read_bytes())["components"]
        return {
            component["name"]: component["hashes"][0]["content"]
            for component in components
            if component["type"] == "file"
        }
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a bill of materials of an export") from error


def _model(header: ModelHeader, export: ExportResult, licence: str | None) -> Component:
    name, _, number = (export.version or "").removeprefix("models:/").partition("/")
    text = bool(getattr(header.model, "text", False))
    is_conditional = text or (header.origin is not None and "StableDiffusion" in export.pipeline)
    licence = licence or (header.origin.licence if header.origin is not None else None)
    run = [_property("run_id", export.run_id)] if export.run_id else []
    return {
        "bom-ref": f"model:{export.weights_sha256}",
        "type": "machine-learning-model",
        "name": name or header.dataset,
        "version": number or export.weights_sha256[:16],
        "hashes": _sha256(export.weights_sha256),
        **_licences(licence),
        "modelCard": {
            "modelParameters": {
                "task": "text-to-image" if is_conditional else "unconditional-image-generation",
                "architectureFamily": header.model.family,
                "modelArchitecture": export.pipeline,
                "inputs": [{"format": "string"}] if is_conditional else [],
                "outputs": [{"format": "image"}],
            }
        },
        "properties": [*run, _property("images_seen", str(header.images))],
    }


def _datasets(header: ModelHeader, data: Manifest | None) -> list[Component]:
    has_digest = bool(DIGEST.fullmatch(header.content_digest))
    description = {} if data is None else {"description": f"{data.kept} images"}
    if data is None:
        properties = [_property("records", "not available here: images, licence and sources are unknown")]
    else:
        properties = [_property("source", source) for source in data.sources]
    return [
        {
            "bom-ref": f"data:{header.content_digest or header.dataset}",
            "type": "data",
            "name": header.dataset,
            **({"hashes": _sha256(header.content_digest)} if has_digest else {}),
            **_licences(data.licence if data is not None else None),
            "data": [{"type": "dataset", "name": header.dataset, **description}],
            **({"properties": properties} if properties else {}),
        }
    ]


def _bases(weights: Path, header: ModelHeader) -> list[Component]:
    """List the models that weights were taken from, the nearest first, and the origin of an imported one."""
    bases, file = list[Component](), weights
    while True:
        origin = header.origin
        if origin is not None:
            bases.append(
                {
                    "bom-ref": f"origin:{origin.source}@{origin.revision or digest_of(origin.files)}",
                    "type": "machine-learning-model",
                    "name": origin.source,
                    **({"version": origin.revision} if origin.revision else {}),
                    **_licences(origin.licence),
                    "properties": [
                        _property(f"sha256:{name}", digest) for name, digest in sorted(origin.files.items())
                    ],
                }
            )
        if header.base is None:
            return bases
        sha256, version = header.base.sha256, header.base.version
        file = find_base(file, header.base)
        header = read_model_header(file)
        bases.append(
            {
                "bom-ref": f"model:{sha256}",
                "type": "machine-learning-model",
                "name": version or f"{sha256}.safetensors",
                "hashes": _sha256(sha256),
                **_licences(header.origin.licence if header.origin is not None else None),
            }
        )


def _performance(metrics: Mapping[str, float]) -> Component:
    rows = []
    for name, value in sorted(metrics.items()):
        if ERROR_OR_BOUND.fullmatch(name) or not math.isfinite(value):
            continue
        prefix, _, suffix = name.partition("_")
        low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
        error = metrics.get(f"{prefix}_se_{suffix}", metrics.get(f"{name}_se"))
        if low is None and high is None and error is not None:
            low, high = value - DEVIATIONS * error, value + DEVIATIONS * error
        row: Component = {"type": name, "value": f"{value:.6g}"}
        if low is not None and high is not None:
            row["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
        rows.append(row)
    return {"quantitativeAnalysis": {"performanceMetrics": rows}} if rows else {}


def _licences(licence: str | None) -> Component:
    if licence is None:
        return {}
    from cyclonedx.spdx import fixup_id

    spdx_id = fixup_id(licence)
    return {"licenses": [{"license": {"id": spdx_id} if spdx_id else {"name": licence}}]}


def _sha256(digest: str) -> list[Component]:
    return [{"alg": "SHA-256", "content": digest}]


def _property(name: str, value: str) -> Component:
    return {"name": f"darkroom:{name}", "value": value}
