"""The key figures of a version of a data set."""

from diffusion.config import Config
from diffusion.data.config import StorageConfig
from diffusion.escaping import escape_markdown
from diffusion.evaluation.dataset_report.drift import Drift
from diffusion.evaluation.pages import counted, plain, share, signed, storage


class DatasetSummary(Config):
    """The key figures of a version."""

    name: str
    digest: str
    """Name of the version: the digest of its manifest."""
    content_digest: str
    parent: str | None
    """Digest of the version that this one was made from; None for the first."""
    change: str
    """What made this version of its parent."""
    kept: int
    train: int
    held_out: int
    added: int | None
    """Kept pictures that the parent lacks; None: there is no parent, or it is no longer here."""
    lost: int | None
    """Pictures of the parent that are no longer kept; None as above."""
    duplicates: int
    """Files whose pixels were there already."""
    contradicted: int
    """Of these, files with another label or caption."""
    quarantined: int
    """Files that stand refused."""
    removed: int
    """Records of what was taken down, in this version and before."""
    near_groups: int | None
    """Groups of near-copies; None: they were not looked for."""
    near_copies: int | None
    """Pictures in them."""
    classes: int
    captioned: int
    """Kept pictures that have a caption."""
    channels: int
    size: int
    """Height and width of every picture, in pixels."""
    storage: StorageConfig
    shards: int
    bytes: int
    """Of all files of this version but its manifest."""
    verdict: str
    """Whether the new pictures look like the parent's, in words."""
    drift: Drift | None
    """None: there is too little to compare."""

    def metrics(self) -> dict[str, float]:
        """The figures that are numbers, flat and under names that say what they are."""
        numbers = self.model_dump(exclude={"storage", "drift"})
        found = {f"dataset_{name}": float(value) for name, value in numbers.items() if isinstance(value, int)}
        if self.drift is not None:
            figures = self.drift.model_dump(exclude={"extractor", "compared"})
            found |= {f"drift_{name}_{self.drift.extractor}": value for name, value in figures.items()}
            found["drift_compared"] = float(self.drift.compared)
        return found

    def markdown(self) -> str:
        """The figures as a table in Markdown, every text escaped."""
        lines = [
            ("Version", f"`{self.digest}`"),
            ("Content", f"`{self.content_digest}`"),
            ("Made", f"by {escape_markdown(self.change)} from " + (f"`{self.parent}`" if self.parent else "nothing")),
            ("Pictures", f"{self.kept:,}: {self.train:,} to train on, {self.held_out:,} held out"),
        ]
        if self.added is not None:
            lines.append(("Against the parent", f"{self.added:,} new, {self.lost or 0:,} gone"))
        lines += [
            ("Duplicates left out", f"{self.duplicates:,}"),
            ("In quarantine", f"{self.quarantined:,}"),
            ("Taken down", f"{self.removed:,}"),
        ]
        if self.near_groups is not None and self.near_copies is not None:
            lines.append(("Near-copies", f"{self.near_copies:,} in {counted(self.near_groups, 'group')}"))
        lines += [
            ("Classes", f"{self.classes:,}"),
            ("With a caption", share(self.captioned, self.kept)),
            ("Stored as", f"{self.size}×{self.size}, {'RGB' if self.channels == 3 else 'grey'}"),
            ("Files", f"{storage(self.bytes)} with {counted(self.shards, 'shard')}"),
        ]
        if self.drift is not None:
            found = self.drift
            lines += [
                ("KID", f"{signed(found.kid)}, where chance alone reaches {signed(found.kid_chance)}"),
                ("Fréchet distance", f"{plain(found.fd)}, floor {plain(found.fd_floor)}"),
                ("Told apart", f"{found.told_apart:.1%}, floor {found.told_apart_floor:.1%}"),
            ]
        table = "\n".join(f"| {name} | {value} |" for name, value in lines)
        return f"# Data set {escape_markdown(self.name)}\n\n{self.verdict}\n\n| | |\n|---|---|\n{table}\n"
