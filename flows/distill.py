"""Flow ``distill``: train a student of the champion that generates in one to four evaluations, and apply the gate."""

from mlflow.client import MlflowClient
from prefect import flow

from diffusion.api.engine import student_config
from diffusion.checkpoints import read_model_header
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.evaluate import evaluate
from flows.promote import PromotionResult, promote
from flows.registry import model_versions
from flows.registry.dependencies import require_promotable_dependencies
from flows.tracking.runs import START
from flows.train import train


@flow(name="distill", flow_run_name="distill-{params.training.dataset}")
def distill(params: Params) -> PromotionResult:
    """Distil the model that ``distillation.teacher`` names; the student is a version of the same registered model."""
    params = configure_student(params)
    require_promotable_dependencies(params)
    train(params, restart="set_aside")
    evaluate(params)
    return promote(params)


@retryable_task
def configure_student(params: Params) -> Params:
    """Configuration that trains a student of models:/NAME/NUMBER, to which the teacher resolves.

    Where a student is named, its own teacher is distilled, so that commands can repeat.
    """
    client, name = MlflowClient(), params.distillation.teacher
    version = model_versions.resolve(client, params.champion if name == "champion" else name)
    header = read_model_header(model_versions.cached_weights(version))
    if header.student_steps is not None and (teacher := version.tags.get(START)):
        version = model_versions.resolve(client, teacher)
        header = read_model_header(model_versions.cached_weights(version))
    return student_config(params, version.uri, header)
