"""New masks of images that a data set has: written to their shards and records, which are otherwise as they were."""

from pathlib import Path

from diffusion.data.ingest.merge import NEW_MASK, Merge, copy_samples, rewrite_part
from diffusion.data.manifest import MASK, MASK_SIZE, STORED, find_intact, read_records
from diffusion.data.shards import mask_offset


def replace_masks(merge: Merge) -> int:
    """Replace the masks of images that came again under their own name with another one; returns how many."""
    count, folder, index = 0, merge.folder, merge.index
    for place, part in enumerate(merge.parts):
        if part.shard is None or not index.has_new_masks:
            continue
        rows, changed = read_records(folder, part).to_pylist(), 0
        stored_rows = [row for row in rows if row["outcome"] in STORED]
        for row in stored_rows:
            if (new_mask := index.take_new_mask(row["key"], row["source"])) is None:
                continue
            mask, (path, offset, size, mask_size) = new_mask
            with Path(path).open("rb") as shard:
                shard.seek(mask_offset(offset, size))
                row |= {MASK.name: mask, MASK_SIZE.name: mask_size, NEW_MASK: shard.read(mask_size or 0)}
            index.describe(row)
            changed += 1
        if changed:
            new_shard = copy_samples(folder, part.number, [(find_intact(folder, part.shard), stored_rows)])
            merge.parts[place] = rewrite_part(folder, part, rows, merge.config.size, new_shard)
        count += changed
    # The masks of copies under other names.
    merge.relabelled += index.forget_new_masks()
    return count
