"""Script that generates a batch's images again with the first ``diffusion`` on its path, the model version's.

It reads a JSON request from standard input and writes JSON lines to standard output; images go into safetensors files.
It must use only what every version of ``diffusion`` has.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file

import diffusion
from diffusion.checkpoints import load_model
from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import DarkroomError
from diffusion.common.fingerprint import fingerprint
from diffusion.generation.config import Conditions
from diffusion.generation.generate import sample_each
from diffusion.process.samplers import SAMPLING_ADAPTER, SamplingConfig


def regenerate(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the fingerprint of this process, then the file with the images of each range in ``request["chunks"]``."""
    if Path(diffusion.__file__).resolve().parent != (Path(request["code"]) / "diffusion").resolve():
        raise DarkroomError(f"diffusion comes from {diffusion.__file__}, not from {request['code']}")
    recorded_fingerprint = request["fingerprint"]
    # A GPU's name is followed by the processor's: see diffusion.common.device.
    device = "auto" if "," in recorded_fingerprint["device"] else "cpu"
    sampling = {**request["sampling"], "precision": recorded_fingerprint["precision"], "device": device}
    config: SamplingConfig = SAMPLING_ADAPTER.validate_python(sampling)
    yield {"fingerprint": fingerprint(config.compute_batch, config.precision, config.device).model_dump(mode="json")}
    model = load_model(Path(request["weights"]))
    for (start, end), fields in zip(request["chunks"], request["conditions"], strict=True):
        indices, conditions = range(start, end), Conditions.model_validate(fields)
        images = sample_each(model, indices, request["seed"], config, conditions=conditions)
        file = Path(request["folder"]) / f"{start}.safetensors"
        save_file({str(index): image.contiguous() for index, image in zip(indices, images, strict=True)}, file)
        yield {"file": str(file)}


def main() -> None:
    """Answer the request on standard input; the last line on standard error is the error, if any."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            end_with_parent()
            for answer in regenerate(json.load(sys.stdin)):
                print(json.dumps(answer), file=answers, flush=True)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
            sys.exit(f"{error.title}: {'; '.join(problems)}")
        except DarkroomError as error:
            sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
