"""The shards of Fluent Emoji as shipped, and the rules that made them."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from examples.data.build_fluent_emoji import (
    SHARDS,
    Emoji,
    concept_of,
    fraction_of,
    has_caption,
    key_of,
    main,
    split_of,
    write_shard,
)

TRAIN = ("train-0000.tar", "train-0001.tar")
HELDOUT = ("heldout-0000.tar",)


def samples_of(*shards: str) -> dict[str, dict[str, bytes]]:
    """The shipped samples of some shards: key -> extension -> bytes."""
    samples: dict[str, dict[str, bytes]] = {}
    for name in shards:
        with tarfile.open(SHARDS / name) as shard:
            for member in shard:
                key, extension = member.name.split(".")
                payload = shard.extractfile(member)
                assert payload is not None
                assert extension not in samples.setdefault(key, {}), f"{member.name} is there twice"
                samples[key][extension] = payload.read()
    return samples


def labels_of(samples: dict[str, dict[str, bytes]]) -> dict[str, str]:
    return {key: json.loads(parts["json"])["label"] for key, parts in samples.items()}


def test_the_shipped_shards_hold_1852_images_of_which_171_are_held_out() -> None:
    train, heldout = samples_of(*TRAIN), samples_of(*HELDOUT)
    assert (len(train), len(heldout)) == (1681, 171)
    assert not set(train) & set(heldout)


def test_every_sample_has_an_image_and_metadata_and_the_key_is_its_hexcode() -> None:
    for key, parts in samples_of(*TRAIN, *HELDOUT).items():
        about = json.loads(parts["json"])
        assert set(about) == {"label", "hexcode", "group", "subgroup"}
        assert key == key_of(about["hexcode"])
        assert "webp" in parts


def test_every_held_out_picture_is_64_px_rgb_with_a_mostly_light_border() -> None:
    for key, parts in samples_of(*HELDOUT).items():
        with Image.open(io.BytesIO(parts["webp"])) as image:
            assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "WEBP"), key
            corner = image.getpixel((0, 0))
        assert isinstance(corner, tuple)
        assert min(corner) > 200, key


def test_no_concept_is_on_both_sides_of_the_split() -> None:
    train = {concept_of(label) for label in labels_of(samples_of(*TRAIN)).values()}
    heldout = {concept_of(label) for label in labels_of(samples_of(*HELDOUT)).values()}
    assert not train & heldout
    assert (len(train), len(heldout)) == (1506, 151)
    assert all(split_of(concept) == "train" for concept in train)
    assert all(split_of(concept) == "heldout" for concept in heldout)


def test_captions_are_the_labels_of_all_held_out_and_of_a_quarter_of_the_train_concepts() -> None:
    train, heldout = samples_of(*TRAIN), samples_of(*HELDOUT)
    for samples in (train, heldout):
        labels = labels_of(samples)
        for key, parts in samples.items():
            assert ("txt" in parts) == has_caption(concept_of(labels[key])), key
            assert parts.get("txt", labels[key].encode()) == labels[key].encode()
    assert all("txt" in parts for parts in heldout.values())
    assert sum("txt" in parts for parts in train.values()) == 382
    released = {concept_of(label) for key, label in labels_of(train).items() if "txt" in train[key]}
    assert len(released) / 1506 == pytest.approx(0.25, abs=0.03)


def test_the_shards_name_no_owner_and_no_time() -> None:
    for name in (*TRAIN, *HELDOUT):
        with tarfile.open(SHARDS / name) as shard:
            seen = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in shard}
        assert seen == {(0, 0, 0, "", "", 0o644, True)}


@pytest.mark.parametrize(
    ("label", "concept"),
    [
        ("woman running", "running"),
        ("man running", "running"),
        ("person: red hair", "red hair"),
        ("woman and man holding hands", "holding hands"),
        ("men holding hands", "holding hands"),
        ("family: man, woman, girl, boy", "family"),
        ("Mrs. Claus", "claus"),
        ("mermaid", "mer"),
        ("woman", "person"),
        ("flag: Iraq", "flag iraq"),
        ("keycap: #", "keycap #"),
        ("red heart", "red heart"),
    ],
)
def test_a_concept_is_the_label_without_words_of_gender(label: str, concept: str) -> None:
    assert concept_of(label) == concept


def test_fractions_depend_on_purpose_and_text_and_spread_over_the_unit_interval() -> None:
    values = [fraction_of("split", str(i)) for i in range(1000)]
    assert min(values) >= 0
    assert max(values) < 1
    assert sum(values) / 1000 == pytest.approx(0.5, abs=0.05)
    assert fraction_of("split", "fox") != fraction_of("caption", "fox")


def test_writing_a_shard_twice_gives_the_same_bytes_on_a_white_background(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGBA", (256, 256), (200, 0, 0, 0)).save(picture, "WEBP", lossless=True)
    about = {"key": "1f98a", "hexcode": "1F98A", "label": "fox", "group": "animals", "subgroup": "mammal"}
    emoji = Emoji(**about, picture=picture.getvalue())
    write_shard(tmp_path / "a.tar", [emoji])
    write_shard(tmp_path / "b.tar", [emoji])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as shard:
        payload = shard.extractfile("1f98a.webp")
        assert payload is not None
        with Image.open(io.BytesIO(payload.read())) as image:
            assert image.getpixel((32, 32)) == (255, 255, 255)


def test_a_missing_tarball_is_one_clear_line_that_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "npm pack @lobehub/fluent-emoji-3d@1.1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
