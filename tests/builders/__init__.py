"""What tests start from: small data sets and models, hostile files, servers and workspaces."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
