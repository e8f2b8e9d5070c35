"""Pyfunc model that MLflow loads and serves, logged as code, so that nothing is unpickled.

A request is a table with a row for each task and the columns of ``diffusion.generation.config``, all optional: a
``prompt`` alone is one image, ``seed`` and ``index`` are the two numbers in the manifest of every sampling batch. What
all rows share may be given as a parameter. Files (``image``, ``mask``) are given in base64. The answer is a table with
a row per image: ``request``, the number of its request's row, ``index``, the image number, and ``png``. Equal requests
give equal bits within the fingerprint of the machine.
"""

import base64
import binascii
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.client import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes, to_pil_image
from diffusion.families.model import Model
from diffusion.generation.config import make_request
from diffusion.generation.requests import answer
from diffusion.process.samplers import SAMPLING_ADAPTER

MOST_IMAGES = 4096
FILES = ("image", "mask")


class ServedModel(PythonModel):
    """A trained model behind MLflow's pyfunc interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights from their safetensors file, and those that they are based on from MLflow."""
        weights = Path(context.artifacts["weights"])
        fetch_bases(weights)
        self.model: Model = load_model(weights)
        self.sampling = SAMPLING_ADAPTER.validate_python(context.model_config)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generate the images of each row, in order; an empty cell has the value of the parameter of its name.

        Raises MlflowException, which HTTP clients receive, for requests that the model does not support and for more
        than MOST_IMAGES images.
        """
        requests = []
        try:
            for number, row in enumerate(model_input.to_dict("records")):
                try:
                    fields = {str(name): _parse_cell(str(name), value) for name, value in row.items()}
                    cells = {name: value for name, value in fields.items() if value is not None}
                    requests.append(make_request({**(params or {}), **cells}))
                except UserError as error:
                    raise UserError(f"row {number}: {error}") from error
            if (count := sum(request.count for request in requests)) > MOST_IMAGES:
                raise UserError(f"{count} images in one table: ask for at most {MOST_IMAGES}")
            answers = answer(self.model, requests, self.sampling)
            rows = [
                {"request": number, "index": index, "png": png_bytes(to_pil_image(image))}
                for number, (request, images) in enumerate(zip(requests, answers, strict=True))
                for index, image in zip(request.indices, images, strict=True)
            ]
        except UserError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame(rows, columns=["request", "index", "png"])


def fetch_bases(weights: Path) -> None:
    """Fetch the models that the one in a file is based on beside it; ``load_model`` verifies them, or misses them.

    They are not among the version's own files, since a base of gigabytes is stored once for all that are based on it.
    """
    path = weights
    while (base := read_model_header(path).base) is not None:
        path = weights.with_name(f"{base.sha256}.safetensors")
        if path.is_file():
            continue
        client = MlflowClient()  # not before: a model without bases is loaded without a server
        experiments = [entry.experiment_id for entry in client.search_experiments()]
        query = f"tags.`darkroom.weights_sha256` = '{base.sha256}'"
        models = [entry for entry in client.search_logged_models(experiments, query) if entry.status == "READY"]
        if not models:
            return
        with TemporaryDirectory(dir=weights.parent) as scratch:
            uri = f"{models[0].artifact_location}/artifacts/weights.safetensors"
            Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).replace(path)


def _parse_cell(name: str, value: Any) -> Any:
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    if name in FILES:
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise UserError(f"{name} is not in base64: encode the bytes of the file so") from error
    return value.item() if isinstance(value, np.generic) else value


set_model(ServedModel())
