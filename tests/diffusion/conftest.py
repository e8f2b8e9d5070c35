"""What tests of the science start from besides."""

import pytest

from tests.builders.captioned import FakeEncoder


@pytest.fixture
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    """Reads captions and prompts instead of the real encoder."""
    encoder = FakeEncoder()
    for module in ("diffusion.families.text_encoder", "diffusion.families.model"):
        monkeypatch.setattr(f"{module}.encoder", lambda: encoder)
    return encoder
