"""The registered model: what MLflow loads and serves. Logged as code, so nothing is unpickled.

A request is a table with a row per picture and the columns ``seed`` and ``index``: picture number
``index`` of ``seed``, the two numbers that stand in every print's manifest. The answer is a table with a
column ``png``. Equal numbers give equal bits, within the fingerprint of the machine.
"""

import io
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.model import DiffusionModel, load_model
from diffusion.sampling import sample

MOST_PICTURES = 4096


class ServedModel(PythonModel):
    """A diffusion model behind MLflow's pyfunc interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights from their safetensors file."""
        self.model: DiffusionModel = load_model(Path(context.artifacts["weights"]))
        sampling = SamplingConfig.model_validate(context.model_config)
        # A request has no prompt, so that a model of captions alone has nothing to be guided to.
        self.sampling = sampling if self.model.classes else sampling.unguided()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """PNG bytes for each row's ``seed`` and ``index``; ``params`` may set ``steps``.

        Raises UserError for more than MOST_PICTURES rows.
        """
        if len(model_input) > MOST_PICTURES:
            raise UserError(f"{len(model_input)} pictures in one request: ask for at most {MOST_PICTURES}")
        steps = (params or {}).get("steps", 0)
        config = self.sampling.model_copy(update={"steps": steps}) if steps else self.sampling
        # Rows by position: the caller's index may name several of them alike.
        answers: list[bytes] = [b""] * len(model_input)
        numbered = model_input.reset_index(drop=True)
        for seed, rows in numbered.groupby("seed"):
            pictures = sample(self.model, rows["index"].tolist(), int(str(seed)), config)
            for row, picture in zip(rows.index, pictures, strict=True):
                answers[int(row)] = _png(picture.permute(1, 2, 0).squeeze(-1).numpy())
        return pd.DataFrame({"png": answers}, index=model_input.index)


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


set_model(ServedModel())
