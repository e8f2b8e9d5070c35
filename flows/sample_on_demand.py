"""Flow ``sample-on-demand``: generate images from a form in Prefect's UI."""

from typing import TYPE_CHECKING, Annotated

from prefect import flow
from pydantic import Field

from diffusion.common.escaping import pluralize
from diffusion.common.shapes import parse_size
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
    size: str | None = None,
    sampling: SamplingConfig = sampling_config(),  # noqa: B008 (frozen)
    sampling_batch: SamplingBatchConfig = SamplingBatchConfig(),  # noqa: B008
) -> "SamplingBatchResult":
    """Generate images with a registered model to S3, with a manifest.

    Args:
        model: Model version, models:/NAME@champion or models:/NAME/NUMBER.
        count: Number of images.
        seed: Seed; image i of a seed is the same image everywhere.
        to: Destination, s3://BUCKET or s3://BUCKET/PREFIX; default: the standard prefix in Darkroom's bucket.
        labels: Class labels, used in turn; default: the class frequencies of the data set.
        prompts: Text prompts, used in turn, for a model trained on captions.
        negative_prompt: Negative prompt; needs guidance in sampling, say 3.
        size: Width and height in pixels, as 96x64; default: the most frequent shape of the training images.
        sampling: Sampler settings.
        sampling_batch: File format and parallelism.
    """
    from flows.deployment.tasks import completed_state
    from flows.sample import sample

    sizes = () if size is None else (parse_size(size),)
    conditions = Conditions(labels=labels, prompts=prompts, negative_prompt=negative_prompt, sizes=sizes)
    result = sample(Params(sampling=sampling, sampling_batch=sampling_batch), model, count, seed, to, conditions)
    return completed_state(result, f"{pluralize(result.count, 'image')} of {result.model} in {result.uri}")
