"""Adapters as other tools have them: names of layers, and the export.

diffusers has the names of its own layers, and no α: it is part of the tensors. kohya's sd-scripts, and LyCORIS for
LoKr, have names without dots, and α beside the tensors: ComfyUI, AUTOMATIC1111 and Forge read them. diffusers' own
converter to that format writes the rank as α, which changes the images of a model with another one. For layers of a
transformer, ComfyUI knows the names of OneTrainer, ``lora_transformer_…``. peft has a folder for each component, with
its settings.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints import AVERAGED, find_base, read_model_header, read_tensors
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import python_literal
from diffusion.common.files import sha256_file
from diffusion.common.model_files import tensor_bytes
from diffusion.diffusers_format.export import ExportResult, describe_pipeline, publish
from diffusion.families.adapters import AdapterConfig, LoRAConfig
from diffusion.families.adapters.base import AdapterFormat, RankedAdapterConfig
from diffusion.families.fine_tuning import split_parts
from diffusion.families.header import ModelHeader, Origin
from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.pipeline import Pipeline

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
    file_format: AdapterFormat | None = None,
    details: AdapterDetails | None = None,
) -> ExportResult:
    """Write the adapter in the file ``weights`` to ``folder``, whole or not at all; by default in its first format.

    Equal arguments give equal bytes. Raises UserError if the model has no adapter, its pipeline takes none, there is no
    such format of it, or the folder holds something else.
    """
    header, details = read_model_header(weights), details or AdapterDetails()
    if header.adapter is None or header.base is None:
        raise UserError(f"{weights} has no adapter, as it was not trained with training.adapter: use --to diffusers")
    adapter, model = header.adapter, header.model
    if not isinstance(model, DiffusersConfig):
        raise UserError(f"{weights} is not a pipeline of diffusers, and no tool knows its layers: use --to diffusers")
    formats = [name for name in adapter.formats if name == "peft" or model.imported.loads_adapters]
    if adapter.text_encoder and not isinstance(adapter, LoRAConfig):
        # diffusers loads it into denoisers alone.
        formats = [name for name in formats if name != "diffusers"]
    file_format = file_format or formats[0]
    if file_format not in formats:
        raise UserError(
            f"{adapter.kind} adapters of a {model.pipeline} are exported as {' or '.join(formats)}, as others do not "
            f"read them as {file_format}: use --format {formats[0]}, or --to diffusers, which merges it"
        )
    title = details.title or folder.absolute().name
    metadata = _metadata(header, _find_base_origin(weights), details.model_copy(update={"title": title}))
    if file_format == "diffusers" and isinstance(adapter, RankedAdapterConfig):
        metadata["ss_network_alpha"] = str(float(adapter.rank))
    layers = split_parts(adapter, read_tensors(weights, AVERAGED))
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file = DIFFUSERS_FILE
    match file_format:
        case "diffusers":
            write_safetensors(partial / file, diffusers_tensors(adapter, layers), metadata)
        case "kohya":
            file = f"{folder.absolute().name}.safetensors"
            write_safetensors(partial / file, kohya_tensors(model.imported, adapter, layers), metadata)
        case "peft":
            write_peft_folders(partial, adapter, layers, metadata)
    result = ExportResult(
        pipeline=str(model.pipeline),
        files={},
        folder=folder,
        weights_sha256=sha256_file(weights),
        version=version,
        run_id=run_id,
    )
    usage = _usage(file_format, model.imported, adapter, folder.absolute().name, file)
    readme = describe_pipeline(header, result, folder.absolute().name, f"An adapter for a {result.pipeline}", usage)
    (partial / "README.md").write_text(readme)
    return result.model_copy(update={"files": publish(partial, folder.absolute())})


def _usage(file_format: AdapterFormat, pipeline: Pipeline, adapter: AdapterConfig, name: str, file: str) -> str:
    """Write the lines of code that use an export, whose folder is ``name``."""
    rounded = "" if adapter.base_weights is None else f", with weights rounded to {adapter.base_weights}"
    load = f"pipe = diffusers.{type(pipeline).__name__}.from_pretrained(…)  # what it was fine-tuned from{rounded}"
    folder, denoiser = python_literal(name), pipeline.denoiser_name
    if file_format == "peft":
        part = python_literal(f"{name}/{denoiser}")
        return (
            f"import diffusers, peft\n{load}\npipe.{denoiser} = peft.PeftModel.from_pretrained(pipe.{denoiser}, {part})"
        )
    if file_format == "kohya" and (denoiser != "unet" or not isinstance(adapter, LoRAConfig)):
        return f"# Copy {file} to ComfyUI/models/loras"
    weights = f"{folder}, weight_name={python_literal(file)}"
    if isinstance(adapter, LoRAConfig):
        return f"import diffusers\n{load}\npipe.load_lora_weights({weights})"
    return f"import diffusers\n{load}\npipe.{denoiser}.load_lora_adapter({weights}, prefix={python_literal(denoiser)})"


def diffusers_tensors(adapter: AdapterConfig, layers: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name the tensors of ``layers``, by layer and part, as diffusers does; readers take α for the rank."""
    tensors = {}
    for name, parts in layers.items():
        component, _, layer = name.partition(".")
        for part, value in adapter.without_scale(name, parts).items():
            tensors[f"{component}.{with_text_model(layer)}.{part}"] = value
    return tensors


