"""What drawing a picture costs, counted and not timed.

Floating-point operations are the same on every machine, whatever else runs there. Seconds are not: two models timed one
after the other would differ by the neighbours that each happened to have, and the gate by luck.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config_sampling import SamplingConfig
from diffusion.families import family_of
from diffusion.model import Model


def gflop(model: Model, config: SamplingConfig) -> float:
    """Floating-point operations, in 10⁹, by which ``model`` draws one picture as ``config`` says.

    Those of matrix products and convolutions, as torch counts them; what samplers do besides is next to nothing. The
    model is on the processor, where it was loaded.
    """
    operations = 0
    for times, once in family_of(model.config).passes(model, config):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            once()
        operations += times * counter.get_total_flops()
    return float(operations / 1e9)
