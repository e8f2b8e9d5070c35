"""What the network predicts, and how much each noise level counts in the loss."""

from collections.abc import Callable

from torch import Tensor

from diffusion.models.config import Prediction
from diffusion.process import NoiseSchedule, scales


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should say: the noise, the picture, or v = √ᾱ ε − √(1−ᾱ) x_0 (arXiv 2202.00512).

    Pictures are (N, C, H, W); ``alpha_bar``, best in float64, broadcasts against them.
    """
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x0
    signal, spread = scales(alpha_bar, x0)
    return signal * noise - spread * x0


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean picture that the network's ``output`` at ``x_t`` stands for."""
    if prediction == "x0":
        return output
    signal, spread = scales(alpha_bar, x_t)
    return (x_t - spread * output) / signal if prediction == "noise" else signal * x_t - spread * output


def loss_weight(snr: Tensor, prediction: Prediction, gamma: float | None) -> Tensor:
    """Multiplier on the squared error of ``prediction`` at signal-to-noise ratio ``snr``.

    None is the plain loss. Min-SNR-γ (arXiv 2303.09556) weighs the error of x_0 with min(SNR, γ); since an
    error of x_0 is one of the noise divided by SNR, and one of v divided by SNR + 1, the multiplier is
    min(SNR, γ) over 1, SNR or SNR + 1.
    """
    if gamma is None:
        return snr.new_ones(snr.shape)
    per_x0_error = {"x0": snr.new_ones(snr.shape), "noise": snr, "v": snr + 1}[prediction]
    return snr.clamp(max=gamma) / per_x0_error


def per_sample_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    prediction: Prediction,
    gamma: float | None,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Weighted mean squared error of each picture, (N,) float32; noising and loss in float32 at any precision."""
    x_t = schedule.q_sample(x0, t, noise)
    output = network(x_t, t.float()).float()
    error = (output - target(prediction, x0, noise, schedule.alpha_bar(t))).square().mean((1, 2, 3))
    weight = loss_weight(schedule.snr.to(t.device)[t], prediction, gamma)
    return weight.to(error.dtype) * error