def kohya_tensors(
    pipeline: Pipeline, adapter: AdapterConfig, layers: Mapping[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Name the tensors of ``layers``, by layer and part, as sd-scripts and LyCORIS do, with α for each layer."""
    return {
        f"{kohya_name(pipeline, name)}.{part}": value
        for name, parts in layers.items()
        for part, value in adapter.kohya_parts(name, parts).items()
    }


def write_peft_folders(
    folder: Path, adapter: AdapterConfig, layers: Mapping[str, dict[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write the tensors of ``layers``, by layer and part, and the settings of peft, for each component of the pipeline.

    Names of layers are those of the installed diffusers and transformers, by which ``PeftModel`` finds them.
    """
    config = adapter.peft_config(layers.keys()).to_dict() | {"inference_mode": True}
    for component in sorted({name.partition(".")[0] for name in layers}):
        prefix, escaped = f"{component}.", f"^{re.escape(f'{component}.')}"
        tensors = {
            f"base_model.model.{name.removeprefix(prefix)}.{part}": value
            for name, parts in layers.items()
            if name.startswith(prefix)
            for part, value in parts.items()
        }
        settings = config | {
            "target_modules": sorted(name.removeprefix(prefix) for name in layers if name.startswith(prefix))
        }
        for field in {"rank_pattern", "alpha_pattern"} & config.keys():
            patterns = {key: value for key, value in config[field].items() if key.startswith(escaped)}
            settings[field] = {f"^{key.removeprefix(escaped)}": value for key, value in patterns.items()}
        (folder / component).mkdir()
        write_safetensors(folder / component / "adapter_model.safetensors", tensors, metadata)
        text = json.dumps(settings, indent=2, sort_keys=True, default=_json_value)
        (folder / component / "adapter_config.json").write_text(f"{text}\n")


def _json_value(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value.value


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
    assert header.adapter is not None
    pipeline, (height, width) = header.model.imported, next(iter(header.trained_shapes))
    base = header.base.version or (base_origin.source if base_origin else header.base.sha256[:16])
    licences = [origin.licence for origin in (header.origin, base_origin) if origin is not None and origin.licence]
    history = f"trained by Darkroom on the data set {header.dataset}, {header.images:,} images seen"
    if header.origin is not None:
        history = f"imported by Darkroom from {header.origin.source}"
    if header.adapter.base_weights is not None:
        base += f" with weights rounded to {header.adapter.base_weights}"
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipeline.prediction or "")
    learning_rate = header.training.get("learning_rate")
    values = {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{pipeline.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": details.title,
        "modelspec.description": f"Adapter ({header.adapter.kind}) on {base}, {history}",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.license": details.licence or next(iter(licences), None),
        "modelspec.trigger_phrase": details.trigger,
        "modelspec.usage_hint": details.trigger and f"Trigger word: {details.trigger}",
        "modelspec.prediction_type": prediction,
        **header.adapter.kohya_metadata,
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
