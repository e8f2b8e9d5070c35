"""Result of a retraining, and the check of its inputs."""

from pathlib import Path

from diffusion.common.config import Config
from diffusion.data.manifest import Manifest
from diffusion.evaluation.evaluator import require_enough
from diffusion.families.model import classes_of
from diffusion.generation.config import Conditions
from diffusion.generation.generate import check_conditions, check_prompts
from flows.config import Params
from flows.datasets.checkout import CheckedOut
from flows.explain import Explanation
from flows.ingest import IngestOutcome
from flows.promote import PromotionResult
from flows.sample import SamplingBatchResult


class RetrainResult(Config):
    """Results of all steps of a retraining."""

    data: IngestOutcome | CheckedOut
    run_id: str
    report: Path
    verdict: PromotionResult
    samples: SamplingBatchResult | None
    """None if there is no champion or it is a super-resolution model."""
    explained: Explanation
    skipped: None = None
    """Always None; ``Unchanged`` has the reason of a skipped retraining."""

    @property
    def summary(self) -> str:
        """The outcome in a sentence."""
        return f"{self.verdict.version.uri} is {self.verdict.title}: {self.verdict.reason}"


def require_samplable(params: Params, manifest: Manifest, conditions: Conditions) -> None:
    """Raise UserError, before hours of training, if the model cannot be evaluated or sampled under ``conditions``."""
    require_enough(params.dataset_folder)
    classes = classes_of(params.model, manifest.class_histogram)
    check_conditions(classes, params.model.text, params.sampling, conditions)
    check_prompts(conditions)
