"""What tests start from: small data sets and models, hostile files, servers and workspaces."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
NO_BARS = {"first_version": False}
"""Settings of a gate that lets any first version through which copies nothing."""
HEADLINE_ALONE = dict.fromkeys(("recall_loss", "memorized", "cost"))
"""Settings of a gate whose only rule is the headline."""
