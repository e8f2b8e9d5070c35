"""Import of low-rank matrices (LoRA) that other tools trained, in the formats of diffusers, peft and kohya.

DoRA is imported in the formats of diffusers and peft: by kohya's names tools divide by different norms.

Every layer of the base is looked up under all names that these tools have for it, and what remains is an error: nothing
in a file is passed over. The file is not trusted: it is never unpickled, and all that is read is within limits.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion.checkpoints import AVERAGED, link_base, read_model_header, save_tensors, verify_weights
from diffusion.common.config import MAX_NAME_LENGTH
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.parsing import parse_json
from diffusion.diffusers_format.adapter import with_text_model
from diffusion.diffusers_format.safetensors_file import SafetensorsFile
from diffusion.families.adapters.lora import DOWN, MAGNITUDE, UP, DoRAConfig, LoRAConfig
from diffusion.families.fine_tuning import is_adaptable
from diffusion.families.header import Base, ModelHeader, Origin
from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.network import PipelineNetwork

ROLES = (
    ("A", re.compile(r"(\.lora_A(\.default)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight")),
    ("B", re.compile(r"(\.lora_B(\.default)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight")),
    ("alpha", re.compile(r"\.alpha")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?")),
)
"""Ends of the names of A, B, α and magnitudes (DoRA) in the formats of peft, kohya and three versions of diffusers."""
OTHER_KINDS = {
    "dora_scale": "DoRA by kohya's names, which tools read differently",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with Tucker decomposition",
    "bundle_emb": "embeddings",
}
"""Adapters that are no two matrices, by parts of the names of their tensors."""
PEFT_METADATA = "lora_adapter_metadata"
"""Key of the metadata in which diffusers keeps peft's settings, and so α, by component."""
MAX_SHOWN = 3
"""Names of tensors that an error shows."""


