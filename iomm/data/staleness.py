"""Whether shards are still the files that were indexed."""

from collections.abc import Sequence

from iomm.data import stores
from iomm.data.index import Index
from iomm.data.stores import Stamp


class StaleIndex(ValueError):
    """A shard is not the one that was indexed."""


def refuse_stale(indexes: Sequence[Index]) -> None:
    """Compare every indexed shard with the file that lies there now.

    Raises:
        FileNotFoundError: a shard is not there.
        StaleIndex: a shard's size, or its time where it is a local file, is not the one indexed.
    """
    now = stores.stamps([path for index in indexes for path in index.paths])
    for index in indexes:
        for path, shard in zip(index.paths, index.shards, strict=True):
            if path not in now:
                raise FileNotFoundError(
                    f"{path}: no such shard, but {index.path} lists it. Put it back, or renew the index: "
                    f"{index.renewal()}"
                )
            if is_stale(shard.stamp, now[path]):
                same_size = shard.stamp.size_bytes == now[path].size_bytes
                hint = ". If it is a copy: cp -a and rsync -a keep the time" if same_size else ""
                raise StaleIndex(
                    f"{path}: its index {index.path} is stale: made for {_describe(shard.stamp)}, the shard "
                    f"has {_describe(now[path])}. Renew it: {index.renewal()}{hint}"
                )


def is_stale(indexed: Stamp, found: Stamp) -> bool:
    """Whether a shard is another file than the one indexed. Where one of the two lies in a store, only sizes
    tell: an upload has a time of its own."""
    timed = indexed.mtime_ns and found.mtime_ns
    return indexed.size_bytes != found.size_bytes or bool(timed and indexed.mtime_ns != found.mtime_ns)


def _describe(stamp: Stamp) -> str:
    when = f" of time {stamp.mtime_ns} ns" if stamp.mtime_ns else ""
    return f"{stamp.size_bytes} bytes{when}"
