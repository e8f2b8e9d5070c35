"""Pyfunc model that MLflow loads and serves, logged as code, so that nothing is unpickled.

A request is a table with a row for each task and the columns of ``diffusion.generation.config``, all optional: a
``prompt`` alone is one image, ``seed`` and ``index`` are the two numbers in the manifest of every sampling batch. What
all rows share may be given as a parameter. Files (``image``, ``mask``) are given in base64. The answer is a table with
a row per image: ``request``, the number of its request's row, ``index``, the image number, and ``png``. Equal requests
give equal bits within the fingerprint of the machine.

However the model is loaded, the work and time of a table are limited (``GenerationLimits``), and tables take turns.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.client import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    REQUEST_LIMIT_EXCEEDED,
)
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.image_grids import png_bytes, to_pil_image
from diffusion.generation.config import FIELDS, MAX_FILE_BYTES, GenerationLimits, GenerationRequest, make_request
from diffusion.generation.limits import Budget, BusyError, RequestQueue, StoppedError
from diffusion.generation.requests import answer
from diffusion.process.samplers import SAMPLING_ADAPTER

MAX_TABLE_IMAGES = 4096
"""Maximum images of a table, and so rows."""
FILES = ("image", "mask")
MAX_CELL_LENGTH = MAX_FILE_BYTES * 4 // 3 + 4
"""Maximum characters of a file in base64."""
RECORD = f"one or more of the fields {', '.join(FIELDS)}"
ERROR_CODES: Mapping[type[DarkroomError], int] = {
    UserError: INVALID_PARAMETER_VALUE,
    BusyError: REQUEST_LIMIT_EXCEEDED,
    StoppedError: DEADLINE_EXCEEDED,
}
"""MLflow's code of each error, which implies the HTTP status: 400, 429 and 504."""


class ServedModel(PythonModel):
    """A trained model behind MLflow's pyfunc interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights from their safetensors file, and those that they are based on from MLflow."""
        weights = Path(context.artifacts["weights"])
        fetch_bases(weights)
        self.model, self.sampling = load_model(weights), SAMPLING_ADAPTER.validate_python(context.model_config)
        self.limits = GenerationLimits.from_environment()
        self.queue = RequestQueue(self.limits.max_waiting_requests)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generate the images of each row, in order; an empty cell has the value of the parameter of its name.

        Raises MlflowException, which HTTP clients receive, for requests that the model does not support, or that take
        more than the limits.
        """
        try:
            # Before the rows are walked, which takes a hundred times the memory of the table.
            if not 0 < len(model_input) <= MAX_TABLE_IMAGES:
                found = f"{len(model_input)} records" if len(model_input) else "no record that asks for anything"
                raise UserError(f"{found} in the table: give 1 to {MAX_TABLE_IMAGES}, each with {RECORD}")
            with self.queue.take_place(), self.queue.wait_for_turn(budget := Budget(self.limits)):
                requests = []
                for number, row in enumerate(model_input.to_dict("records")):
                    budget.check()
                    try:
                        requests.append(_parse_row(row, params or {}))
                    except UserError as error:
                        raise UserError(f"row {number}: {error}") from error
                if (count := sum(request.count for request in requests)) > MAX_TABLE_IMAGES:
                    raise UserError(f"{count} images in one table: ask for at most {MAX_TABLE_IMAGES}")
                answers = answer(self.model, requests, self.sampling, budget=budget)
                rows = [
                    {"request": number, "index": index, "png": png_bytes(to_pil_image(image))}
                    for number, (request, images) in enumerate(zip(requests, answers, strict=True))
                    for index, image in zip(request.indices, images, strict=True)
                ]
        except DarkroomError as error:
            codes = (code for kind, code in ERROR_CODES.items() if isinstance(error, kind))
            raise MlflowException(str(error), next(codes, INTERNAL_ERROR)) from error
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


def _parse_row(row: Mapping[Any, Any], params: Mapping[str, Any]) -> GenerationRequest:
    """Make the request of a row; raises UserError if it has no field: MLflow drops those that it does not know."""
    cells = {str(name): cell for name, value in row.items() if (cell := _parse_cell(str(name), value)) is not None}
    if not cells:
        raise UserError(f"the record asks for nothing: give {RECORD}")
    return make_request({**params, **cells})


def _parse_cell(name: str, value: Any) -> Any:
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    if name in FILES:
        if isinstance(value, str | bytes) and len(value) > MAX_CELL_LENGTH:
            raise UserError(f"{name} has over {MAX_FILE_BYTES} bytes: give a smaller one")
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise UserError(f"{name} is not in base64: encode the bytes of the file so") from error
    return value.item() if isinstance(value, np.generic) else value


set_model(ServedModel())
