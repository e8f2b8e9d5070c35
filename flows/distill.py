"""Flow ``distill``: train a student of the champion that generates in one to four evaluations, and apply the gate."""

from mlflow.client import MlflowClient
from prefect import flow

from diffusion.checkpoints import read_model_header
from diffusion.families.model import ModelHeader
from diffusion.training.setup import student_training
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
    training = student_training(params.training, params.distillation, params.sampling, *find_teacher(params))
    params = params.model_copy(update={"training": training})
    require_promotable_dependencies(params)
    train(params, restart="set_aside")
    evaluate(params)
    return promote(params)


@retryable_task
def find_teacher(params: Params) -> tuple[str, ModelHeader]:
    """Resolve the teacher to models:/NAME/NUMBER; for a student it is its own teacher, so that commands can repeat."""
    client, name = MlflowClient(), params.distillation.teacher
    version = model_versions.resolve(client, params.champion if name == "champion" else name)
    header = read_model_header(model_versions.cached_weights(version))
    if header.student_steps is not None and (teacher := version.tags.get(START)):
        version = model_versions.resolve(client, teacher)
        header = read_model_header(model_versions.cached_weights(version))
    return version.uri, header
