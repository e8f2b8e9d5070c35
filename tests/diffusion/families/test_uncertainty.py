import torch

from diffusion.families.denoising import Uncertainty


def test_learned_uncertainty_converges_to_the_log_loss_per_time() -> None:
    time = torch.linspace(0, 999, 64)
    loss = (time / 200).sin().exp()
    uncertainty = Uncertainty()
    optimizer = torch.optim.Adam(uncertainty.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        uncertainty(loss, time).mean().backward()
        optimizer.step()
    # L / e^u + u is 1 + ln L where e^u is L.
    torch.testing.assert_close(uncertainty(loss, time), 1 + loss.log(), atol=0.01, rtol=0)


def test_learned_uncertainty_starts_without_effect() -> None:
    loss = torch.tensor([0.1, 2.0])
    assert torch.equal(Uncertainty()(loss, torch.tensor([0.0, 999.0])), loss)
