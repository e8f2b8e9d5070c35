"""Takedown records."""

from diffusion.data.versions.takedown_records import Removal

REMOVAL = Removal(
    image_keys=["0" * 64],
    digests=["1" * 64],
    images=1,
    duplicates=0,
    refused=0,
    near_copies=[],
    parts=[0],
    dataset="blobs",
    request_digest="6" * 16,
    reason="consent withdrawn",
    parent="2" * 64,
    version="3" * 64,
    content_digest="4" * 64,
    tables=[],
    already=False,
)
