"""Low-rank matrices (LoRA) as other tools have them: names of layers, and the export.

diffusers has the names of its own layers, and no α: it is part of B. kohya's sd-scripts have names without dots, and α
beside the matrices: ComfyUI, AUTOMATIC1111 and Forge read them. diffusers' own converter to that format writes the rank
as α, which changes the images of a model with another one. For layers of a transformer, ComfyUI knows the names of
OneTrainer, ``lora_transformer_…``.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.checkpoints import AVERAGED, find_base, read_model_header, read_tensors
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import python_literal
from diffusion.common.files import sha256_file
from diffusion.common.model_files import tensor_bytes
from diffusion.diffusers_format.export import ExportResult, describe_pipeline, publish
from diffusion.families.fine_tuning import FACTORS
from diffusion.families.header import ModelHeader, Origin
from diffusion.families.pretrained.config import PIPELINES, DiffusersConfig
from diffusion.families.pretrained.pipeline import Pipeline

LoRAFormat = Literal["diffusers", "kohya"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""Name by which ``load_lora_weights`` finds the file in a folder."""
MODELSPEC_VERSION = "1.0.0"
"""Version of Stability AI's ModelSpec, whose keys are ``modelspec.*``."""
SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class AdapterDetails(Config):
    """What the metadata of an exported adapter says for people."""

    title: str | None = None
    """Title; None: the name of the folder."""
    trigger: str | None = None
    """Word of prompts that calls for what was learned; None: none."""
    licence: str | None = None
    """Licence of the adapter; None: that of what it was fine-tuned from, if known."""


def export_adapter(
    weights: Path,
    folder: Path,
    version: str | None = None,
    run_id: str | None = None,
    file_format: LoRAFormat = "diffusers",
    details: AdapterDetails | None = None,
) -> ExportResult:
    """Write the low-rank matrices in the file ``weights`` to ``folder``, whole or not at all.

    Equal arguments give equal bytes. Raises UserError if the model has no matrices, its pipeline takes none, or the
    folder holds something else.
    """
    header, details = read_model_header(weights), details or AdapterDetails()
    if header.lora is None or header.base is None:
        raise UserError(
            f"{weights} has no low-rank matrices, as it was not trained with training.lora: use --to diffusers"
        )
    if not isinstance(header.model, DiffusersConfig) or not header.model.imported.loads_adapters:
        names = [name for name, pipeline in PIPELINES.items() if pipeline.loads_adapters]
        raise UserError(
            f"only the pipelines {', '.join(names)} of diffusers load low-rank matrices: use --to diffusers, "
            "which merges them"
        )
    name, rank, pipeline = folder.absolute().name, header.lora.rank, header.model.imported
    factors, alpha = read_tensors(weights, AVERAGED), header.lora.scale * rank
    if file_format == "kohya":
        file, tensors = f"{name}.safetensors", kohya_tensors(pipeline, factors, alpha)
    else:
        file, tensors, alpha = DIFFUSERS_FILE, diffusers_tensors(factors, header.lora.scale), float(rank)
    metadata = _metadata(
        header, _find_base_origin(weights), details.model_copy(update={"title": details.title or name})
    )
    metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    partial = folder.absolute().with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(partial / file, tensors, metadata)
    result = ExportResult(
        pipeline=str(header.model.pipeline),
        files={},
        folder=folder,
        weights_sha256=sha256_file(weights),
        version=version,
        run_id=run_id,
    )
    usage = f"# Copy {file} to ComfyUI/models/loras"
    if file_format == "diffusers" or pipeline.denoiser_name == "unet":
        usage = (
            f"import diffusers\npipe = diffusers.{result.pipeline}.from_pretrained(…)  # what it was fine-tuned from\n"
            f"pipe.load_lora_weights({python_literal(name)}, weight_name={python_literal(file)})"
        )
    title = f"Low-rank matrices (LoRA) for a {result.pipeline}"
    (partial / "README.md").write_text(describe_pipeline(header, result, name, title, usage))
    return result.model_copy(update={"files": publish(partial, folder.absolute())})


