"""Gradients are summed over threads and processes in buckets, to the same bits whatever the timing."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion.training.distributed import GradientReducer
from tests.builders.forked_ranks import spawn

PARTS, PASSES = 2, 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def gradients_of(net: nn.Sequential, rank: int, part: int, number: int) -> tuple[Tensor, ...]:
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(100 * rank + 10 * part + number))
    return torch.autograd.grad(net(x).square().mean(), list(net.parameters()))


def sum_of_parts(net: nn.Sequential, rank: int) -> list[Tensor]:
    """The gradients of a process without buckets: micro-batches of a part first, then parts, in their order."""
    total = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for part in range(PARTS):
        passes = [gradients_of(net, rank, part, number) for number in range(PASSES)]
        total = [so_far + sum(more) for so_far, *more in zip(total, *passes, strict=True)]
    return total


def reduced(net: nn.Sequential, reducer: GradientReducer, rank: int, slow_part: int) -> list[Tensor]:
    def compute(part: int) -> None:
        if part == slow_part:
            time.sleep(0.05)
        earlier = gradients_of(net, rank, part, 0)
        with reducer.last_pass(part, earlier):
            gradients_of(net, rank, part, 1)

    with ThreadPoolExecutor(PARTS) as threads:
        list(threads.map(compute, range(PARTS)))
    reducer.wait()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert [each.stride() for each in gradients] == [each.stride() for each in net.parameters()]
    return [gradient.clone() for gradient in gradients]


def check(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    net = network()
    each = [sum_of_parts(net, other) for other in range(processes)]
    expected = [torch.stack(gradients).sum(0) for gradients in zip(*each, strict=True)]
    for bucket_bytes in (1, 1000, 2**30):
        reducer = GradientReducer(list(net.parameters()), PARTS, bucket_bytes)
        first, again = (reduced(net, reducer, rank, slow_part=(rank + turn) % 2) for turn in range(2))
        for one, other, right in zip(first, again, expected, strict=True):
            assert torch.equal(one, other)
            if processes == 2:
                assert torch.equal(one, right)
            torch.testing.assert_close(one, right)
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.long])])
def test_buckets_hold_the_sum_over_parts_and_processes(processes: int, tmp_path: Path) -> None:
    spawn(check, (processes, str(tmp_path)), processes)


def test_incomplete_pass_is_an_error_that_leaves_the_reducer_usable(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        reducer = GradientReducer(parameters, 1, bucket_bytes=1)
        with pytest.raises(ZeroDivisionError), reducer.last_pass(0, None):
            raise ZeroDivisionError
        with pytest.raises(RuntimeError):
            reducer.wait()
        # Outside of a last pass nothing is taken.
        torch.autograd.grad(parameters[0].sum() + parameters[1].sum(), parameters)
        with reducer.last_pass(0, None):
            torch.autograd.grad(parameters[0].sum() + 2 * parameters[1].sum(), parameters)
        reducer.wait()
        assert [parameter.grad.tolist() for parameter in parameters] == [[1.0] * 3, [2.0] * 3]
        # A weight without effect has no gradient, which is a sum of zeros.
        with reducer.last_pass(0, None):
            torch.autograd.grad(parameters[1].sum(), parameters, materialize_grads=True)
        reducer.wait()
        assert [parameter.grad.tolist() for parameter in parameters] == [[0.0] * 3, [1.0] * 3]
    finally:
        dist.destroy_process_group()
