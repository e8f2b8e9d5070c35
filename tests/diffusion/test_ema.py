import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from diffusion.training.ema import ExponentialMovingAverage


def network_of(value: float) -> nn.Linear:
    network = nn.Linear(2, 3)
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    return network


def values(average: ExponentialMovingAverage) -> set[float]:
    return {value for tensor in average.state_dict().values() for value in tensor.flatten().tolist()}


def test_average_follows_the_closed_form_with_warm_up() -> None:
    average, expected = ExponentialMovingAverage(network_of(0.0), 0.9), 0.0
    for step in range(1, 60):
        value = float(step % 7)
        average.update(network_of(value), step)
        decay = min(0.9, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * value
        assert list(values(average)) == [pytest.approx(expected, rel=1e-5, abs=1e-6)]


def test_warm_up_forgets_the_random_start_within_a_few_steps() -> None:
    average = ExponentialMovingAverage(network_of(100.0), 0.9999)
    for step in range(1, 101):
        average.update(network_of(1.0), step)
    assert max(values(average)) < 1.2  # a constant decay of 0.9999 would still be at 99


def test_average_of_noisy_training_is_nearer_the_optimum_than_the_weights_are() -> None:
    torch.manual_seed(0)
    network, optimum = network_of(5.0), 1.0
    average = ExponentialMovingAverage(network, 0.99)
    for step in range(1, 400):
        for parameter in network.parameters():
            gradient = parameter.detach() - optimum + torch.randn_like(parameter)
            parameter.data -= 0.3 * gradient
        average.update(network, step)
    raw = torch.cat([p.detach().flatten() for p in network.parameters()])
    averaged = torch.cat([tensor.flatten() for tensor in average.state_dict().values()])
    assert (averaged - optimum).abs().mean() < 0.5 * (raw - optimum).abs().mean()


def test_the_network_is_left_alone_and_not_shared() -> None:
    network = network_of(1.0)
    before = copy.deepcopy(network.state_dict())
    average = ExponentialMovingAverage(network, 0.9)
    average.update(network_of(2.0), 1)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert values(average) != {1.0}


def test_an_average_restored_from_safetensors_goes_on_bit_for_bit() -> None:
    torch.manual_seed(1)
    average = ExponentialMovingAverage(nn.Linear(2, 3), 0.99)
    for step in range(1, 5):
        average.update(nn.Linear(2, 3), step)
    restored = ExponentialMovingAverage(nn.Linear(2, 3), 0.99)
    restored.load_state_dict(load(save(average.state_dict())))
    latest = nn.Linear(2, 3)
    average.update(latest, 5)
    restored.update(latest, 5)
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in average.state_dict().items())


def test_the_averages_fit_the_network_by_name() -> None:
    network = network_of(1.0)
    average = ExponentialMovingAverage(network_of(7.0), 0.9)
    network.load_state_dict(average.state_dict())
    assert {p.unique().item() for p in network.parameters()} == {7.0}
