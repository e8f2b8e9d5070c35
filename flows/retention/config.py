"""How long what is kept: the section ``retention``."""

from datetime import timedelta

from pydantic import Field

from diffusion.config import Config


class RetentionConfig(Config):
    """What ``darkroom gc`` leaves, besides all that a registered model version, the ledger or a kept batch leads to."""

    grace_hours: float = Field(24, ge=0)
    """Hours between the step in which something is set aside and the one in which its content goes, and for which
    whoever pushes a data set holds that up. More than the longest ingest takes; 0 only where nothing else runs."""
    data_versions: int = Field(10, ge=1)
    """The newest versions of each data set stay."""
    data_days: float = Field(90, ge=0)
    """Versions of a data set recorded within so many days stay."""
    run_days: float | None = Field(90, ge=0)
    """Runs that MLflow has heard of within so many days stay, here and there; null: all."""
    prints_days: float | None = Field(None, ge=0)
    """Finished batches of prints written within so many days stay, with their version's run and data; null: all."""
    unfinished_days: float = Field(7, ge=0)
    """Batches of prints, and uploads in parts, that have no end and to which nothing was added for so many days go."""
    cache_days: float | None = Field(30, ge=0)
    """Fetched shards and weights not used on this machine for so many days go; null: none."""

    @property
    def grace(self) -> timedelta:
        """``grace_hours`` as a span of time."""
        return timedelta(hours=self.grace_hours)
