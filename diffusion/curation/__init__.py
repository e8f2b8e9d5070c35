"""Curation: measures images, finds near-duplicates, and drops by rules what training should not see."""
