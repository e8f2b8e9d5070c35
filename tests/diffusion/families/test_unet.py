import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from diffusion.common.errors import UserError
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import SelfAttention, TextAttention, UNet, attend, seeded_dropout, sinusoidal

QUERY = ("norm.weight", "norm.bias", "query.weight", "query.bias")


def small(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"width": 16, "blocks": 1, "channel_mult": (1, 2), "attention": (1,)} | changes)


def randomize(network: UNet) -> UNet:
    """The network with random values where it starts with zeros, so that every part of it speaks."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def noisy(count: int = 2, channels: int = 1, size: int = 28) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "patch", "channel_mult"),
    [(28, 2, (1, 2)), (28, 2, (1, 2, 2)), (28, 1, (1, 2)), (28, 4, (1,)), (31, 2, (1, 2)), (8, 1, (1, 1, 1, 1))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_input_shape(size: int, patch: int, channel_mult: tuple[int, ...], channels: int) -> None:
    network = UNet(small(patch=patch, channel_mult=channel_mult, attention=()), channels, size)
    assert randomize(network)(noisy(2, channels, size), torch.tensor([0.0, 999.0])).shape == (2, channels, size, size)


@pytest.mark.parametrize(
    ("attention", "places"),
    [
        ((), []),
        ((0,), ["down.0", "up.3", "up.4"]),
        ((1,), ["down.2", "middle.0", "up.0", "up.1"]),
        (("middle",), ["middle.0"]),
        (("middle", 0), ["down.0", "middle.0", "up.3", "up.4"]),
    ],
)
def test_attention_is_where_the_configuration_says(attention: tuple[int | str, ...], places: list[str]) -> None:
    network = UNet(small(attention=attention), 1, 12)
    names = [name for name, layer in network.named_modules() if isinstance(layer, SelfAttention)]
    assert names == [f"{place}.attention" for place in places]


@pytest.mark.parametrize(
    ("size", "patch", "lowest"), [(8, 2, 2), (28, 2, 7), (32, 2, 8), (32, 1, 8), (64, 2, 8), (96, 2, 6), (256, 4, 8)]
)
def test_lowest_resolution_has_about_8_by_8_positions(size: int, patch: int, lowest: int) -> None:
    network, sizes = UNet(ModelConfig(width=16, heads=1, patch=patch), 1, size), []
    network.middle[0].register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[-2:])))
    network(noisy(1, 1, size), torch.zeros(1))
    assert sizes == [(lowest, lowest)]


def test_resolutions_below_a_pixel_are_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"fold 32 pixels into one, and the images have 28: take a number out of"):
        UNet(small(patch=4, channel_mult=(1, 1, 1, 1)), 1, 28)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": (2,)}, "model.attention names resolution 2, and there are 2: use 0 to 1"),
        ({"attention": (-1,)}, "use 0 to 1, or middle"),
        ({"attention": ("bottom",)}, "middle"),
        ({"channel_mult": None}, "set both, or use middle"),
        ({"heads": 3}, "model.heads = 3 does not divide the 32 channels at resolution 1"),
        ({"channel_mult": ()}, "needs at least one positive number"),
        ({"channel_mult": (1, 0)}, "needs at least one positive number"),
        ({"width": 24}, "multiple of 16"),
        ({"patch": 3}, "1, 2 or 4"),
        ({"widht": 32}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_configurations_are_rejected_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        small(**changes)


def test_new_network_outputs_zero() -> None:
    assert not UNet(small(), 1, 28)(noisy(), torch.tensor([5.0, 900.0])).any()


def test_every_weight_learns() -> None:
    network = randomize(UNet(small(channel_mult=(1, 2), attention=(0, 1)), 1, 12))
    network(noisy(2, 1, 12), torch.tensor([100.0, 800.0])).square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias just before a normalisation over its own channel's group may shift nothing; none is here.
    assert silent == []


def test_the_answer_depends_on_the_time_between_steps_too() -> None:
    network, x = randomize(UNet(small(), 1, 28)).eval(), noisy(1)
    at = [network(x, torch.tensor([time])) for time in (500.0, 500.5, 501.0)]
    assert not torch.allclose(at[0], at[1], atol=1e-6)
    bend = (at[1] - (at[0] + at[2]) / 2).square().mean()
    assert bend < 0.1 * (at[2] - at[0]).square().mean()


def test_output_depends_on_the_class_or_its_absence() -> None:
    network, x, time = randomize(UNet(small(), 1, 28, classes=3)).eval(), noisy(1), torch.tensor([500.0])
    answers = [network(x, time, torch.tensor([label])) for label in range(3)]
    answers.append(network(x, time))
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other, atol=1e-4) for other in answers[:i])
    torch.testing.assert_close(network(x, time, torch.tensor([network.no_class])), answers[-1], atol=0, rtol=0)


def test_output_depends_on_the_caption_and_zeros_are_none() -> None:
    network, x, time = randomize(UNet(small(text=True), 1, 28)).eval(), noisy(1), torch.tensor([500.0])
    captions = functional.normalize(torch.randn(2, 384, generator=torch.Generator().manual_seed(0)))
    answers = [network(x, time, text=each[None]) for each in captions] + [network(x, time)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other, atol=1e-4) for other in answers[:i])
    mixed = torch.stack([torch.zeros(384), captions[0]])
    both = network(x.expand(2, -1, -1, -1), time.expand(2), text=mixed)
    torch.testing.assert_close(both, torch.cat([answers[2], answers[0]]), atol=1e-5, rtol=1e-4)


def test_weights_that_read_captions_learn_from_batches_without_any() -> None:
    network = randomize(UNet(small(text=True, attention=()), 1, 12, classes=2))
    caption, tokens = functional.normalize(torch.ones(1, 384)), torch.randn(1, 3, 384)
    # Without a caption all attend to the learned token alone, whatever they ask for.
    reading = {f"middle.0.text_attention.{name}" for name in (*QUERY, "key_value.weight", "key_value.bias")}
    for text, silent in ((caption, {"no_text"}), (0 * caption, {"text.weight", "text.bias"} | reading)):
        states = tokens * text.any()
        loss = network(noisy(1, 1, 12), torch.tensor([500.0]), torch.tensor([1]), text, tokens=states).square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        gradients_by_name = zip(dict(network.named_parameters()), gradients, strict=True)
        assert {name for name, gradient in gradients_by_name if not gradient.any()} == silent


def test_output_depends_on_the_tokens_of_a_caption_but_not_on_padding() -> None:
    network, x, time = randomize(UNet(small(text=True), 1, 28)).eval(), noisy(1), torch.tensor([500.0])
    assert [name for name, layer in network.named_modules() if isinstance(layer, TextAttention)] == [
        f"{place}.text_attention" for place in ("down.2", "middle.0", "up.0", "up.1")
    ]
    tokens = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0)).half()
    answers = [network(x, time, tokens=each[None]) for each in tokens] + [network(x, time)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other, atol=1e-4) for other in answers[:i])
    padded = torch.stack([functional.pad(tokens[0], (0, 0, 0, 3)), torch.zeros(8, 384).half()])
    both = network(x.expand(2, -1, -1, -1), time.expand(2), tokens=padded)
    torch.testing.assert_close(both, torch.cat([answers[0], answers[2]]), atol=1e-5, rtol=1e-4)


def test_the_sentence_vector_alone_is_the_network_of_before() -> None:
    names = UNet(small(text=True, text_tokens=0), 1, 28).state_dict().keys()
    assert not [name for name in names if "text_attention" in name]
    with pytest.raises(ValidationError, match="how captions are read"):
        small(text_tokens=8)
    with pytest.raises(ValidationError, match="heads"):
        small(text=True, attention=(), heads=3)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    network, time = randomize(UNet(small(), 1, 28)).eval(), torch.tensor([10.0, 500.0, 990.0])
    x = noisy(3)
    other = torch.cat([x[:1], noisy(2) * 5])
    torch.testing.assert_close(network(x, time)[:1], network(other, time)[:1], atol=1e-5, rtol=1e-4)


def test_receptive_field_covers_all_corners() -> None:
    network, x = randomize(UNet(small(channel_mult=(1, 1), attention=(1,)), 1, 28)).eval(), noisy(1)
    x.requires_grad_()
    network(x, torch.tensor([500.0]))[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert x.grad[0, 0].abs().gt(0).all()


def test_bfloat16_and_channels_last_agree_with_float32() -> None:
    network, time = randomize(UNet(small(), 1, 28)).eval(), torch.tensor([10.0, 900.0])
    with torch.inference_mode():
        exact = network(noisy(), time)
        network.to(memory_format=torch.channels_last)
        reordered = network(noisy().contiguous(memory_format=torch.channels_last), time)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(noisy().contiguous(memory_format=torch.channels_last), time)
    torch.testing.assert_close(reordered, exact, atol=1e-4, rtol=1e-4)
    assert (rounded.float() - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("positions", [1, 49, 256, 257])
def test_attention_is_scaled_dot_product_attention_at_any_length(positions: int) -> None:
    query, key, value = torch.randn(3, 2, 4, positions, 8)
    torch.testing.assert_close(
        attend(query, key, value), scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-4
    )


def test_the_network_compiles_as_one_graph() -> None:
    network, time = randomize(UNet(small(), 1, 28)).eval(), torch.tensor([10.0, 900.0])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(noisy(), time), network(noisy(), time), atol=1e-5, rtol=1e-4)


def test_time_embeddings_of_all_steps_differ() -> None:
    embeddings = sinusoidal(torch.arange(1000), 64)
    distances = torch.cdist(embeddings, embeddings) + torch.eye(1000) * 10
    assert distances.min() > 0.1


@pytest.mark.parametrize("width", [32, 64, 128])
def test_each_value_of_the_time_embedding_tells_times_apart(width: int) -> None:
    assert sinusoidal(torch.arange(1000), width).std(0).min() > 0.25  # that of a full wave is 0.71


@pytest.mark.parametrize(("module", "absent"), [("generation.config", "torch"), ("checkpoints", "torch._dynamo")])
def test_what_each_command_loads_is_light(module: str, absent: str) -> None:
    code = f"import sys, diffusion.families.config, diffusion.{module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dropout_depends_only_on_the_seed_of_the_image() -> None:
    h, draws = torch.ones(3, 16, 8, 8), torch.tensor([1, 2, 1])
    dropped_ = seeded_dropout(h, draws, 0.25)
    assert dropped_.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped_[0], dropped_[2])
    assert not torch.equal(dropped_[0], dropped_[1])
    assert torch.equal(seeded_dropout(h[1:2], draws[1:2], 0.25), dropped_[1:2])


@given(st.integers(0, 2**62 - 1), st.floats(0.05, 0.95))
def test_dropout_rate_matches_the_configuration_everywhere(draw: int, rate: float) -> None:
    outputs = seeded_dropout(torch.ones(2, 64, 16, 16), torch.tensor([draw, (draw + 1) % 2**62]), rate) != 0
    size = outputs[0].numel()
    spread = 5 * (rate * (1 - rate) / size) ** 0.5
    assert abs(outputs[0].float().mean().item() - (1 - rate)) < spread
    # Neighbours know nothing of each other, be they positions, channels or images.
    values = outputs.float() - outputs.float().mean()
    for one, other in ((values[0], values[1]), (values[0, 1:], values[0, :-1]), (values[0, :, 1:], values[0, :, :-1])):
        assert abs((one * other).mean().item()) < 5 * rate * (1 - rate) / one.numel() ** 0.5


def test_layers_drop_different_values_and_sampling_drops_none() -> None:
    config = ModelConfig(width=16, channel_mult=(1,), blocks=2, attention=(), patch=1, dropout=0.5)
    network = UNet(config, 1, 8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, time, masks = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), []
    for block in network.down:
        block.conv2.register_forward_hook(lambda _module, inputs, _out: masks.append(inputs[0] == 0))
    out = network(x, time, draws=torch.tensor([5, 6]))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(out, network(x, time))
    assert torch.equal(network(x, time), network(x, time))


def test_computing_again_instead_of_keeping_changes_no_gradient() -> None:
    config = ModelConfig(width=16, channel_mult=(1, 2), blocks=1, attention=(1,), patch=1, dropout=0.1)
    network = UNet(config, 1, 8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, time, draws = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([5, 6])
    gradients = []
    for network.gradient_checkpointing in (False, True):
        loss = network(x, time, draws=draws).square().sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True) if one is not None)


LARGE = {"width": 240, "channel_mult": (1, 2, 3, 4), "blocks": 2, "attention": (3,), "heads": 8, "patch": 4}


@pytest.mark.parametrize(
    ("million", "channels", "size", "shape"),
    [
        (0.18, 1, 8, {"width": 16, "channel_mult": (1, 2), "patch": 2}),
        (0.69, 1, 32, {}),
        (0.97, 3, 64, {}),
        (
            313,
            3,
            256,
            {"width": 240, "channel_mult": (1, 2, 3, 4), "blocks": 2, "attention": (3,), "heads": 8, "patch": 4},
        ),
    ],
)
def test_one_configuration_reaches_from_small_networks_to_large_ones(
    million: float, channels: int, size: int, shape: dict[str, Any]
) -> None:
    with torch.device("meta"):
        network = UNet(ModelConfig(**shape), channels, size)
        x = torch.empty(2, channels, size, size)
        assert network(x, torch.zeros(2)).shape == x.shape
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(million, rel=0.02)
