"""The flow ``export``: a registered model as a folder that other libraries load."""

from pathlib import Path

from prefect import flow

from diffusion.export import Exported, export_to_diffusers
from flows.params import Params
from flows.sample import fetch
from flows.steps import step


@flow(name="export", flow_run_name="export-{model}")
def export(params: Params, model: str, folder: Path) -> Exported:
    """Write the version that ``model`` names now to ``folder`` as a pipeline of diffusers."""
    return write(params, model, folder)


@step
def write(params: Params, model: str, folder: Path) -> Exported:
    """Fetch and write it."""
    version, weights = fetch(model)
    return export_to_diffusers(weights, folder, params.sampling, version.uri, version.run_id)
