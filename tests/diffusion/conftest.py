"""What tests of the science start from besides."""

import pytest

from tests.builders.captioned import FakeEncoder


@pytest.fixture
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    """Reads captions and prompts instead of the real encoder."""
    encoder = FakeEncoder()
    monkeypatch.setattr("diffusion.families.text_encoder.encoder", lambda: encoder)
    return encoder