@dataclass
class _Layer:
    """What a file has of one layer."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def import_lora(file: SafetensorsFile, base: Path, path: Path, licence: str, version: str | None = None) -> None:
    """Write the low-rank matrices in ``file`` as the model file ``path``, based on the imported pipeline ``base``.

    α and ranks stay as they are if all layers have the same; otherwise the scale becomes part of B, and missing rows
    are zeros, which changes nothing but the numbers. The base is linked beside ``path``; ``version`` is its registered
    version.

    Raises UserError if the base is not an imported pipeline, and for matrices that are not of its layers, do not fit
    them, are incomplete or not finite.
    """
    header = read_model_header(base)
    if not isinstance(header.model, DiffusersConfig):
        raise UserError(
            f"--base {base} is a model of the family {header.model.family}: give one that was imported from diffusers"
        )
    shapes = _adaptable_layers(header)
    layers = _match(file, shapes, _layer_names(header))
    peft_alphas = dict(_peft_alphas(file, layers))
    ranks, scales = {}, {}
    for name, layer in layers.items():
        layer.factors = _fitted(file, name, layer, shapes[name])
        ranks[name] = len(layer.factors["A"])
        alpha = layer.alpha if layer.alpha is not None else peft_alphas.get(name)
        if alpha is not None and not math.isfinite(alpha):
            raise UserError(f"{file.path} has an α that is not finite for {name}: fetch it again, or use another")
        # As kohya has it, an α of zero is none.
        scales[name] = alpha / ranks[name] if alpha else 1.0
    if len({"magnitude" in layer.factors for layer in layers.values()}) > 1:
        raise UserError(f"{file.path} is DoRA in some of its layers alone, which is not supported: use another file")
    try:
        lora, factors = _unify(layers, ranks, scales)
    except ValidationError as error:
        raise UserError(
            f"{file.path} has rank {max(ranks.values())}, which is not supported: use another file"
        ) from error
    digest = sha256_file(file.path)
    name = re.sub(r"[/\\:'\"`\s]+", "-", file.path.stem).strip(".-")[:MAX_NAME_LENGTH] or "adapter"
    # Before anything is written, as the base may have gigabytes to link.
    verify_weights(base)
    adapted_header = header.model_copy(
        update={
            "base": Base(sha256=link_base(base, path.parent), version=version),
            "adapter": lora,
            "dataset": name,
            "content_digest": digest,
            "images": 0,
            "training": {},
            "origin": Origin(source=file.path.name, licence=licence, files={file.path.name: digest}),
        }
    )
    save_tensors(path, factors, {"model_header": adapted_header.model_dump(mode="json")})


def _adaptable_layers(header: ModelHeader) -> dict[str, torch.Size]:
    """Return the shapes of the weights that low-rank matrices can change, by the names of their layers."""
    assert isinstance(header.model, DiffusersConfig)
    with torch.device("meta"):
        network = PipelineNetwork(header.model)
    parts = (header.model.imported.denoiser_name, *header.model.imported.text_encoders)
    return {
        name: module.weight.shape
        for name, module in network.named_modules()
        if is_adaptable(module, LoRAConfig()) and name.startswith(tuple(f"{part}." for part in parts))
    }


def _layer_names(header: ModelHeader) -> dict[str, list[str]]:
    """Return what stands before the name of a layer, by component, with underscores in the place of dots."""
    assert isinstance(header.model, DiffusersConfig)
    pipeline = header.model.imported
    denoiser = pipeline.denoiser_name
    prefixes = {denoiser: [f"{denoiser}_", f"lora_{denoiser}_", "lora_unet_", "diffusion_model_", ""]}
    for number, encoder in enumerate(pipeline.text_encoders, start=1):
        prefixes[encoder] = [f"{encoder}_", f"lora_te{number}_", *(["lora_te_"] if number == 1 else [])]
    return prefixes


def _match(
    file: SafetensorsFile, shapes: Mapping[str, torch.Size], prefixes: Mapping[str, list[str]]
) -> dict[str, _Layer]:
    """Find the layer of each tensor of ``file``; raises UserError for tensors of none, and for a layer twice."""
    names: dict[str, str] = {}
    for layer_name in shapes:
        component, _, name = layer_name.partition(".")
        # Older files call the last layer of attention to_out.
        old_name = name.removesuffix(".0") if name.endswith(".to_out.0") else name
        for variant in {name, old_name, with_text_model(name), name.removeprefix("text_model.")}:
            for prefix in prefixes[component]:
                names.setdefault(prefix + variant.replace(".", "_"), layer_name)
    layers: dict[str, _Layer] = {}
    unknown: list[str] = []
    for key in file.names:
        place = _parse(key)
        if place is None or place[0] not in names:
            unknown.append(key)
            continue
        layer_name, role = names[place[0]], place[1]
        layer = layers.setdefault(layer_name, _Layer())
        if role in layer.factors or (role == "alpha" and layer.alpha is not None):
            raise UserError(f"{file.path} has {role} of {layer_name} twice, in {key}, too: keep one of them")
        value = file.read(key)
        if role != "alpha":
            layer.factors[role] = value
        elif value.numel() != 1:
            raise UserError(f"{key} in {file.path} is {tuple(value.shape)}, and α is one number: use another file")
        else:
            layer.alpha = float(value)
    if unknown:
        kind = next((kind for key in unknown for part, kind in OTHER_KINDS.items() if part in key), None)
        more = f" and {len(unknown) - MAX_SHOWN:,} more" if len(unknown) > MAX_SHOWN else ""
        raise UserError(
            f"{file.path} has {', '.join(unknown[:MAX_SHOWN])}{more}, "
            + (
                f"which is {kind}: only LoRA, two matrices for a layer, and DoRA of peft are supported"
                if kind
                else "which match no layer of the base: give the pipeline that it was trained on as --base"
            )
        )
    if not layers:
        raise UserError(f"{file.path} holds no tensors: use another file")
    return layers


def _parse(key: str) -> tuple[str, str] | None:
    """Split the name of a tensor into that of its layer, with underscores, and its role; None: it is neither."""
    for role, pattern in ROLES:
        if (match := re.search(f"{pattern.pattern}$", key)) is not None:
            layer = key[: match.start()].removeprefix("base_model.model.").replace(".processor.", ".")
            return layer.replace(".", "_"), role
    return None


def _peft_alphas(file: SafetensorsFile, layers: Mapping[str, _Layer]) -> Iterator[tuple[str, float]]:
    """Yield α of the layers by peft's settings in the metadata, as diffusers writes them; raises UserError for others.

    With rsLoRA the scale is α/√r (arXiv 2312.03732).
    """
    if (text := file.metadata.get(PEFT_METADATA)) is None:
        return
    try:
        settings: dict[str, Any] = parse_json(text)
        for name, layer in layers.items():
            component, _, inner = name.partition(".")
            own = {
                key.removeprefix(f"{component}."): value
                for key, value in settings.items()
                if key.startswith(f"{component}.")
            }
            if own.get("use_dora") and "magnitude" not in layer.factors:
                raise UserError(f"{file.path} is DoRA by its metadata and has no magnitudes for {name}: save it again")
            patterns = own.get("alpha_pattern") or {}
            alpha = next(
                (value for end, value in patterns.items() if f".{inner}".endswith(f".{end}")), own.get("lora_alpha")
            )
            if alpha is not None and "A" in layer.factors:
                yield name, float(alpha) * (len(layer.factors["A"]) ** 0.5 if own.get("use_rslora") else 1.0)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{PEFT_METADATA} in {file.path} cannot be read ({error}): use another file") from error


def _fitted(file: SafetensorsFile, name: str, layer: _Layer, shape: torch.Size) -> dict[str, Tensor]:
    """Return A, B and any magnitudes of a layer with a weight of ``shape``, in float32; UserError unless they fit."""
    if {*layer.factors} - {"magnitude"} != {"A", "B"}:
        raise UserError(f"{file.path} has one of two matrices for {name}: fetch or save it again")
    a, b = layer.factors["A"], layer.factors["B"]
    rank, kernel = len(a) if a.ndim else 0, (1,) * (len(shape) - 2)
    expected = (rank, *shape[1:]), (shape[0], rank, *kernel)
    # Convolutions of one pixel are saved as linear layers, too, and the other way round.
    fits = all(
        part.numel() == torch.Size(size).numel() and part.shape[:2] == size[:2]
        for part, size in zip((a, b), expected, strict=True)
    )
    if not fits or rank < 1:
        raise UserError(
            f"{file.path} has matrices of {tuple(a.shape)} and {tuple(b.shape)} for {name}, whose weight is "
            f"{tuple(shape)}: give the pipeline that it was trained on as --base"
        )
    fitted = {"A": a.float().reshape(expected[0]), "B": b.float().reshape(expected[1])}
    if (magnitude := layer.factors.get("magnitude")) is not None:
        if magnitude.numel() != shape[0]:
            raise UserError(
                f"{file.path} has magnitudes of {tuple(magnitude.shape)} for {name}, whose weight is {tuple(shape)}: "
                "give the pipeline that it was trained on as --base"
            )
        fitted["magnitude"] = magnitude.float().reshape((1, shape[0], *kernel) if kernel else (shape[0],))
    for part in fitted.values():
        if not part.isfinite().all():
            raise UserError(f"{file.path} has numbers that are not finite for {name}: fetch it again, or use another")
    return fitted


def _unify(
    layers: Mapping[str, _Layer], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Bring all layers to one rank and one α; returns these, and the tensors of the model file."""
    rank, scale = max(ranks.values()), next(iter(scales.values()))
    text_encoder = any(name.startswith("text_encoder") for name in layers)
    is_uniform = len({*ranks.values()}) == len({*scales.values()}) == 1 and 0 < scale * rank <= 65536
    is_dora = all("magnitude" in layer.factors for layer in layers.values())
    kind = DoRAConfig if is_dora else LoRAConfig
    lora = kind(rank=rank, alpha=scale * rank if is_uniform else None, text_encoder=text_encoder)
    factors: dict[str, Tensor] = {}
    for name, layer in sorted(layers.items()):
        a, b = layer.factors["A"], layer.factors["B"]
        if not is_uniform:
            b = b * scales[name]
            missing = rank - ranks[name]
            a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
            b = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], dim=1)
        factors |= {f"{AVERAGED}{name}.{DOWN}": a, f"{AVERAGED}{name}.{UP}": b}
        if is_dora:
            factors[f"{AVERAGED}{name}.{MAGNITUDE}"] = layer.factors["magnitude"]
    return lora, factors
