"""Make, merge and check the indexes of shards that exist: `iomm shard index`, `iomm shard check`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from iomm.data import stores
from iomm.data.index import Index, ShardIndex, write_index
from iomm.data.inspection import Inspected, Item, Limits, Place, inspect_all
from iomm.data.staleness import is_stale
from iomm.data.stores import INDEX_SUFFIX
from iomm.data.tar_members import SampleRef, scan

_UNREAD = "0" * 32  # content hash of an image that was not read


@dataclass(frozen=True, slots=True)
class Indexed:
    """What indexing one shard came to."""

    images: int
    bad: Sequence[SampleRef]  # of them, those that do not decode, with reasons
    renewed: bool  # False: the index was there and fits the shard


def index_shard(
    shard: str,
    *,
    limits: Limits | None = None,
    processes: int = 1,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Indexed:
    """Write SHARD.index beside a shard, unless there is one that fits.

    What a stale index says of an image is kept where the image's bytes are the same: they are hashed again,
    not decoded.

    Args:
        shard: path of a tar file that `ShardSet.open` takes.
        force: test-decode every image, and write even if there is an index that fits.
        on_progress: told of the images done, of how many.

    Raises:
        ValueError: the shard is damaged as in `scan`, or changed meanwhile.
        OSError: it cannot be read, or the index not written.
    """
    path, stamp = shard + INDEX_SUFFIX, stores.stamp(shard)
    old = None if force else _open_old(path)
    if old is not None and not is_stale(old.shards[0].stamp, stamp):
        bad_numbers = np.flatnonzero(old.shard(0).records_N["reason_bytes"])
        return Indexed(old.shards[0].images, [old.sample(0, int(j)) for j in bad_numbers], False)
    samples = scan(shard)
    known = {} if old is None else _known(old)
    items = [_item(sample, known.get((sample.key, sample.image_size))) for sample in samples]
    found: list[SampleRef] = []
    for sample, entry in zip(
        samples,
        inspect_all(items, limits or Limits(), processes=processes, keep_data=False),
        strict=True,
    ):
        assert isinstance(entry, Inspected)
        found.append(
            replace(
                sample,
                content_hash=entry.content_hash or _UNREAD,
                size_px=entry.size_px,
                reason=entry.reason,
            )
        )
        on_progress(len(found), len(items))
    if stores.stamp(shard) != stamp:
        raise ValueError(f"{shard} changed while it was indexed. Wait until it is whole, and index it again.")
    write_index(path, [ShardIndex.build(shard.rpartition("/")[2], stamp, found)])
    return Indexed(len(found), [sample for sample in found if sample.reason is not None], True)


def _item(sample: SampleRef, known: SampleRef | None) -> Item:
    place = Place(sample.shard, sample.image_offset, sample.image_size)
    return Item(f"{sample.shard}: {sample.key}", sample.key, place, known=known)


def _open_old(path: str) -> Index | None:
    """An index to renew; None if there is none, or it is damaged and has to be made from nothing."""
    if path not in stores.stamps([path]):
        return None
    try:
        index = Index.open(path)
        index.shard(0)
    except (ValueError, IndexError):
        return None
    return index


def _known(old: Index) -> dict[tuple[str, int], SampleRef]:
    samples = (old.sample(0, j) for j in range(old.shards[0].images))
    return {(sample.key, sample.image_size): sample for sample in samples}


def merge_indexes(paths: Sequence[str], output: str) -> None:
    """One index of all the shards that some indexes describe.

    Raises:
        OSError, ValueError: an index is missing or damaged, two have a shard in common, or the output cannot
            be written.
    """
    indexes = [Index.open(path) for path in paths]
    stores.refuse_twice([path for index in indexes for path in index.paths], paths)
    folder = stores.folder_of(output)

    def shards() -> Iterator[ShardIndex]:
        for index in indexes:
            for k, path in enumerate(index.paths):
                yield replace(index.shard(k), name=stores.seen_from(folder, path))

    write_index(output, shards())


def check_shard(index: Index, k: int, *, processes: int = 1, limits: Limits | None = None) -> list[str]:
    """What is wrong with the k-th shard of an index, or between the two; empty if nothing is.

    Everything is read: headers, and every image's bytes, against their hash.
    """
    path = index.paths[k]
    try:
        if is_stale(index.shards[k].stamp, stores.stamp(path)):
            return [f"the index is stale (size or time differ). Renew it: {index.renewal()}"]
        index.shard(k)
        indexed = [index.sample(k, j) for j in range(index.shards[k].images)]
        scanned = scan(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    bare = [replace(sample, content_hash=None, size_px=None, reason=None) for sample in indexed]
    if bare != scanned:
        differing = sum(a != b for a, b in zip(bare, scanned, strict=False))
        return [
            f"the index lists {len(bare)} samples, the shard {len(scanned)}; {differing} of those both have "
            f"lie elsewhere. Renew it: {index.renewal()}"
        ]
    items = (_item(sample, sample) for sample in indexed)
    found = inspect_all(items, limits or Limits(), processes=processes, keep_data=False)
    return [
        f"sample {sample.key!r}: its bytes are not those that were indexed"
        for sample, entry in zip(indexed, found, strict=True)
        if isinstance(entry, Inspected) and (entry.content_hash or _UNREAD) != sample.content_hash
    ]
