"""Import of pipelines that ``save_pretrained`` of diffusers wrote, as one model file.

The folder is not trusted: nothing in it is unpickled or run, and all that is read is within limits. Only pipelines and
components of the table in ``diffusion.families.pretrained.config`` are imported.
"""

import math
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.checkpoints import AVERAGED, CARRIED, FILES, MAX_FILES_BYTES, match_tensors, save_tensors
from diffusion.common.config import MAX_NAME_LENGTH, MAX_SIZE
from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import digest_of, sha256_bytes, sha256_file
from diffusion.common.hub import MAX_CARD, licence_of, read_front_matter
from diffusion.common.model_files import MAX_HEADER_BYTES
from diffusion.common.parsing import parse_json
from diffusion.diffusers_format.safetensors_file import PICKLE_SUFFIXES, TYPES
from diffusion.families.config import DiffusersConfig
from diffusion.families.header import ModelHeader, Origin
from diffusion.families.pretrained.components import FAULTS, SCHEDULERS, Component, load_tokenizer
from diffusion.families.pretrained.config import PIPELINES
from diffusion.families.pretrained.schedule import make_pipeline_schedule

INDEX = "model_index.json"
OWN_NETWORK = "DarkroomUNet"
"""Class of the network in pipelines that Darkroom exports."""
CODE = (".py", ".pyc", ".so")
CARRIED_COMPONENTS = {
    "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
    "feature_extractor": ("transformers", ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}
"""Library and class of components that stay in the file for an export, and are not run."""
MAX_JSON_BYTES = 2**20
"""Largest configuration file, in bytes; those of tokenizers may be as large as all files together."""
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(\.(?P<variant>\w+))?(-\d{5}-of-\d{5})?"
    r"\.safetensors(\.index(\.(?P<other>\w+))?\.json)?"
)
"""Names of weights, in parts or not, and of the index of their parts; a variant is ``fp16``, say."""


def import_pipeline(folder: Path, path: Path, origin: Origin) -> str:
    """Write the pipeline of diffusers in ``folder`` as the model file ``path``, whole or not at all.

    Weights keep their types and names. Components that are not run, such as a safety checker, are carried along for an
    export. The licence is that of ``origin``, or of the front matter of README.md. Where there are weights of several
    variants, those without one are taken.

    Args:
        folder: The folder, with a model_index.json.
        path: Where the file is written.
        origin: Source, revision and licence; files and libraries are filled in.

    Returns:
        The SHA-256 of the file.

    Raises:
        UserError: The folder holds a pickle, code, a link that leads out of it, a pipeline or component that is not on
            the allow-list, tensors that its configurations do not describe, or names no licence.
    """
    files = dict(_files(folder))
    index = _read_json(folder, INDEX, files)
    components = dict(_components(folder, index, files))
    card = files["README.md"].read_bytes()[:MAX_CARD] if "README.md" in files else b""
    licence = origin.licence or licence_of(read_front_matter(card.decode(errors="replace")))
    if licence is None:
        raise UserError(
            f"{folder} names no licence: find out under which it was published, and give it with --licence, or as "
            "`license: …` in the front matter of its README.md"
        )
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    used_files: set[str] = set()
    for name in components | dict.fromkeys(CARRIED_COMPONENTS):
        weight_files = _weight_files(folder, name, files)
        used_files |= set(weight_files)
        for file in (weight_file for weight_file in weight_files if weight_file.endswith(".safetensors")):
            head, weights = _read_weights(files[file])
            prefix = f"{AVERAGED}{name}." if name in components else f"{CARRIED}{file}/"
            if duplicates := [key for key in weights if prefix + key in tensors]:
                raise UserError(f"{folder} holds {duplicates[0]} of {name} twice: keep one of the files")
            tensors |= {prefix + key: value for key, value in weights.items()}
            tensors[FILES + file] = _bytes(head)
            digests[file] = sha256_file(files[file])
    for file, place in files.items():
        match = WEIGHTS.fullmatch(place.name)
        is_other_variant = match and (match["variant"] or match["other"]) and file not in used_files
        if file.endswith(".safetensors"):
            if file not in used_files and not is_other_variant:
                raise UserError(f"{folder / file} is part of none of its components: remove it")
        elif not is_other_variant:
            content = place.read_bytes()
            tensors[FILES + file], digests[file] = _bytes(content), sha256_bytes(content)
    header = _header(folder, index, components, origin, licence, digests)
    for name in components:
        if name.startswith("tokenizer"):
            _check_tokenizer(folder / name, components[name].kind)
    if match_tensors(header, {name: list(value.shape) for name, value in tensors.items()}) is None:
        raise UserError(f"the tensors in {folder} are not those that its configurations describe: save it again")
    return save_tensors(path, tensors, {"model_header": header.model_dump(mode="json")})


