import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from diffusion.training.ema import EMA, exponential_decay, mixture, power, power_decay


def network_of(value: float) -> nn.Linear:
    network = nn.Linear(2, 3)
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    return network


def values(average: EMA) -> set[float]:
    return {value for tensor in average.averages.values() for value in tensor.flatten().tolist()}


def test_average_follows_the_closed_form_with_warm_up() -> None:
    average, expected = EMA(network_of(0.0), exponential_decay(0.9)), 0.0
    for step in range(1, 60):
        value = float(step % 7)
        average.update(network_of(value), step)
        decay = min(0.9, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * value
        assert list(values(average)) == [pytest.approx(expected, rel=1e-5, abs=1e-6)]


def test_warm_up_forgets_the_random_start_within_a_few_steps() -> None:
    average = EMA(network_of(100.0), exponential_decay(0.9999))
    for step in range(1, 101):
        average.update(network_of(1.0), step)
    assert max(values(average)) < 1.2  # a constant decay of 0.9999 would still be at 99


def test_average_of_noisy_training_is_nearer_the_optimum() -> None:
    torch.manual_seed(0)
    network, optimum = network_of(5.0), 1.0
    average = EMA(network, exponential_decay(0.99))
    for step in range(1, 400):
        for parameter in network.parameters():
            gradient = parameter.detach() - optimum + torch.randn_like(parameter)
            parameter.data -= 0.3 * gradient
        average.update(network, step)
    raw = torch.cat([p.detach().flatten() for p in network.parameters()])
    averaged = torch.cat([tensor.flatten() for tensor in average.averages.values()])
    assert (averaged - optimum).abs().mean() < 0.5 * (raw - optimum).abs().mean()


def test_weight_average_does_not_modify_or_alias_the_network() -> None:
    network = network_of(1.0)
    before = copy.deepcopy(network.state_dict())
    average = EMA(network, exponential_decay(0.9))
    average.update(network_of(2.0), 1)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert values(average) != {1.0}


def test_restored_ema_continues_bit_for_bit() -> None:
    torch.manual_seed(1)
    average = EMA(nn.Linear(2, 3), exponential_decay(0.99))
    for step in range(1, 5):
        average.update(nn.Linear(2, 3), step)
    restored = EMA(nn.Linear(2, 3), exponential_decay(0.99))
    for name, value in load(save(average.averages)).items():
        restored.averages[name].copy_(value)
    latest = nn.Linear(2, 3)
    average.update(latest, 5)
    restored.update(latest, 5)
    assert all(torch.equal(value, restored.averages[name]) for name, value in average.averages.items())


def test_the_averages_fit_the_network_by_name() -> None:
    network = network_of(1.0)
    average = EMA(network_of(7.0), exponential_decay(0.9))
    network.load_state_dict(average.averages)
    assert {p.unique().item() for p in network.parameters()} == {7.0}


@given(st.floats(0.02, 0.27), st.integers(1, 400))
def test_a_power_function_average_weighs_steps_as_its_name_says(length: float, steps: int) -> None:
    network = network_of(100.0)
    average = EMA(network, power_decay(length))
    shares = np.zeros(steps)
    for step in range(1, steps + 1):
        shares[: step - 1] *= average.decay(step)
        shares[step - 1] = 1 - average.decay(step)
    gamma = power(length)
    # In the limit of many steps the weight up to τ is (τ/t)^(γ + 1): exact here, whatever their number.
    expected = (np.arange(1, steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(np.cumsum(shares), expected, atol=1e-9)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_ema_stds_and_powers_match_the_paper(length: float, gamma: float) -> None:
    assert power(length) == pytest.approx(gamma, abs=5e-3)


@given(st.floats(0.02, 0.27))
def test_ema_std_is_the_deviation_of_the_weighting(length: float) -> None:
    gamma = power(length)
    tau = (np.arange(200_000) + 0.5) / 200_000
    weights = tau**gamma / (tau**gamma).sum()
    mean = (weights * tau).sum()
    assert np.sqrt((weights * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.06, 0.08, 0.12])
def test_post_hoc_ema_equals_the_tracked_average(length: float) -> None:
    """The weights wander, as those of a network do; snapshots of two averages are kept eight times."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.standard_normal((2000, 8)), axis=0)
    layer = nn.Linear(8, 1, bias=False)
    averages = [EMA(layer, power_decay(each)) for each in (0.05, 0.1)]
    tracked_average = EMA(layer, power_decay(length))
    snapshots, values = [], []
    for step, point in enumerate(path, start=1):
        nn.init.zeros_(layer.weight).data += torch.from_numpy(point).float()
        for average in (*averages, tracked_average):
            average.update(layer, step)
        if step % 250 == 0:
            snapshots += [(step, 0.05), (step, 0.1)]
            values += [average.averages["weight"].clone() for average in averages]
    shares, error = mixture(snapshots, len(path), length)
    combination = sum(share * value for share, value in zip(shares, values, strict=True))
    expected = tracked_average.averages["weight"]
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    assert error < 0.2
    assert (combination - expected).norm() < 0.1 * min((value - expected).norm() for value in values[-2:])


@pytest.mark.parametrize("length", [0.03, 0.05, 0.09, 0.2])
@pytest.mark.parametrize("snapshots", [[(1000, 0.05), (1000, 0.1)], [(at, 0.1) for at in (100, 400, 700, 1000)]])
def test_post_hoc_ema_of_few_snapshots_keeps_constant_weights(
    snapshots: list[tuple[int, float]], length: float
) -> None:
    shares, _ = mixture(snapshots, 1000, length)
    assert sum(shares) == pytest.approx(1, abs=1e-9)


def test_error_of_post_hoc_ema_follows_its_weight_function() -> None:
    def density(images: int, std: float) -> np.ndarray:
        tau, gamma = (np.arange(200_000) + 0.5) / 200_000 * 1000, power(std)
        return np.where(tau <= images, (gamma + 1) * (tau / images) ** gamma / images, 0)

    snapshots = [(at, std) for at in (250, 500, 750, 1000) for std in (0.05, 0.1)]
    for length in (0.03, 0.07, 0.2):
        shares, error = mixture(snapshots, 1000, length)
        combination = sum(share * density(*snapshot) for share, snapshot in zip(shares, snapshots, strict=True))
        target = density(1000, length)
        assert error == pytest.approx(np.linalg.norm(combination - target) / np.linalg.norm(target), rel=2e-2, abs=1e-3)


def test_average_kept_in_training_comes_from_its_snapshot_alone() -> None:
    shares, error = mixture([(500, 0.05), (500, 0.1), (1000, 0.05), (1000, 0.1)], 1000, 0.1)
    assert shares == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert error < 1e-5
