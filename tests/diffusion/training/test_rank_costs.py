"""What a rank holds and sends at world sizes that are not at hand, against arithmetic by hand."""

import math
from collections import Counter
from pathlib import Path

import pytest
from torch import nn

from diffusion.common.errors import UserError
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import ResidualBlock, UNet
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.rank_costs import RankCost, estimate_ranks

MODEL = ModelConfig(width=16, channel_mult=(1, 2), blocks=1, attention=(1,), patch=1)
UNCERTAINTY = 128


def costs(dataset: Path, world_size: int, **training: object) -> list[RankCost]:
    config = TrainingConfig.model_validate({"images": 1000, "batch_size": 96, "device": "cpu"} | training)
    return estimate_ranks(dataset, MODEL, config, sampling_config(), world_size).world_sizes


def shard(parameters: list[nn.Parameter], group: int) -> int:
    """Bytes of the rows that the first of ``group`` processes has of each of ``parameters``."""
    return sum(4 * math.ceil(len(each) / group) * (each.numel() // len(each)) for each in parameters)


@pytest.mark.slow
def test_replicas_hold_all_and_send_their_gradients_twice(dataset: Path) -> None:
    network = UNet(MODEL, 1, 8, classes=2)
    size = 4 * sum(each.numel() for each in network.parameters())
    muon = 4 * sum(each.numel() for each in network.matrices())
    # Its step has updates of all matrices with shorter sides of one length, and six square products of each.
    sides = Counter(min(each.flatten(1).shape) for each in network.matrices())
    least = max(4 * 6 * count * side**2 for side, count in sides.items())
    costs_per_rank = costs(dataset, 48, micro_batch=1, learned_uncertainty=True)
    assert [(each.ranks, each.images) for each in costs_per_rank] == [(8, 12), (16, 6), (32, 3), (48, 2)]
    for each in costs_per_rank:
        trained = size + 4 * UNCERTAINTY
        assert (each.weights, each.gradients, each.averages) == (trained, 2 * trained, 2 * size)
        assert each.optimizer == 2 * trained - muon
        assert least < each.muon < least + 2 * muon
        state = each.weights + each.gradients + each.optimizer + each.averages
        assert each.memory == state + max(each.activations, each.muon)
        # However many micro-batches there are.
        assert each.all_reduce == 2 * trained * (each.ranks - 1) // each.ranks
        assert (each.all_gather, each.reduce_scatter, each.gathered) == (0, 0, 0)
    # One image at a time.
    assert len({each.activations for each in costs_per_rank}) == 1


@pytest.mark.slow
def test_groups_hold_rows_and_send_weights_twice_per_micro_batch(dataset: Path) -> None:
    network, group = UNet(MODEL, 1, 8, classes=2), 4
    inside = [each for block in network.modules() if isinstance(block, ResidualBlock) for each in block.parameters()]
    own = {id(each) for each in inside}
    outside = [each for each in network.parameters() if id(each) not in own]
    blocks, rest = shard(inside, group), shard(outside, group)
    costs_per_rank = costs(dataset, 16, shard=group, optimizer="adamw", micro_batch=3)
    assert [(each.ranks, each.images) for each in costs_per_rank] == [(8, 12), (16, 6)]
    for each in costs_per_rank:
        passes, replicas = each.images // 3, each.ranks // group
        assert (each.weights, each.gradients) == (blocks + rest,) * 2
        # The average and the guide.
        assert each.averages == 2 * (blocks + rest)
        assert each.optimizer == 2 * (blocks + rest)
        assert each.reduce_scatter == passes * (group - 1) * (blocks + rest)
        # Blocks are gathered for forward and backward, the rest stays in between.
        assert each.all_gather == passes * (group - 1) * (2 * blocks + rest)
        assert each.all_reduce == 2 * (blocks + rest) * (replicas - 1) // replicas


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_of_a_large_mesh_has_a_row(dataset: Path) -> None:
    network = UNet(MODEL, 1, 8, classes=2)
    costs_per_rank = costs(dataset, 128, batch_size=128, shard=True, optimizer="adamw")
    rows = 4 * sum(each.numel() // len(each) for each in network.parameters())
    assert costs_per_rank[-1].weights == rows > 2 * 4 * sum(each.numel() for each in network.parameters()) // 128
    assert costs_per_rank[-1].all_reduce == 0


@pytest.mark.parametrize("training", [{"batch_size": 64}, {"shard": 5, "optimizer": "adamw"}])
def test_ranks_that_divide_neither_batch_nor_groups_are_an_error(dataset: Path, training: dict[str, object]) -> None:
    with pytest.raises(UserError):
        costs(dataset, 48, **training)
