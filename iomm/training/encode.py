"""Fill the feature cache before training, on all ranks there are: `iomm shard encode`.

The samples of a source are dealt to ranks in stretches of neighbours, so what lies together in a shard lies
together in a feature shard. What the cache has already is skipped, unread where there is an index. That is
all that is remembered, so a run that was stopped goes on, with any number of ranks.

Images are encoded in the view that training shows them in at its final size, with `data.flip` mirrored as
well. Whatever else training meets (the smaller sizes of `data.progression`, held-out images) it keeps itself.
"""

import dataclasses
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from iomm.config import Config, ParallelConfig
from iomm.data.batch import Batch, Sample
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader
from iomm.data.mixture import Kind
from iomm.data.shard_command import bar, say
from iomm.encoders import Encoders
from iomm.parallel.mesh import Mesh, start

STRETCH = 1024  # neighbouring samples of a rank, at most
_SHOWN = 20  # unusable samples


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one rank found and did."""

    rank: int
    ranks: int
    samples: int  # of the sources, dealt to this rank
    encoded: int  # images, mirrored ones counted apart; the others were there
    bad: tuple[BadSampleReport, ...]


def run(config: Config) -> int:
    """`iomm shard encode`: encode, and print what came of it. Raises as `encode_shards`."""
    started, show = time.perf_counter(), os.environ.get("RANK", "0") == "0"
    # Asked to stop, as if interrupted: what is encoded is written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with bar("encoding", 1.0, shown=show) as update:
            tally = encode_shards(
                config, on_progress=lambda done, of: update(done / of, f"{done} of this rank's {of} samples")
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    minutes = (time.perf_counter() - started) / 60
    who = f"rank {tally.rank} of {tally.ranks}: " if tally.ranks > 1 else ""
    lines = [
        f"{who}{tally.encoded} images encoded in {minutes:.1f} min, of {tally.samples} samples; the others "
        f"were there, or cannot be used ({len(tally.bad)})",
        *(f"  {report}" for report in tally.bad[:_SHOWN]),
        *([f"  and {len(tally.bad) - _SHOWN} more"] if len(tally.bad) > _SHOWN else []),
    ]
    say("".join(f"{line}\n" for line in lines))
    return 0


def encode_shards(
    config: Config,
    *,
    stretch: int = STRETCH,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Tally:
    """Encode all samples that training on `config` draws from; each rank its part, waiting for no other.

    Args:
        stretch: neighbouring samples that a rank takes together.
        on_progress: told of this rank's samples that are done, of how many.

    Raises:
        ValueError: no `data.cache_dir`; settings or shards that do not fit.
        FileNotFoundError: no such shards.
        OSError: the cache cannot be written (a full disk).
    """
    if config.data.cache_dir is None:
        raise ValueError("data.cache_dir is null: there is nowhere to keep features. Name a folder with it.")
    mesh = start(ParallelConfig())
    encoders = Encoders(config, mesh.device)
    bad: list[BadSampleReport] = []
    token_px, tokenize = encoders.codec.token_px, encoders.mllm.tokenize
    loader = Loader.of_run(config, on_bad=bad.append, token_px=token_px, tokenize=tokenize)
    kinds: tuple[Kind, ...] = ("image", "pair")
    mine: dict[Kind, list[range]] = {
        kind: list(_stretches(loader.size(kind), mesh, stretch)) for kind in kinds
    }
    total = sum(len(numbers) for stretches in mine.values() for numbers in stretches)
    done = encoded = 0
    for kind, stretches in mine.items():
        try:
            for numbers in stretches:
                for batch in _batches(loader, encoders, config, kind, numbers):
                    encoded += encoders.keep(batch)
                done += len(numbers)
                on_progress(done, total)
        finally:  # also what was encoded before an error or an interrupt
            encoders.flush_caches()  # pairs often are images too, which other ranks encoded
    return Tally(
        rank=mesh.rank, ranks=mesh.world_size, samples=total, encoded=encoded, bad=tuple(dict.fromkeys(bad))
    )


def _stretches(samples: int, mesh: Mesh, stretch: int) -> Iterator[range]:
    """This rank's sample numbers of a source."""
    stretch = max(1, min(stretch, -(-samples // mesh.world_size)))  # a small source is for all ranks too
    for first in range(mesh.rank * stretch, samples, mesh.world_size * stretch):
        yield range(first, min(first + stretch, samples))


def _batches(
    loader: Loader, encoders: Encoders, config: Config, kind: Kind, numbers: Sequence[int]
) -> Iterator[Batch]:
    """The samples that the cache lacks, of one size in a batch, decoded ahead by threads."""

    def lacking(number: int) -> bool:
        shown = loader.shown(kind, number)
        if shown is None:
            return True
        content_hash, view = shown
        views = [view, dataclasses.replace(view, flip=True)] if config.data.flip else [view]
        return any(encoders.lacks(content_hash, view, captioned=kind == "pair") for view in views)

    wanted = list(filter(lacking, numbers))
    size, threads = config.train.micro_batch_images, config.data.decode_threads
    with ThreadPoolExecutor(threads, thread_name_prefix="iomm-decode") as pool:
        pending: deque[Future[list[Sample | None]]] = deque()
        for first in range(0, len(wanted), size):
            pending.append(pool.submit(loader.numbered, kind, wanted[first : first + size]))
            if len(pending) > threads:
                yield from _stacked(pending.popleft().result(), config.data.flip)
        while pending:
            yield from _stacked(pending.popleft().result(), config.data.flip)


def _stacked(samples: Sequence[Sample | None], flip: bool) -> Iterator[Batch]:
    by_size: dict[tuple[int, ...], list[Sample]] = {}
    for sample in filter(None, samples):
        by_size.setdefault(tuple(sample.image_CHW.shape), []).append(sample)
    for alike in by_size.values():
        batch = Batch.stack(alike)
        yield batch
        if flip:
            mirrored = tuple(dataclasses.replace(view, flip=True) for view in batch.views)
            yield dataclasses.replace(batch, image_BCHW=batch.image_BCHW.flip(-1), views=mirrored)
