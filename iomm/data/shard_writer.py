"""Pack images into shards: `iomm shard make`.

    sources -> test decode on several processes -> no duplicates, fit keys -> shard-000000.tar, .index, ...
                                                \\-> quarantine.jsonl: what was left out, and why

One writer takes the results in the order of the sources, so the shards are the same whatever the number of
processes. State is kept by whole shards: a run that was stopped goes on behind its last finished shard. The
hashes of all images are in memory, about 120 MB a million images.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from iomm.data import stores
from iomm.data.index import Index, ShardIndex, write_index
from iomm.data.indexer import merge_indexes
from iomm.data.inspection import Inspected, Item, Limits, Rejected, inspect_all
from iomm.data.sources import Source
from iomm.data.stores import INDEX_SUFFIX
from iomm.data.tar_members import CAPTION_SUFFIX, CAPTIONS_SUFFIX, SampleRef

STATE, QUARANTINE, SET_INDEX = "make.json", "quarantine.jsonl", "set.index"
MAX_KEY = 64  # characters; a tar header holds 100 bytes of a name
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """How shards are packed."""

    shard_bytes: int = 1_000_000_000  # of images and captions; a shard is closed when it has as many
    shard_images: int = 10_000
    processes: int = 1
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What was done so far, by whole shards in the state file."""

    shards: int = 0
    images: int = 0
    captions: int = 0
    duplicates: int = 0
    rejected: int = 0  # images and other entries that could not be used
    bad_captions: int = 0  # images that were kept without theirs
    source: int = 0  # the one in work
    entries: int = 0  # of that source that are done
    quarantine_bytes: int = 0
    done: bool = False