def diffusers_tensors(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Name ``factors``, A and B by ``FACTORS``, as diffusers does; readers take α for the rank, so B is scaled."""
    tensors = {}
    for name, value in factors.items():
        component, _, layer = name.partition(".")
        tensors[f"{component}.{with_text_model(layer)}"] = value * scale if name.endswith(FACTORS[1]) else value
    return tensors


def kohya_tensors(pipeline: Pipeline, factors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Name ``factors``, A and B by ``FACTORS``, as kohya's sd-scripts do, with ``alpha`` for each layer."""
    tensors = {}
    for name, value in factors.items():
        suffix = next(suffix for suffix in FACTORS if name.endswith(suffix))
        layer = kohya_name(pipeline, name.removesuffix(suffix))
        tensors[f"{layer}.{'lora_down' if suffix == FACTORS[0] else 'lora_up'}.weight"] = value
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya_name(pipeline: Pipeline, layer: str) -> str:
    """Return kohya's name of a ``layer``: ``lora_unet_…`` or ``lora_te_…``; of several text encoders ``lora_te1_…``."""
    component, _, name = layer.partition(".")
    prefix = f"lora_{component}"
    if component in pipeline.text_encoders:
        several = len(pipeline.text_encoders) > 1
        prefix = f"lora_te{pipeline.text_encoders.index(component) + 1}" if several else "lora_te"
    return f"{prefix}_{with_text_model(name).replace('.', '_')}"


def with_text_model(name: str) -> str:
    """Return the name of a layer within a component as before transformers 5, which other tools go by.

    There the layers of every text encoder of CLIP are part of a ``text_model``.
    """
    return f"text_model.{name}" if name.startswith("encoder.layers.") else name


def _find_base_origin(weights: Path) -> Origin | None:
    """Return where the pipeline comes from that the model in a file was fine-tuned from, if that is known."""
    header = read_model_header(weights)
    while header.base is not None:
        weights = find_base(weights, header.base)
        if (header := read_model_header(weights)).origin is not None:
            return header.origin
    return None


def _metadata(header: ModelHeader, base_origin: Origin | None, details: AdapterDetails) -> dict[str, str]:
    """Describe an adapter by the keys of sd-scripts and of ModelSpec, without what depends on the tensors."""
    assert isinstance(header.model, DiffusersConfig)
    assert header.base is not None
    pipeline, (height, width) = header.model.imported, next(iter(header.trained_shapes))
    base = header.base.version or (base_origin.source if base_origin else header.base.sha256[:16])
    licences = [origin.licence for origin in (header.origin, base_origin) if origin is not None and origin.licence]
    history = f"trained by Darkroom on the data set {header.dataset}, {header.images:,} images seen"
    if header.origin is not None:
        history = f"imported by Darkroom from {header.origin.source}"
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipeline.prediction or "")
    learning_rate = header.training.get("learning_rate")
    values = {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{pipeline.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": details.title,
        "modelspec.description": f"LoRA on {base}, {history}",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.license": details.licence or next(iter(licences), None),
        "modelspec.trigger_phrase": details.trigger,
        "modelspec.usage_hint": details.trigger and f"Trigger word: {details.trigger}",
        "modelspec.prediction_type": prediction,
        "ss_network_module": "networks.lora",
        "ss_base_model_version": pipeline.kohya_version,
        "ss_v2": str(pipeline.kohya_version == "sd_v2"),
        "ss_sd_model_name": base,
        "ss_new_sd_model_hash": header.base.sha256,
        "ss_output_name": details.title,
        "ss_resolution": f"({width}, {height})",
        "ss_learning_rate": None if learning_rate is None else str(learning_rate),
        "ss_training_comment": details.trigger and f"trigger word: {details.trigger}",
    }
    return {key: value for key, value in values.items() if value is not None}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``, with ``metadata`` and the SHA-256 of the tensors' bytes as ModelSpec and sd-scripts have it.

    The library's own ``save_file`` writes several keys of metadata in an order that differs from call to call.
    """
    # Widest types first, which keeps all aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    position, entries, digest = 0, dict[str, object](), hashlib.sha256()
    for name in names:
        data = tensor_bytes(tensors[name])
        digest.update(data)
        entries[name] = {
            "dtype": SAFETENSORS_TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position := position + len(data)],
        }
    hashes = {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}
    header = json.dumps({"__metadata__": dict(sorted({**metadata, **hashes}.items()))} | entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(tensor_bytes(tensors[name]))
