"""Export of trained models to diffusers."""

import json
import shutil
from pathlib import Path

from diffusion.checkpoints import (
    AVERAGED,
    CARRIED,
    find_base,
    load_model,
    read_model_header,
    read_pipeline_files,
    read_tensors,
)
from diffusion.common.config import Config
from diffusion.common.errors import UserError, install_hint
from diffusion.common.escaping import escape_markdown, python_literal
from diffusion.common.files import sha256_file, sync_file, sync_folder, write_json
from diffusion.common.model_files import tensor_bytes
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.header import ModelHeader
from diffusion.families.model import Model
from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.network import tensor_names
from diffusion.generation.config import UNCONDITIONAL
from diffusion.generation.generate import check_sampling, check_sampling_options
from diffusion.process.samplers import SamplingConfig

INDEX = "model_index.json"
OWN = "DarkroomPipeline"
LOAD_WITH = f"{OWN}: load it by `from diffusion.diffusers_format import {OWN}`, which Darkroom's package has"
"""Name of the class in the index of a pipeline that diffusers does not have."""
STOCK = dict.fromkeys(("ddpm", "dpmpp_2m", "dpmpp_2m_sde"), "DDPMPipeline") | {"ddim": "DDIMPipeline"}
"""Stock pipeline of each sampler; the schedulers of others need scaled noise, or take no generator, which it gives."""


class ExportResult(Config):
    """Result of an export."""

    folder: Path
    files: dict[str, str]
    """Its files, with the SHA-256 of each."""
    pipeline: str
    """Class of the pipeline in its index."""
    weights_sha256: str
    """SHA-256 of the exported model file."""
    version: str | None = None
    """The registered version, models:/NAME/NUMBER; null: a file that is none."""
    run_id: str | None = None
    """The MLflow run that trained it."""


def export_to_diffusers(
    weights: Path, folder: Path, sampling: SamplingConfig, version: str | None = None, run_id: str | None = None
) -> ExportResult:
    """Write the model in the file ``weights`` to ``folder`` as a pipeline of diffusers: whole, or not at all.

    ``sampling`` is the default sampling options. An imported pipeline is written as the one that came in: its own
    files, and tensors of equal names, types and values but for what was trained. Repeating an export changes nothing.
    Raises UserError if diffusers is not installed, the folder holds something else, or the model or an option has no
    counterpart in diffusers.
    """
    header, digest = read_model_header(weights), sha256_file(weights)
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(header.model, DiffusersConfig):
        return ExportResult(
            pipeline=_write_pipeline(weights, partial),
            files=publish(partial, folder.absolute()),
            folder=folder,
            weights_sha256=digest,
            version=version,
            run_id=run_id,
        )
    model = load_model(weights)
    if not isinstance(model, DDPMModel):
        raise UserError(f"diffusers has no counterpart of a model of the family {model.config.family}: export another")
    for name in ("low_resolution", "autoencoder"):
        if getattr(model.config, name) is not None:
            raise UserError(f"a model with model.{name} has no counterpart in diffusers: export one without it")
    if model.header.student_steps is not None or sampling.sampler == "consistency":
        raise UserError("no scheduler of diffusers samples as students of Darkroom do: export the teacher")
    check_sampling_options(model.config, sampling)
    if not model.config.text:  # a model of captions gets its prompts later
        check_sampling(model, sampling, UNCONDITIONAL)
    try:
        import diffusers

        from diffusion import diffusers_format
        from diffusion.diffusers_format.pipeline import scheduler_of
    except ModuleNotFoundError as error:
        raise UserError(
            f"export to diffusers needs {error.name}, which is not installed: {install_hint('diffusers')}"
        ) from error
    # Stock pipelines neither condition nor guide.
    is_ours = bool(model.classes) or model.config.text or model.header.sampling(sampling).autoguides
    pipeline = OWN if is_ours else STOCK.get(sampling.sampler, OWN)
    result = ExportResult(
        folder=folder, files={}, pipeline=pipeline, weights_sha256=digest, version=version, run_id=run_id
    )
    kind = getattr(diffusers, pipeline, diffusers_format.DarkroomPipeline)
    parts = diffusers_format.DarkroomUNet.from_model(model, sampling), scheduler_of(model, sampling)
    kind(*parts).save_pretrained(partial, safe_serialization=True)
    if pipeline == OWN:
        # DiffusionPipeline.from_pretrained looks for this name in diffusers, and shows it in its error.
        index = json.loads((partial / INDEX).read_text())
        write_json(partial / INDEX, index | {"_class_name": LOAD_WITH})
    (partial / "README.md").write_text(readme(model, sampling, result, folder.name))
    return result.model_copy(update={"files": publish(partial, folder.absolute())})


