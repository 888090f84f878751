import json
from collections import Counter

import pytest

from iomm.config import DataConfig
from iomm.data.captions import json_captions
from iomm.data.errors import BadSample
from iomm.data.indexer import index_shard
from iomm.data.loader import Loader
from iomm.data.shard_writer import make_shards
from iomm.data.shards import ShardSet
from iomm.data.sources import FolderSource
from tests.data.conftest import never

SEVERAL = ["one", " two ", "Café", ""]


@pytest.fixture
def several(write_shard, png) -> str:
    """Image a has three captions, b one, c JSON of other things."""
    members = [("a.png", png(0)), ("a.json", json.dumps(SEVERAL, indent=1).encode())]
    members += [("b.png", png(1)), ("b.txt", b"alone"), ("b.json", b'["not read"]')]
    members += [("c.png", png(2)), ("c.json", b'{"caption": "not a list"}')]
    return write_shard("several.tar", members)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_json_list_is_several_captions_with_and_without_an_index(several, indexed):
    if indexed:
        index_shard(several)
    shards = ShardSet.open([several])
    assert shards.indexed == indexed
    captions = [shards.read_captions(shards[i]) for i in range(3)]
    assert captions == [("one", "two", "Café"), ("alone",), ()]
    assert [shards.caption(i) for i in range(3)] == ["one", "alone", None]
    assert len(ShardSet.open([several], captioned_only=True)) == 2


def test_shard_make_packs_lists_of_captions_as_lists(tmp_path, png):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ('["x", "y"]', '{"caption": ["p", "q"]}', '{"caption": "single"}', '["single"]', "[]", '["z", 3]')
    for n, text in enumerate(texts):
        (folder / f"{n}.png").write_bytes(png(n))
        (folder / f"{n}.json").write_text(text)
    done = make_shards([FolderSource(str(folder))], tmp_path / "out")
    assert (done.captions, done.bad_captions) == (4, 2)
    shards = ShardSet.open([str(tmp_path / "out" / "set.index")])
    found = [shards.read_captions(shards[i]) for i in range(6)]
    assert found == [("x", "y"), ("p", "q"), ("single",), ("single",), (), ()]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[", "no JSON"),
        (b"3", "no object and no list"),
        (b"[]", "holds no caption"),
        (b'["", " "]', "holds no caption"),
        (b'["a", null]', "no text but NoneType"),
        (b'{"caption": {}}', "no text but dict"),
        (b'["\\ud800"]', "not UTF-8"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_json_without_texts_is_a_bad_sample(data, reason):
    with pytest.raises(BadSample, match=reason):
        json_captions(data)


def loader(shard: str, seed: int = 0, **changes) -> Loader:
    data = DataConfig(images=(shard,), pairs=(shard,), mix_ratio=0.0, image_px=8, decode_threads=1)
    return Loader(data, seed, on_bad=changes.pop("on_bad", never), **changes)


def test_a_caption_is_chosen_by_the_global_index(several):
    def drawn(seed: int) -> list[str | None]:
        source = loader(several, seed)
        return [sample.caption for sample in source.samples(range(120)) if sample.key == "a"]

    counts = Counter(drawn(0))
    assert set(counts) == {"one", "two", "Café"}
    assert min(counts.values()) > 8
    assert drawn(0) == drawn(0) != drawn(1)
    assert [loader(several).sample(i).caption for i in (7, 8)] == [
        s.caption for s in loader(several).samples([7, 8])
    ]


def test_captions_that_the_mllm_does_not_take_are_never_chosen(several):
    def tokenize(caption: str) -> None:
        if len(caption) > 3:
            raise ValueError(f"{caption} is too long")

    reports = []
    source = loader(several, tokenize=tokenize, on_bad=reports.append)
    assert {sample.caption for sample in source.samples(range(60))} == {"one", "two"}
    [report] = reports
    assert (report.key, report.reason) == ("b", "no caption for the MLLM: alone is too long")


def test_held_out_captions_are_the_first_whatever_the_seed(several):
    data = DataConfig(images=(several,), heldout=(several,), image_px=8)
    for seed in range(3):
        assert Loader(data, seed, on_bad=never).heldout(2).captions == ("one", "alone")
