"""What tests of the science start from besides."""

import pytest

from tests.builders.captioned import MadeUp


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Reads captions and prompts instead of the real encoder."""
    encoder = MadeUp()
    for module in ("diffusion.data.caption_embeddings", "diffusion.generation.generate"):
        monkeypatch.setattr(f"{module}.encoder", lambda: encoder)
    return encoder
