"""The flow ``sample-on-demand``: images by a form in Prefect's UI."""

from typing import TYPE_CHECKING, Annotated

from prefect import flow
from pydantic import Field

from diffusion.generation.config import Conditions
from diffusion.process.samplers import SamplingConfig, sampling_config
from flows.config import Params, SamplingBatchConfig

if TYPE_CHECKING:
    from flows.sample import SamplingBatchResult


@flow(name="sample-on-demand", flow_run_name="{count}-of-{model}")
def sample_on_demand(
    model: str,
    count: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
    to: str | None = None,
    labels: tuple[str, ...] = (),
    prompts: tuple[str, ...] = (),
    negative_prompt: str | None = None,
    sampling: SamplingConfig = sampling_config(),  # noqa: B008 (frozen)
    sampling_batch: SamplingBatchConfig = SamplingBatchConfig(),  # noqa: B008
) -> "SamplingBatchResult":
    """Print images of a registered model to S3, with a manifest.

    Args:
        model: Whose images, models:/NAME@champion or models:/NAME/NUMBER.
        count: How many.
        seed: Image i of a seed is the same image everywhere.
        to: Where to, s3://BUCKET or s3://BUCKET/PREFIX; left out, to its usual place in the usual bucket.
        labels: Classes to show, in turns; none means as often as the data set has them.
        prompts: What to show, in turns, for a model that was told captions.
        negative_prompt: What not to show; it needs guidance in sampling, say 3.
        sampling: How images are drawn.
        sampling_batch: How they are written, and by how many workers.
    """
    from flows.deployment.tasks import ended
    from flows.sample import sample

    conditions = Conditions(labels=labels, prompts=prompts, negative_prompt=negative_prompt)
    done = sample(Params(sampling=sampling, sampling_batch=sampling_batch), model, count, seed, to, conditions)
    return ended(done, f"{done.count} images of {done.model} in {done.uri}")
