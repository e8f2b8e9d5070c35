"""Muon: equal singular values, whole steps, and the same end however often it is interrupted."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.training.muon import RMS, Muon, orthogonalize


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 100))
def test_orthogonalized_matrices_keep_singular_vectors_with_values_near_one(rows: int, columns: int, seed: int) -> None:
    matrices = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    for matrix, orthogonal in zip(matrices, orthogonalize(matrices), strict=True):
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonal @ vh.T
        torch.testing.assert_close(inside, torch.diag(inside.diag()), atol=2e-3, rtol=0)
        # Iterations of a fixed number leave values far below the largest below 1.
        assert (inside.diag()[values > 0.05 * values.norm()] > 0.6).all()
        assert inside.diag().max() < 1.3


def stepped(parameter: Tensor, gradients: list[Tensor], **options: float) -> Tensor:
    layer = nn.Parameter(parameter.clone())
    optimizer = Muon([layer], **({"lr": 0.01, "weight_decay": 0.0} | options))
    for gradient in gradients:
        layer.grad = gradient.clone()
        optimizer.step()
    return layer.detach()


def test_a_step_equals_torch_s_muon_to_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(16, 40, generator=generator) for _ in range(4))
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = stepped(start, gradients, weight_decay=0.1)
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_updates_have_the_root_mean_square_that_adamw_has() -> None:
    change = stepped(torch.zeros(64, 64, 3, 3), [torch.randn(64, 64, 3, 3)], lr=1.0)
    assert change.square().mean().sqrt().item() == pytest.approx(RMS, rel=0.3)


def test_a_convolution_counts_as_a_matrix_in_any_memory_format() -> None:
    weight, gradient = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    flat = stepped(weight.flatten(1), [gradient.flatten(1)] * 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        result = stepped(weight.to(memory_format=memory_format), [gradient.to(memory_format=memory_format)] * 2)
        torch.testing.assert_close(result.flatten(1), flat, atol=1e-6, rtol=1e-5)


def test_steps_not_finite_change_neither_weights_nor_momentum() -> None:
    start, good = torch.randn(4, 5), torch.randn(4, 5)
    layer = nn.Parameter(start.clone())
    optimizer = Muon([layer], 0.1, 0.1)
    layer.grad, optimizer.found_inf = torch.full((4, 5), torch.nan), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(layer, start)
    layer.grad, optimizer.found_inf = good.clone(), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(layer, stepped(start, [good], lr=0.1, weight_decay=0.1))


def test_threads_that_share_the_matrices_change_no_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 8, 3, 3), (8, 8, 1, 1), (16, 8, 3, 3), (32, 16))
    values = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    results = []
    with ThreadPoolExecutor(3) as pool:
        for threads in (None, pool):
            layers = [nn.Parameter(value.clone()) for value in values[0]]
            optimizer = Muon(layers, 0.1, 0.1)
            optimizer.threads = threads
            for gradients in values[1:]:
                for layer, gradient in zip(layers, gradients, strict=True):
                    layer.grad = gradient.clone()
                optimizer.step()
            results.append(layers)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_weights_of_inputs_and_outputs_are_left_to_adamw() -> None:
    network = UNet(ModelConfig(width=16, channel_mult=(1, 2), attention=(1,), text=True), 3, 16, classes=4)
    hidden = {id(parameter) for parameter in network.matrices()}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in hidden}
    assert {name.split(".")[0] for name in names} == {"down", "middle", "up"}
    assert not [name for name in names if "norm" in name or name.endswith("bias")]
