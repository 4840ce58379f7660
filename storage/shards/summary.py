"""What the shards were made from, for people."""

from collections.abc import Iterator

from storage.archives.account import shown
from storage.shards.shard import ShardManifest

_SHOWN = 10  # classes that are named


def summary(shards: ShardManifest) -> Iterator[tuple[str, str]]:
    """Images and classes of each split, what was left out or passed over, and how the archive was understood.

    Yields:
        The name of a split, empty where it is that of the line before, and one line about it.
    """
    count = len(shards.class_names)
    names = [*map(shown, shards.class_names[:_SHOWN]), *(["..."] if count > _SHOWN else [])]
    classes = f"{count:,} classes: {', '.join(names)}"
    for name, split in shards.splits.items():
        yield name, f"{split.count:,} images, {classes}"
        left_out = [item for item in shards.unreadable if item.split == name]
        if left_out:
            yield "", f"left out: {len(left_out):,} unreadable (first: {shown(left_out[0].name)}: {left_out[0].reason})"
        if name in shards.account:
            yield from (("", line) for line in shards.account[name].lines())