def make_shards(
    sources: Sequence[Source],
    folder: Path,
    options: MakeOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Pack all images of the sources, going on where an earlier call was stopped.

    Args:
        sources: in the order in which they are packed.
        folder: of the shards, created; one that holds shards of another make is refused.
        options: sizes and limits.
        on_progress: told of the state after every image.

    Raises:
        ValueError: the folder is another make's, or in use; the sources or options are not those that it was
            begun with.
        OSError: a source cannot be listed, or a shard cannot be written.
    """
    options = options or MakeOptions()
    if min(options.shard_bytes, options.shard_images) < 1:
        raise ValueError(
            f"shards of {options.shard_bytes} bytes and {options.shard_images} images: both must be at least "
            "1."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        job = _job(sources, options)
        begun = _begun(folder, job)
        if begun.done:
            return begun
        with closing(_Packer(folder, options, job, begun)) as packer:
            entries = packer.entries(sources)
            work = inspect_all(entries, options.limits, processes=options.processes, keep_data=True)
            with closing(work) as found:
                for entry in found:
                    packer.take(entry)
                    on_progress(packer.now)
            return packer.finish()


class _Packer:
    """The shard in work, and all that is remembered of those before it."""

    def __init__(self, folder: Path, options: MakeOptions, job: dict[str, object], begun: Progress) -> None:
        self._folder, self._options, self._job = folder, options, job
        self.now = begun
        self._seen: set[bytes] = set()
        for k in range(begun.shards):
            shard = Index.open(self._path(k) + INDEX_SUFFIX).shard(0)
            self._seen.update(shard.records_N["content_hash"].tolist())
        for unfinished in folder.glob("*.part"):  # of a run that was killed
            unfinished.unlink()
        quarantine = folder / QUARANTINE
        quarantine.touch()
        if (size := quarantine.stat().st_size) < begun.quarantine_bytes:
            raise ValueError(_damaged(quarantine, f"it has {size} of its {begun.quarantine_bytes} bytes"))
        os.truncate(quarantine, begun.quarantine_bytes)
        self._quarantine = open(folder / QUARANTINE, "ab")  # noqa: SIM115 - closed by close
        self._tar = _ShardFile(self._path(begun.shards))
        self._places: deque[tuple[int, int]] = deque()  # of entries in work: source, number in it

    def _path(self, k: int) -> str:
        return str(self._folder / f"shard-{k:06}.tar")

    def entries(self, sources: Sequence[Source]) -> Iterator[Item | Rejected]:
        """What is left to do of the sources."""
        first, start = self.now.source, self.now.entries
        for s in range(first, len(sources)):
            done = start if s == first else 0
            for n, entry in enumerate(sources[s].items(done), done + 1):
                self._places.append((s, n))
                yield entry

    def take(self, entry: Inspected | Rejected) -> None:
        """File the next of the entries: into the shard, or among what was left out."""
        source, entries = self._places.popleft()
        self.now = replace(self.now, source=source, entries=entries)
        if isinstance(entry, Rejected):
            self._reject(entry.name, entry.reason)
            return
        if entry.reason is not None:
            self._reject(entry.item.name, entry.reason)
            return
        digest = bytes.fromhex(entry.content_hash)
        if digest in self._seen:
            self._say(entry.item.name, "the same bytes as an image before it")
            self.now = replace(self.now, duplicates=self.now.duplicates + 1)
            return
        self._seen.add(digest)
        if entry.caption_reason is not None:
            self._say(entry.item.name, f"kept without its caption: {entry.caption_reason}")
            self.now = replace(self.now, bad_captions=self.now.bad_captions + 1)
        self._tar.add(entry)
        self.now = replace(
            self.now, images=self.now.images + 1, captions=self.now.captions + bool(entry.captions)
        )
        full = self._tar.size_bytes >= self._options.shard_bytes
        if full or len(self._tar.samples) >= self._options.shard_images:
            self._close_shard()

    def finish(self) -> Progress:
        """Close the last shard and write the index of all of them."""
        if self._tar.samples:
            self._close_shard()
        paths = [self._path(k) for k in range(self.now.shards)]
        if paths:
            merge_indexes([path + INDEX_SUFFIX for path in paths], str(self._folder / SET_INDEX))
        self.now = replace(self.now, done=True)
        self._save()
        return self.now

    def close(self) -> None:
        """Drop what belongs to no finished shard."""
        self._tar.discard()
        self._quarantine.close()

    def _close_shard(self) -> None:
        self._tar.close()
        self.now = replace(self.now, shards=self.now.shards + 1)
        self._save()
        self._tar = _ShardFile(self._path(self.now.shards))

    def _save(self) -> None:
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        self.now = replace(self.now, quarantine_bytes=self._quarantine.tell())
        state = {"job": self._job, "progress": asdict(self.now)}
        state["crc32"] = _state_crc(state)
        stores.write_whole(str(self._folder / STATE), json.dumps(state, indent=1).encode())

    def _reject(self, name: str, reason: str) -> None:
        self._say(name, reason)
        self.now = replace(self.now, rejected=self.now.rejected + 1)

    def _say(self, name: str, reason: str) -> None:
        self._quarantine.write(json.dumps({"sample": name, "reason": reason}).encode() + b"\n")


class _ShardFile:
    """A shard being written: under another name until it is whole."""

    def __init__(self, path: str) -> None:
        self._path, self._part = path, f"{path}.part"
        self._file = open(self._part, "wb")  # noqa: SIM115 - closed by close or discard
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples: list[SampleRef] = []
        self.size_bytes = 0
        self._keys: set[str] = set()

    def add(self, found: Inspected) -> None:
        """Append an image and its caption, under a key that is new in this shard."""
        wanted = fit_key(found.item.key)
        key = next(k for k in itertools.chain([wanted], _numbered(wanted)) if k not in self._keys)
        self._keys.add(key)
        image = self._append(f"{key}.{found.suffix}", found.data)
        caption, several = (None, None), len(found.captions) > 1
        if several:
            texts = json.dumps(found.captions, ensure_ascii=False)
            caption = self._append(f"{key}.{CAPTIONS_SUFFIX}", texts.encode("utf-8", "replace"))
        elif found.captions:
            caption = self._append(f"{key}.{CAPTION_SUFFIX}", found.captions[0].encode("utf-8", "replace"))
        self.samples.append(
            SampleRef(self._path, key, *image, *caption, found.content_hash, found.size_px, None, several)
        )

    def _append(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self._tar.offset + _BLOCK
        self._tar.addfile(info, io.BytesIO(data))
        self.size_bytes += len(data)
        return offset, len(data)

    def close(self) -> None:
        """Put the shard and its index in place."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)
        stamp = stores.stamps([self._path])[self._path]
        write_index(self._path + INDEX_SUFFIX, [ShardIndex.build(Path(self._path).name, stamp, self.samples)])

    def discard(self) -> None:
        """Drop an unfinished shard."""
        self._file.close()
        Path(self._part).unlink(missing_ok=True)


def fit_key(name: str) -> str:
    """A name as the key of a sample: flat, of letters, digits, '_' and '-', at most `MAX_KEY` characters and
    80 bytes. What is too long ends in a hash of the whole name."""
    key = re.sub(r"[^\w-]+", "_", name).strip("_") or "image"
    if len(key) <= MAX_KEY and len(key.encode()) <= 80:
        return key
    tail = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    cut = key.encode()[: MAX_KEY - 13].decode("utf-8", "ignore")
    return f"{cut}-{tail}"


def _numbered(key: str) -> Iterator[str]:
    return (f"{key}-{n}" for n in itertools.count(2))


def _job(sources: Sequence[Source], options: MakeOptions) -> dict[str, object]:
    """What must not change between the runs of one make."""
    return {
        "sources": [[source.path, source.fingerprint()] for source in sources],
        "options": {k: v for k, v in asdict(options).items() if k != "processes"},
    }


def _begun(folder: Path, job: dict[str, object]) -> Progress:
    """How far an earlier call came.

    Raises:
        ValueError: it was another make, or its state is damaged.
    """
    path = folder / STATE
    if not path.exists():
        if found := next(folder.glob("*.tar"), None):
            raise ValueError(
                f"{folder} holds {found.name}, which no `iomm shard make` of this folder wrote. Name a new "
                "folder with -o."
            )
        return Progress()
    try:
        state = json.loads(path.read_bytes())
        whole = state.pop("crc32") == _state_crc(state)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from error
    if not whole:
        raise ValueError(_damaged(path, "it does not match its checksum"))
    if state["job"] != json.loads(json.dumps(job)):
        raise ValueError(
            f"{folder} was begun from other sources or with other options: {json.dumps(state['job'])}; now: "
            f"{json.dumps(job)}. Give those again to go on, or name a new folder with -o."
        )
    return Progress(**state["progress"])


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is being written by another `iomm shard make`. Wait for it."
            ) from error
        yield


def _state_crc(state: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path}: damaged: {what}. How far the make came is not known: begin again in a new folder, or empty "
        "this one."
    )
