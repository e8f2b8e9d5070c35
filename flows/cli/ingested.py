"""What an ingest says at its end."""

from diffusion.data.ingest import IngestResult

REFUSED_SHOWN = 20
SIDECARS = {".json", ".cls", ".txt"}
"""Files beside the pictures of a WebDataset shard."""


def told(result: IngestResult, source: str) -> list[str]:
    """The data set after an ingest of ``source``, and what did not become part of it."""
    lines = [
        f"{result.kept:,} pictures in {result.folder} ({result.added:,} new), {result.duplicates:,} duplicates, "
        f"{result.quarantined_count:,} refused"
    ]
    shown = result.quarantined[:REFUSED_SHOWN]
    lines += [f"  refused: {each.source}: {each.reason}" for each in shown]
    if (more := result.quarantined_count - len(shown)) > 0:
        lines.append(f"  … and {more:,} more: darkroom data show --dataset {result.dataset} --all")
    if result.removed:
        lines.append(f"left out: {result.removed:,} that were taken down before")
    if result.relabelled:
        lines.append(f"there already, with another label or caption, which stays: {result.relabelled:,}")
    if result.passed_over:
        ends = [f"{count:,} {end or 'without extension'}" for end, count in result.passed_over.items()]
        lines.append(f"passed over, not named like pictures: {', '.join(ends[:5])}{' …' if len(ends) > 5 else ''}")
        if result.passed_over.keys() & SIDECARS and ".tar" in source and not source.startswith("wds:"):
            lines.append(f"  if it is a WebDataset, wds:{source} reads labels and captions from them")
    return lines