def _write_pipeline(weights: Path, folder: Path) -> str:
    """Write the imported pipeline in the file ``weights`` to the new ``folder``; returns the class of the pipeline.

    What was trained on top of it is written in the types of its own weights.
    """
    source, header = weights, read_model_header(weights)
    network = load_model(weights).network if header.base is not None else None
    while header.base is not None:
        source = find_base(source, header.base)
        header = read_model_header(source)
    assert isinstance(header.model, DiffusersConfig)
    if header.origin is None or INDEX not in (files := read_pipeline_files(source, header)):
        raise UserError(f"{source} was not imported from diffusers, so no pipeline can be made of it: export its base")
    state = {} if network is None else network.state_dict()
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".safetensors"):
            place.write_bytes(content)
            continue
        component = name.partition("/")[0]
        # Names of components that are not run are those of their file.
        tensors = read_tensors(source, f"{CARRIED}{name}/") or read_tensors(source, f"{AVERAGED}{component}.")
        network_names = {} if network is None else tensor_names(network, [f"{component}.{key}" for key in tensors])
        try:
            entries = {key: entry for key, entry in json.loads(content[8:]).items() if key != "__metadata__"}
            with place.open("wb") as file:
                file.write(content)
                for key in sorted(entries, key=lambda key: entries[key]["data_offsets"]):
                    value = state.get(network_names.get(f"{component}.{key}", ""), tensors[key]).to(tensors[key].dtype)
                    file.write(tensor_bytes(value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source} has lost tensors of {name}: import the pipeline again") from error
        if network is None and sha256_file(place) != header.origin.files[name]:
            raise UserError(f"{source} has other tensors of {name} than were imported: import the pipeline again")
    return header.model.pipeline or ""


def publish(partial: Path, folder: Path) -> dict[str, str]:
    """Rename ``partial`` to ``folder``, or find the same there; returns the SHA-256 of each file.

    Raises UserError if the folder holds something else.
    """
    files = _digests(partial)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        shutil.rmtree(partial)
        if differences := sorted(dict(files.items() ^ _digests(folder).items())):
            raise UserError(f"{folder} is there and differs ({differences[0]}): give another folder, or remove it")
    else:
        for path in (partial, *partial.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                sync_file(path)
        partial.rename(folder)
        sync_folder(folder.parent)
    return files


def _digests(folder: Path) -> dict[str, str]:
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def readme(model: Model, sampling: SamplingConfig, result: ExportResult, place: str) -> str:
    """Write the README of an export at ``place``, a folder or OWNER/NAME on the Hub: usage, origin and limitations."""
    header, (channels, size, _) = model.header, model.shape
    if isinstance(header.model, DiffusersConfig):
        return _readme_of_pipeline(header, result, place)
    assert isinstance(header.model, ModelConfig), "others are not exported"
    conditions = ', prompts=["…"]' if model.config.text else ""
    sampling = header.sampling(sampling, bool(model.classes) or model.config.text)
    if model.classes:
        conditions = f", labels=[{python_literal(model.classes[0])}]"
    stock = ""
    if result.pipeline != OWN:
        stock = f"""
Or with diffusers' {result.pipeline}, which needs the class of the network (that it expected its own is not an error):

```python
import diffusion.diffusers_format.network
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({python_literal(place)})
pipe(batch_size=4, num_inference_steps={sampling.steps}).images
```
"""
    classes = f", of {len(model.classes)} classes" if model.classes else ""
    return f"""# {escape_markdown(header.dataset)}

A diffusion model of {size}×{size} images ({"grey" if channels == 1 else "RGB"}{classes}), made with Darkroom.
With Darkroom's package and its extra `diffusers`, from its repository (PyPI's package `darkroom` is another):

```python
from diffusion.diffusers_format import DarkroomPipeline
pipe = DarkroomPipeline.from_pretrained({python_literal(place)})
pipe(batch_size=4, seed=0{conditions}).images
```
{stock}
| | |
|---|---|
| model | {result.version or "not registered"} |
| MLflow run | {result.run_id or "unknown"} |
| data set | {escape_markdown(header.dataset)}, content {escape_markdown(header.content_digest)} |
| trained on | {header.images:,} images seen |
| weights | SHA-256 of the model file `{result.weights_sha256}` |
| predicts | {header.model.prediction}, on the schedule {header.model.schedule} of {header.model.steps} levels |
| sampled with | {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance_text} |

The weights come under no licence but what the rights in the images of that data set allow. The model reproduces its
training data, at this size, with its gaps and biases, and may come close to single images: mark what it generates as
made by a model.
"""


def _readme_of_pipeline(header: ModelHeader, result: ExportResult, place: str) -> str:
    return describe_pipeline(
        header,
        result,
        place,
        f"A {result.pipeline}",
        f"import diffusers\npipe = diffusers.{result.pipeline}.from_pretrained({python_literal(place)})",
    )


def describe_pipeline(header: ModelHeader, result: ExportResult, place: str, title: str, usage: str) -> str:
    """Write the README of what came of a pipeline; ``usage`` is Python that loads it."""
    origin, is_trained = header.origin, header.images > 0
    source = "unknown"
    if origin is not None:
        source = "@".join(filter(None, (origin.source, origin.revision)))
    elif header.base is not None:
        source = header.base.version or f"the model with SHA-256 {header.base.sha256}"
    rows = {
        "model": result.version or "not registered",
        "MLflow run": result.run_id or "unknown",
        "fine-tuned from" if is_trained else "imported from": escape_markdown(source),
        "weights": f"SHA-256 of the model file `{result.weights_sha256}`",
    }
    if is_trained:
        rows["data set"] = f"{escape_markdown(header.dataset)}, content {escape_markdown(header.content_digest)}"
        rows["trained on"] = f"{header.images:,} images seen"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    history = f"fine-tuned on the data set {escape_markdown(header.dataset)}" if is_trained else "as it was imported"
    return f"""# {escape_markdown(place.rpartition("/")[2])}

{title} of {header.pixels} images, {history} with Darkroom.

```python
{usage}
```

| | |
|---|---|
{table}

Mark what it generates as made by a model.
"""
