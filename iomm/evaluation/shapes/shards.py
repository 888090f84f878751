"""Data sets of the shapes world as WebDataset shards with their indexes.

    OUT/images/     unlabeled images, as many as wanted                data.images = OUT/images/set.index
    OUT/pairs/      the small set of pairs                             data.pairs  = OUT/pairs/set.index
    OUT/heldout/    pairs for the held-out loss, of another stream     data.heldout = OUT/heldout/set.index
    OUT/world.json  what it was made with

Pictures are PNG, so nothing is lost. Everything is a function of the seed: the shards' bytes are too.
"""

import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from iomm.data.inspection import Item
from iomm.data.shard_writer import SET_INDEX, MakeOptions, Progress, make_shards
from iomm.evaluation.shapes.sampling import Stream, draw_image, draw_pair
from iomm.evaluation.shapes.scene import SIDE_PX, Scene, render

WORLD = "world.json"
_TRIED = 8  # scenes that stand in a source's fingerprint


@dataclass(frozen=True, kw_only=True)
class World:
    """How much of the world is drawn."""

    images: int
    pairs: int = 4000
    heldout: int = 256
    seed: int = 0
    images_show_heldout: bool = True  # unlabeled images may show the combinations that pairs do not
    side_px: int = SIDE_PX


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """The first `count` scenes of a stream; those of pairs with captions."""

    world: World
    stream: Stream
    count: int

    @property
    def path(self) -> str:
        return f"shapes, {self.stream.name.lower()}"

    def fingerprint(self) -> str:
        """Of the settings and of some scenes: it changes with the way scenes are drawn, too."""
        tried = itertools.islice(self.items(), _TRIED)
        crc = 0
        for item in tried:
            assert isinstance(item.image, bytes)
            crc = zlib.crc32(item.image, crc)
        return f"{self.count} scenes, {asdict(self.world)}, first {crc:08x}"

    def items(self, start: int = 0) -> Iterator[Item]:
        for index in range(start, self.count):
            scene, caption = self._draw(index)
            name = f"{self.stream.name.lower()}-{index:08}"
            yield Item(name, name, _png(scene, self.world.side_px), caption)

    def _draw(self, index: int) -> tuple[Scene, bytes | None]:
        if self.stream is Stream.IMAGES:
            return draw_image(self.world.seed, index, show_heldout=self.world.images_show_heldout), None
        pair = draw_pair(self.world.seed, index, stream=self.stream)
        return pair.scene, pair.prompt.text.encode()


def _png(scene: Scene, side_px: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(render(scene, side_px)).save(data, "PNG", compress_level=1)
    return data.getvalue()


def make_world(
    world: World,
    folder: Path,
    *,
    processes: int = 1,
    on_progress: Callable[[str, Progress], None] = lambda _name, _now: None,
) -> dict[str, Path]:
    """Draw and pack a world, going on where an earlier call was stopped.

    Returns:
        The indexes, by what they are of: images, pairs, heldout. What is asked for 0 times has none.
    Raises:
        ValueError: a negative number, or the folder holds another world.
        OSError: a shard cannot be written.
    """
    counts = {Stream.IMAGES: world.images, Stream.PAIRS: world.pairs, Stream.HELDOUT: world.heldout}
    if min(counts.values()) < 0:
        raise ValueError(
            f"{world.images} images, {world.pairs} pairs and {world.heldout} held-out pairs: none may be "
            "negative; 0 leaves a set out."
        )
    indexes = {}
    for stream, count in counts.items():
        if not count:
            continue
        name = stream.name.lower()
        source = SceneSource(world=world, stream=stream, count=count)

        def tell(now: Progress, name: str = name) -> None:
            on_progress(name, now)

        make_shards([source], folder / name, MakeOptions(processes=processes), on_progress=tell)
        indexes[name] = folder / name / SET_INDEX
    (folder / WORLD).write_text(json.dumps(asdict(world), indent=1) + "\n")
    return indexes
