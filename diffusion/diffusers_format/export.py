"""Export of trained models to diffusers."""

import shutil
from pathlib import Path

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown, python_literal
from diffusion.common.files import sha256_file, sync_file, sync_folder
from diffusion.families.ddpm import DiffusionModel
from diffusion.generation.config import UNCONDITIONAL
from diffusion.generation.generate import check_sampling, check_sampling_options
from diffusion.process.samplers import SamplingConfig

STOCK = dict.fromkeys(("ddpm", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc"), "DDPMPipeline") | {"ddim": "DDIMPipeline"}
"""Stock pipeline of each sampler; the schedulers of other samplers need scaled noise."""


class Exported(Config):
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
) -> Exported:
    """Write the model in the file ``weights`` to ``folder`` as a pipeline of diffusers: whole, or not at all.

    ``sampling`` is the default sampling options. Repeating an export changes nothing. Raises UserError if diffusers is
    not installed, the folder holds something else, or the model or an option has no counterpart in diffusers.
    """
    model = load_model(weights)
    if not isinstance(model, DiffusionModel):
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
            f"export to diffusers needs {error.name}, which is not installed: run `pip install -e '.[diffusers]'` in "
            "Darkroom's checkout"
        ) from error
    conditional = bool(model.classes) or model.config.text
    pipeline = "DarkroomPipeline" if conditional else STOCK.get(sampling.sampler, "DarkroomPipeline")
    digest = sha256_file(weights)
    exported = Exported(
        folder=folder, files={}, pipeline=pipeline, weights_sha256=digest, version=version, run_id=run_id
    )
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    kind = getattr(diffusers, pipeline, diffusers_format.DarkroomPipeline)
    parts = diffusers_format.DarkroomUNet.of(model, sampling), scheduler_of(model, sampling)
    kind(*parts).save_pretrained(partial, safe_serialization=True)
    (partial / "README.md").write_text(readme(model, sampling, exported))
    files = _digests(partial)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        shutil.rmtree(partial)
        if different := sorted(dict(files.items() ^ _digests(folder).items())):
            raise UserError(f"{folder} is there and differs ({different[0]}): give another folder, or remove it")
    else:
        for path in (partial, *partial.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                sync_file(path)
        partial.rename(folder)
        sync_folder(folder.parent)
    return exported.model_copy(update={"files": files})


def _digests(folder: Path) -> dict[str, str]:
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def readme(model: DiffusionModel, sampling: SamplingConfig, about: Exported) -> str:
    """Write the README of an export: usage, origin and limitations."""
    header, (channels, size, _) = model.header, model.shape
    conditions = ', prompts=["…"]' if model.config.text else ""
    sampling = header.sampling(sampling, bool(model.classes) or model.config.text)
    if model.classes:
        conditions = f", labels=[{python_literal(model.classes[0])}]"
    stock = ""
    if about.pipeline != "DarkroomPipeline":
        stock = f"""
Or with a pipeline of diffusers' own, once the class of the network is known (that it expected its own is no error):

```python
import diffusion.diffusers_format, diffusers
pipe = diffusers.{about.pipeline}.from_pretrained({python_literal(about.folder.name)})
pipe(batch_size=4, num_inference_steps={sampling.steps}).images
```
"""
    classes = f", of {len(model.classes)} classes" if model.classes else ""
    return f"""# {escape_markdown(header.dataset)}

A diffusion model of {size}×{size} images ({"grey" if channels == 1 else "RGB"}{classes}), made with Darkroom.
With Darkroom's package and its extra `diffusers`, from its repository (PyPI's package `darkroom` is another):

```python
from diffusion.diffusers_format import DarkroomPipeline
pipe = DarkroomPipeline.from_pretrained({python_literal(about.folder.name)})
pipe(batch_size=4, seed=0{conditions}).images
```
{stock}
| | |
|---|---|
| model | {about.version or "not registered"} |
| MLflow run | {about.run_id or "unknown"} |
| data set | {escape_markdown(header.dataset)}, content {escape_markdown(header.content_digest)} |
| trained on | {header.images:,} images seen |
| weights | SHA-256 of the model file `{about.weights_sha256}` |
| predicts | {model.config.prediction}, on the schedule {model.config.schedule} of {model.config.steps} levels |
| sampled with | {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance_text} |

The weights come under no licence but what the rights in the images of that data set allow. The model reproduces its
training data, at this size, with its gaps and biases, and may come close to single images: mark what it generates as
made by a model.
"""
