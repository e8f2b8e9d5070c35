"""Darkroom's U-Net as a diffusers model."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from diffusion.families.config import ModelConfig, classes_of
from diffusion.families.ddpm.model import DDPMModel
from diffusion.families.ddpm.network import UNet
from diffusion.families.header import ModelHeader
from diffusion.process.samplers import SAMPLING_ADAPTER, DDPMSampling, SamplingConfig


class DarkroomUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Our U-Net as a denoiser: x_t in, the clean image out, whatever the network itself predicts.

    ``header`` and ``sampling`` are a ``ModelHeader`` and a ``SamplingConfig`` as JSON; the other three are what
    pipelines of diffusers ask for, ``out_channels`` twice the channels with a learned variance.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, sample_size: int, in_channels: int, out_channels: int, header: dict[str, Any], sampling: dict[str, Any]
    ) -> None:
        super().__init__()
        model_header = ModelHeader.model_validate(header)
        assert isinstance(model_header.model, ModelConfig)
        classes = classes_of(model_header.model, model_header.class_histogram)
        self.network = UNet(model_header.model, in_channels, sample_size, len(classes))
        self.guide = None
        if model_header.guide_images is not None:
            self.guide = UNet(model_header.model, in_channels, sample_size, len(classes))

    @classmethod
    def from_model(cls, model: DDPMModel, sampling: SamplingConfig) -> "DarkroomUNet":
        """Copy ``model``, with ``sampling`` as its default sampling options, and its guide where these need it."""
        if not model.header.sampling(sampling).autoguides:
            model = replace(model, header=model.header.model_copy(update={"guide_images": None}), guide=None)
        channels, size, _ = model.header.square
        has_learned_variance = samples_with_learned_variance(model, sampling)
        unet: DarkroomUNet = cls(
            sample_size=size,
            in_channels=channels,
            out_channels=(2 if has_learned_variance else 1) * channels,
            header=model.header.model_dump(mode="json"),
            sampling=sampling.model_dump(mode="json", exclude={"compute_batch", "precision", "device"}),
        )
        unet.network.load_state_dict(model.network.state_dict())
        if unet.guide is not None and model.guide is not None:
            unet.guide.load_state_dict(model.guide.state_dict())
        unet.eval()
        return unet

    @cached_property
    def model(self) -> DDPMModel:
        """The model as a ``DDPMModel`` that shares the weights."""
        model = DDPMModel.make_model(ModelHeader.model_validate(self.config.header), self.network, None)
        return replace(model, guide=self.guide)

    @property
    def sampling(self) -> SamplingConfig:
        """Default sampling options."""
        return SAMPLING_ADAPTER.validate_python(self.config.sampling)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        text: Tensor | None = None,
        tokens: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the clean images in [−1, 1], prediction type ``sample`` of diffusers: (N, C, H, W).

        ``sample`` is x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, (N, C, H, W), and ``timestep`` t, whole or not, of all or of each
        (N,). ``class_labels`` (N,) are numbers in the sorted classes, one more for any; ``text`` (N, 384) and
        ``tokens`` (N, L, 384) are ``DDPMModel.encode_prompt`` of captions, zeros for none. With 2C ``out_channels`` the
        second half is v of ``interpolate_deviation``, as a DDPMScheduler with the variance ``learned_range`` takes it.

        Raises ValueError for one of ``text`` and ``tokens`` without the other if the network attends to tokens.
        """
        if self.model.config.tokens and (text is None) != (tokens is None):
            missing = "text" if text is None else "tokens"
            raise ValueError(f"{missing} is missing: this network takes both text and tokens of an encoded prompt")
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        sigma = self.model.schedule.sigma(t)
        x = sample.float() * (1 + sigma**2).sqrt().float()[:, None, None, None]
        inputs = {"label": class_labels, "text": text, "tokens": tokens}
        conditioning = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        x0, v = self.model.denoiser(conditioning).estimate(x, sigma)
        answer = torch.cat([x0, v], dim=1) if self.config.out_channels > self.config.in_channels else x0
        answer = answer.to(sample.dtype)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)


def samples_with_learned_variance(model: DDPMModel, sampling: SamplingConfig) -> bool:
    """Whether sampling uses the learned variance of ``model``, which guided predictions do not have."""
    is_default = isinstance(sampling, DDPMSampling) and sampling.variance is None
    return is_default and model.config.variance == "learned_range" and not model.header.sampling(sampling).is_guided