def read_pipeline_class(folder: Path) -> str:
    """Return the class of the pipeline in ``folder``; raises UserError as ``import_pipeline`` does, but for weights."""
    files = dict(_files(folder))
    index = _read_json(folder, INDEX, files)
    for _ in _components(folder, index, files):
        pass  # each is checked
    return str(index["_class_name"])


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """List the files of a pipeline by their paths in it; raises UserError for what may not be in it."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is not a pipeline of diffusers (no {INDEX}): give a folder of save_pretrained")
    root, total = folder.resolve(), 0
    for place in sorted(folder.rglob("*")):
        name = place.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in PurePosixPath(name).parts):  # caches, which are not read
            continue
        if not place.resolve().is_relative_to(root):
            raise UserError(f"{place} is a link that leads out of the pipeline: put the file in its place")
        if not place.is_file():
            continue
        if place.suffix in CODE:
            raise UserError(
                f"{place} is code, and none is run from a pipeline: delete it if the pipeline needs only classes of "
                "diffusers' own"
            )
        if place.suffix in PICKLE_SUFFIXES:
            raise UserError(
                f"{place} is a pickle, which can run code: delete it if safetensors beside it have its "
                "weights, else save the pipeline with safe_serialization=True"
            )
        if place.suffix != ".safetensors":
            total += place.stat().st_size
            if total > MAX_FILES_BYTES:
                raise UserError(
                    f"{folder} has over {MAX_FILES_BYTES} bytes besides weights ({name}): remove what does not belong"
                )
        yield name, place


def _read_json(folder: Path, name: str, files: dict[str, Path]) -> dict[str, Any]:
    if name not in files:
        raise UserError(f"{folder / name} is not there: save the pipeline again")
    if files[name].stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{folder / name} has over {MAX_JSON_BYTES} bytes, which no configuration has: save it again")
    try:
        value = parse_json(files[name].read_bytes())
    except ValueError as error:
        raise UserError(f"{folder / name} is no JSON: save the pipeline again") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder / name} is no JSON object: save the pipeline again")
    for key in ("auto_map", "trust_remote_code", "custom_pipelines"):
        if value.get(key):
            raise UserError(f"{folder / name} asks for remote code ({key}), and none is run from a pipeline")
    return value


def _components(folder: Path, index: dict[str, Any], files: dict[str, Path]) -> Iterator[tuple[str, Component]]:
    """Read the class and configuration of each component that is run."""
    if any(isinstance(value, list) and OWN_NETWORK in value for value in index.values()):
        raise UserError(
            f"{folder} was exported by `darkroom model export`: use the .safetensors that it was exported from, or "
            "import that"
        )
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        shown_name = str(pipeline)[:MAX_NAME_LENGTH]
        raise UserError(f"{folder} is a {shown_name}, which is not supported: one of {', '.join(PIPELINES)} is")
    spec = PIPELINES[pipeline]
    components = {**spec.kinds, "scheduler": SCHEDULERS}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if value in ([None, None], []):
            continue
        library, kind = (str(word)[:MAX_NAME_LENGTH] for word in value) if len(value) == 2 else ("", "")
        kind = spec.renamed.get(kind, kind)
        if name in CARRIED_COMPONENTS:
            carried_library, kinds = CARRIED_COMPONENTS[name]
            if library != carried_library or kind not in ([kinds] if isinstance(kinds, str) else kinds):
                raise UserError(f"{name} of {folder} is a {library}.{kind}, which is not on the allow-list")
            continue
        package = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
        if library != package or kind not in components.get(name, ()):
            raise UserError(
                f"{name} of {folder} is a {library}.{kind}, which is not on the allow-list: in a {pipeline} "
                + (f"it is {' or '.join(components[name])} of {package}" if name in components else "there is none")
            )
        if name.startswith("tokenizer"):
            if f"{name}/tokenizer_config.json" in files:
                _read_json(folder, f"{name}/tokenizer_config.json", files)
            yield name, Component(kind=kind)
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        config = _read_json(folder, f"{name}/{file}", files)
        own_kind = config.get("_class_name", kind)
        architectures = config.get("architectures") or [kind]
        # A language model may be saved with its head and named without, as that of Z-Image is.
        if spec.renamed.get(own_kind, own_kind) != kind or not {*architectures} & {*components[name]}:
            raise UserError(f"{folder / name / file} is of another class than {kind}, which {INDEX} names")
        # Defaults of some schedulers are infinite, which JSON has no number for.
        settings = {key: setting for key, setting in config.items() if not key.startswith("_") and setting != -math.inf}
        try:
            yield name, Component(kind=kind, config=settings)
        except ValidationError as error:
            raise UserError(f"{folder / name / file} {_first(error)}: no such network is built") from error


def _weight_files(folder: Path, name: str, files: dict[str, Path]) -> list[str]:
    """List the files of the weights of the component ``name``, and their index if there is one.

    They are those without a variant, or else those of the only one.
    """
    groups: dict[str | None, list[str]] = {}
    for file in files:
        parent, _, base = file.rpartition("/")
        if parent == name and (match := WEIGHTS.fullmatch(base)):
            groups.setdefault(match["variant"] or match["other"], []).append(file)
    if not groups:
        return []
    if None not in groups and len(groups) > 1:
        raise UserError(f"{folder / name} has weights of the variants {', '.join(map(str, groups))}: keep one of them")
    weight_files = groups.get(None) or next(iter(groups.values()))
    indices = [file for file in weight_files if file.endswith(".json")]
    tensor_files = [file for file in weight_files if not file.endswith(".json")]
    if tensor_files and not indices:
        return tensor_files
    shards = _read_json(folder, indices[0], files).get("weight_map")
    shard_files = sorted({f"{name}/{shard}" for shard in shards.values()}) if isinstance(shards, dict) else []
    for file in shard_files:
        if file not in files or not file.endswith(".safetensors"):
            raise UserError(f"{folder / indices[0]} names {file!r}, which is not a safetensors file of {name}")
    return [indices[0], *shard_files]


def _read_weights(place: Path) -> tuple[bytes, dict[str, Tensor]]:
    """Read the head of a safetensors file and its tensors by name, which stay on disk until they are used."""
    try:
        with place.open("rb") as raw:
            start = raw.read(8)
            if (size := int.from_bytes(start, "little")) > MAX_HEADER_BYTES:
                raise UserError(f"{place} is not a safetensors file: save the pipeline with safe_serialization=True")
            head = start + raw.read(size)
        with safe_open(place, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"{place} is damaged, or not a safetensors file ({error}): save or fetch it again") from error
    for name, value in tensors.items():
        if value.dtype not in TYPES:
            raise UserError(f"{name} in {place} is of the type {value.dtype}, and quantized weights are not supported")
    return head, tensors


def _header(
    folder: Path,
    index: dict[str, Any],
    components: dict[str, Component],
    origin: Origin,
    licence: str,
    digests: dict[str, str],
) -> ModelHeader:
    try:
        libraries = {name: version(name) for name in ("diffusers", "safetensors", "torch", "transformers")}
    except PackageNotFoundError as error:
        raise UserError(
            f"the import of a pipeline needs {error.name}, which is not installed: {install_hint('diffusers')}"
        ) from error
    full_origin = origin.model_copy(update={"licence": licence, "files": digests, "libraries": libraries})
    name = re.sub(r"[/\\:'\"`\s]+", "-", origin.source.removeprefix("hf://").partition("@")[0]).strip(".-")
    defaults = PIPELINES[index["_class_name"]].default_settings
    settings = {key: value for key, default in defaults.items() if (value := index.get(key)) not in (None, default)}
    try:
        config = DiffusersConfig(pipeline=index["_class_name"], components=components, settings=settings)
        classes = _classes(config, index.get("id2label"))
        config = config.model_copy(update={"class_ids": tuple(classes[label] for label in sorted(classes))})
        (channels, size, _), pipeline = config.image_shape, config.imported
        make_pipeline_schedule(pipeline)
        pipeline.check_scheduler()
        if not 1 <= size <= MAX_SIZE:
            raise UserError(f"{folder} makes images of {size} pixels, and {MAX_SIZE} are the most")
        return ModelHeader.model_validate(
            {
                "model": config,
                "channels": channels,
                "size": size,
                "dataset": name[:MAX_NAME_LENGTH] or "pipeline",
                # Of what it was trained on nothing is known but what came of it.
                "content_digest": digest_of(digests),
                "sigma_data": 0.5 if pipeline.autoencoder is None else 1.0,
                "class_histogram": dict.fromkeys(sorted(classes), 1),
                "images": 0,
                "training": {},
                "guidance": pipeline.guidance,
                "origin": full_origin,
            }
        )
    except ValidationError as error:
        raise UserError(f"{folder} cannot be imported: {_first(error)}") from error


def _classes(config: DiffusersConfig, labels: Any) -> dict[str, int]:
    """Name the network's classes: by ``id2label`` of the index, with its number where a name is not the only one."""
    count = config.imported.network_classes or 0
    if not isinstance(labels, dict) or not labels:
        return {str(number).zfill(len(str(count - 1))): number for number in range(count)}
    numbers = [(int(key), str(label)) for key, label in labels.items() if re.fullmatch("[0-9]{1,9}", key) and label]
    names = [label for _, label in numbers]
    by_label = {label if names.count(label) == 1 else f"{label} ({number})": number for number, label in numbers}
    return {label: number for label, number in by_label.items() if number < count}


def _check_tokenizer(folder: Path, kind: str) -> None:
    """Raise UserError unless the tokenizer in ``folder`` tells texts apart, which it does not without a vocabulary."""
    try:
        tokenizer = load_tokenizer(kind, folder)
        one, other = (tokenizer(text).input_ids for text in ("cat", "dog"))
    except (*FAULTS, OSError) as error:
        words = str(error).partition("\n")[0]
        raise UserError(f"{folder} is not a {kind} ({words}): save the pipeline again") from error
    if one == other:
        raise UserError(f"{folder} has no vocabulary for a {kind}: save or fetch the pipeline again")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return first["msg"].removeprefix("Value error, ") + ("" if first["type"] == "value_error" else f" ({first['loc']})")


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
