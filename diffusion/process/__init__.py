"""The mathematics of diffusion: schedules, parametrizations, losses, variances, samplers, guidance."""
