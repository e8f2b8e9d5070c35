"""Script that generates a batch's images again with the first ``diffusion`` on its path, that of a model version.

It reads a JSON request from standard input and writes JSON lines to standard output; images go into safetensors files.
It uses only what the first version of ``diffusion`` had, and newer parts only if the request needs them.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file

import diffusion
from diffusion.checkpoints import load_model
from diffusion.common.errors import DarkroomError
from diffusion.common.fingerprint import fingerprint
from diffusion.generation.config import Conditions
from diffusion.generation.generate import sample
from diffusion.process.samplers import SAMPLING_ADAPTER, SamplingConfig


def redraw(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the fingerprint of this process, then the file with the images of each range in ``request["chunks"]``.

    ``request["conditions"]``, if present, holds the conditions of each range.
    """
    if Path(diffusion.__file__).resolve().parent != (Path(request["code"]) / "diffusion").resolve():
        raise DarkroomError(f"diffusion comes from {diffusion.__file__}, not from {request['code']}")
    config = recorded_sampling(request["sampling"], request["fingerprint"])
    yield {"fingerprint": fingerprint_of(config)}
    model = load_model(Path(request["weights"]))
    for number, (first, end) in enumerate(request["chunks"]):
        generate = sample
        if "conditions" in request:
            generate = partial(sample, conditions=Conditions.model_validate(request["conditions"][number]))
        file = Path(request["folder"]) / f"{first}.safetensors"
        images = generate(model, range(first, end), request["seed"], config)
        save_file({"images": images.contiguous()}, file)
        yield {"first": first, "file": str(file)}


def recorded_sampling(sampling: dict[str, Any], recorded: dict[str, Any]) -> SamplingConfig:
    """``sampling`` with the precision and device of the ``recorded`` fingerprint."""
    # A GPU's name is followed by the processor's: see diffusion.common.device.
    device = "auto" if "," in recorded["device"] else "cpu"
    chosen = {**sampling, "precision": recorded["precision"], "device": device}
    return SAMPLING_ADAPTER.validate_python(chosen)


def fingerprint_of(config: SamplingConfig) -> dict[str, Any]:
    """Fingerprint of this process."""
    return fingerprint(config.compute_batch, config.precision, config.device).model_dump(mode="json")


def end_with(parent: int) -> None:
    """Exit as soon as the process with the ID ``parent`` is no longer the parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer the request on standard input; the last line on standard error is the error, if any."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            request = json.load(sys.stdin)
            threading.Thread(target=end_with, args=(request["parent"],), daemon=True).start()
            for answer in redraw(request):
                print(json.dumps(answer), file=answers, flush=True)
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            sys.exit(f"{error.title}: {'; '.join(wrong)}")
        except DarkroomError as error:
            sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
