"""Settings of quick trainings."""

from tests.builders.workspace import PARAMS

QUICK = {
    "training": {**PARAMS["training"], "images": 320, "checkpoints": 1, "warmup_images": 16},
    "evaluation": {"samples": 16, "extractor_size": 32},
}
