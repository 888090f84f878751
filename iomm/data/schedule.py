"""What stands at a global sample index: kind, image, size, crop, flip, caption. Closed form: nothing is read.

    index -> resolution, by its step                                 (data.progression)
          -> bucket, by its block, and the index within the bucket   (data.buckets)
          -> mixture: image or pair, and its position there
          -> epoch = position // n, place = shuffled(position % n; seed, epoch), image = the bucket's place-th

Without buckets there is one, which holds everything. Each part is a pure function of the settings, the seed
and the index, so no rank, thread, prefetch depth or micro-batch size can change what is trained on.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from iomm.config import DataConfig
from iomm.data.buckets import Dealing, Members, Size, period_blocks, size_table, sizes_at
from iomm.data.mixture import Kind, draw
from iomm.data.order import shuffled
from iomm.data.shards import ShardSet
from iomm.data.view import View
from iomm.random import Stream, words_of

_PAIR_ORDER = 0x9E3779B9  # sets the order of pairs apart from that of images, which often are the same shards
_BUCKET_ORDER = 0xD1342543DE82EF95  # and those of the buckets


@dataclass(frozen=True, slots=True)
class Slot:
    """The part of an index that does not depend on which samples are readable."""

    kind: Kind
    bucket: int
    position: int  # in the endless order of this kind's images of this bucket


class Schedule:
    """Settings, seed and the sources' sizes, made into a function of the index.

    Args:
        data: the settings.
        seed: of orders and draws.
        sources: by kind, those that the mix ratio draws from.
        global_batch_images: samples of a step; needed for a progression, and the default block of buckets.
        token_px: pixels a side of a latent token; needed for buckets.

    Raises:
        ValueError: something needed is missing: one of these numbers, an index, whole tokens.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        sources: Mapping[Kind, ShardSet],
        *,
        global_batch_images: int | None = None,
        token_px: int | None = None,
    ) -> None:
        self._data, self._seed = data, seed
        self._totals = {kind: len(source) for kind, source in sources.items()}
        stages = data.progression or ((0, data.image_px),)
        if len(stages) > 1 and global_batch_images is None:
            raise ValueError("data.progression counts steps: the loader needs the global batch size.")
        self._from_index = [step * (global_batch_images or 0) for step, _ in stages]
        self._block_images: int | None = None
        self._members: dict[Kind, Members] = {}
        if not data.buckets:
            self._sizes: list[tuple[Size, ...]] = [((px, px),) for _, px in stages]
            return
        self._block_images = data.bucket_block_images or global_batch_images
        if self._block_images is None or token_px is None:
            raise ValueError("data.buckets: the loader needs the global batch size and a token's pixels.")
        self._table = size_table(data.image_px, token_px)
        ratios = [width / height for height, width in self._table]
        self._sizes = [sizes_at(px, token_px, ratios) for _, px in stages]
        for kind, source in sources.items():
            self._members[kind] = self._sort(kind, source)
        counts = {kind: members.counts_K for kind, members in self._members.items()}
        self._dealing = Dealing(counts.get("image"), counts.get("pair"), data.mix_ratio)

    def _sort(self, kind: Kind, source: ShardSet) -> Members:
        """A source's images by bucket; the buckets that would repeat images within a block, or get no block,
        are closed."""
        assert self._block_images is not None
        share = self._data.mix_ratio if kind == "image" else 1 - self._data.mix_ratio
        blocks = max(1, int(period_blocks(self._data.mix_ratio) * share))
        least_images = max(self._block_images, -(-len(source) // blocks))
        try:
            return Members.of(source.sizes_by_shard(), self._table, least_images)
        except ValueError as error:
            raise ValueError(
                f"data.buckets needs the size of every image, data.{kind}s has {error}"
            ) from error

    def slot(self, index: int) -> Slot:
        """Kind, bucket and position of a global index.

        Raises:
            ValueError: a negative index.
        """
        if self._block_images is None or index < 0:
            return Slot(*_first_bucket(draw(index, self._data.mix_ratio)))
        block, offset = divmod(index, self._block_images)
        bucket, before = self._dealing.at(block)
        kind, position = draw(before * self._block_images + offset, self._dealing.mix[bucket])
        return Slot(kind, bucket, position)

    def images(self, slot: Slot) -> int:
        """How many images may stand in this slot."""
        members = self._members.get(slot.kind)
        return int(members.counts_K[slot.bucket]) if members else self._totals[slot.kind]

    def number(self, slot: Slot, attempt: int = 0) -> int:
        """The image in a slot, by its number in its source.

        Args:
            attempt: how many images that could not be used it stands in for, less than `images(slot)`.
        """
        length, members = self.images(slot), self._members.get(slot.kind)
        epoch, place = divmod(slot.position, length)
        seed = self._seed if slot.kind == "image" else self._seed ^ _PAIR_ORDER
        seed += _BUCKET_ORDER * slot.bucket
        n = shuffled((place + attempt) % length, length, seed, epoch, self._data.shuffle_block_images)
        return members.number(slot.bucket, n) if members else n

    def size_px(self, index: int) -> Size:
        """(height, width) of the image that is trained on at a global index."""
        return self._sizes[bisect_right(self._from_index, index) - 1][self.slot(index).bucket]

    @property
    def sizes_px(self) -> list[Size]:
        """Every (height, width) that some index has, each once."""
        dealt = self._dealing.blocks if self._block_images is not None else [1]
        used = [size for sizes in self._sizes for size, blocks in zip(sizes, dealt, strict=True) if blocks]
        return list(dict.fromkeys(used))

    def view(self, index: int) -> View:
        """What is shown of the image at a global index, whichever it is."""
        height_px, width_px = self.size_px(index)
        if self._data.crop == "center" and not self._data.flip:
            return View(width_px, height_px)
        x, y, side, _ = words_of(self._seed, Stream.AUGMENT, index)
        crop = (x / 2**32, y / 2**32) if self._data.crop == "random" else None
        return View(width_px, height_px, crop, self._data.flip and side >= 1 << 31)

    def caption(self, index: int, captions: int) -> int:
        """Which of several captions is used at a global index."""
        return words_of(self._seed, Stream.AUGMENT, index)[3] * captions >> 32 if captions > 1 else 0

    def plain_view(self, kind: Kind, number: int) -> View:
        """An image's view at the final size, neither cropped at random nor flipped."""
        members = self._members.get(kind)
        height_px, width_px = self._sizes[-1][members.bucket(number) if members else 0]
        return View(width_px, height_px)

    def check_micro_batch(self, images: int) -> None:
        """That a micro-batch over all ranks lies within a block.

        Raises:
            ValueError: it does not.
        """
        if self._block_images is not None and self._block_images % images:
            raise ValueError(
                f"data.bucket_block_images {self._block_images} is not a multiple of the {images} images "
                "that a micro-batch has over all data-parallel ranks: one would hold two sizes. Make "
                "it one (null: the global batch), or lower train.micro_batch_images."
            )


def _first_bucket(drawn: tuple[Kind, int]) -> tuple[Kind, int, int]:
    return drawn[0], 0, drawn[1]
