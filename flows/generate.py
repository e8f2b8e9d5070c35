"""The flow ``generate``: a registered model and a request in, pictures in a folder of this machine out."""

from pathlib import Path

from prefect import flow

from diffusion.made import Made, make, read_request
from diffusion.requests import Wanted
from flows.params import Params
from flows.progress import reporter
from flows.registry import Version
from flows.sample import fetch
from flows.steps import step


@flow(name="generate", flow_run_name="{wanted.task}-{wanted.count}-by-{model}")
def generate(
    params: Params,
    model: str,
    wanted: Wanted,
    image: Path | None = None,
    mask: Path | None = None,
    output: Path | None = None,
) -> Made:
    """Make the pictures ``wanted``, from an ``image`` if there is one, with the version that ``model`` names now."""
    version, weights = fetch(model)
    return answer(params, version, weights, wanted, image, mask, output)


@step
def answer(
    params: Params,
    version: Version,
    weights: Path,
    wanted: Wanted,
    image: Path | None,
    mask: Path | None,
    output: Path | None,
) -> Made:
    """Draw, and write them down with where they come from."""
    origin = {"model": version.uri, "run_id": version.run_id}
    return make(weights, read_request(wanted, image, mask), params.sampling, output, origin, reporter())
