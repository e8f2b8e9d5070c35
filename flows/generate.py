"""The flow ``generate``: a registered model and a request in, images in a folder of this machine out."""

from pathlib import Path
from typing import Any

from prefect import flow

from diffusion.config_sampling import read_request
from diffusion.made import GenerationResult, generate_to_folder
from flows.params import Params
from flows.progress import reporter
from flows.registry import Version
from flows.sample import fetch
from flows.steps import step


@flow(name="generate", flow_run_name="{fields[task]}-by-{model}")
def generate(
    params: Params,
    model: str,
    fields: dict[str, Any],
    image: Path | None = None,
    mask: Path | None = None,
    output: Path | None = None,
) -> GenerationResult:
    """Generate the images of a request with the version that ``model`` names now.

    ``fields`` are those of a ``GenerationRequest``, without the images that stand in the files ``image`` and ``mask``.
    """
    version, weights = fetch(model)
    return answer(params, version, weights, fields, image, mask, output)


@step
def answer(
    params: Params,
    version: Version,
    weights: Path,
    fields: dict[str, Any],
    image: Path | None,
    mask: Path | None,
    output: Path | None,
) -> GenerationResult:
    """Generate, and write the images with where they come from."""
    origin, request = {"model": version.uri, "run_id": version.run_id}, read_request(fields, image, mask)
    return generate_to_folder(weights, request, params.sampling, output, origin, reporter())
