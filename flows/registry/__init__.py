"""The model registry: versions, the ledger of champions, aliases, model card."""
