"""Build the embedded images: Fluent Emoji 3D at 64 px as WebDataset tar shards.

Sources are two npm packages, read as the tarballs that `npm pack` writes (nothing is fetched here):

    npm pack @lobehub/fluent-emoji-3d@1.1.0     256 px pictures with transparency, one file an emoji (MIT)
    npm pack emojibase-data@17.0.0              English labels, groups and subgroups (MIT)

    python examples/data/build_fluent_emoji.py FOLDER_WITH_BOTH_TARBALLS

Both are joined on the hexcode (lower case, variation selector `-fe0f` stripped). Skin-tone variants are no
base emoji and stay out. A concept (not an image) belongs to one split, so that `man running` can not be held
out while `woman running` is trained on: see `concept_of`. Every choice is a hash of the concept or the key,
so the shards are the same on every machine; the bytes of the WebP files depend on the libwebp inside Pillow.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

IMAGE_PACKAGE = ("@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz")
LABEL_PACKAGE = ("emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz")

SHARDS = Path(__file__).resolve().parent / "fluent_emoji"

SIDE_PX = 64
WEBP_QUALITY = 95
HELDOUT_FRACTION = 0.10  # of the concepts
CAPTION_FRACTION = 0.25  # of the train concepts: these samples are the text-image pairs
TRAIN_SHARDS = 2

Split = Literal["train", "heldout"]

GENDER_WORDS = re.compile(r"\b(?:(?:wo)?m[ae]n|person|people|adult|girl|boy|santa|mrs|mx)\b")
SAME_CONCEPT = {
    "mermaid": "mer", "merman": "mer", "merperson": "mer", "princess": "prince", "older": "old", "and": "",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One base emoji: its key (joined hexcode), what emojibase says of it, its picture (256 px WebP)."""

    key: str
    hexcode: str
    label: str
    group: str
    subgroup: str
    picture: bytes

    @property
    def concept(self) -> str:
        """The concept that decides split and caption; see `concept_of`."""
        return concept_of(self.label)


def key_of(hexcode: str) -> str:
    """The sample key of a hexcode: lower case, without variation selectors. `1F441-FE0F` becomes `1f441`."""
    return hexcode.lower().replace("-fe0f", "")


def concept_of(label: str) -> str:
    """The label without words of gender and person, so that the variants of one picture share a concept.

    `woman running`, `man running` and `person running` all become `running`; every `family: ...` becomes
    `family`; a label of nothing but such words becomes `person`. Colours, counts and flags stay concepts of
    their own.
    """
    text = label.lower()
    for prefix in ("family", "kiss", "couple with heart"):
        if text.startswith(f"{prefix}:"):
            return prefix
    words = re.findall(r"[^\W_]+(?:-[^\W_]+)*|[#*!]", GENDER_WORDS.sub(" ", text))
    words = [SAME_CONCEPT.get(word, word) for word in words]
    return " ".join(word for word in words if word) or "person"


def fraction_of(purpose: str, text: str) -> float:
    """A number in [0, 1), a function of purpose and text only (SHA-256), uniform over texts."""
    digest = hashlib.sha256(f"fluent-emoji/{purpose}/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: str) -> Split:
    """The split a concept belongs to."""
    return "heldout" if fraction_of("split", concept) < HELDOUT_FRACTION else "train"


def has_caption(concept: str) -> bool:
    """Whether a concept's captions are released: all held-out ones, and a quarter of the train concepts."""
    return split_of(concept) == "heldout" or fraction_of("caption", concept) < CAPTION_FRACTION


def open_package(folder: Path, package: tuple[str, str, str]) -> tarfile.TarFile:
    """Open an npm tarball. Raises ValueError if it is missing or of another version."""
    name, version, filename = package
    path = folder / filename
    if not path.is_file():
        raise ValueError(f"{filename} is not in {folder}. Get it there with: npm pack {name}@{version}")
    archive = tarfile.open(path)  # noqa: SIM115 (closed by the caller)
    found = json.loads(read_member(archive, "package/package.json"))
    if (found["name"], found["version"]) != (name, version):
        archive.close()
        raise ValueError(
            f"{path} holds {found['name']} {found['version']}; the shards are defined by {name} {version}. "
            f"Replace it with: npm pack {name}@{version}"
        )
    return archive


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one regular file of an archive."""
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} in {archive.name} is no regular file. Get the package anew with npm pack.")
    return member.read()


def read_emojis(folder: Path) -> list[Emoji]:
    """Join pictures and labels of the two tarballs in `folder`, sorted by key.

    Where a key has two pictures (`26a7` and `26a7-fe0f`), the one under emojibase's own hexcode is taken.
    """
    with open_package(folder, IMAGE_PACKAGE) as images, open_package(folder, LABEL_PACKAGE) as labels:
        entries = json.loads(read_member(labels, "package/en/data.json"))
        names = json.loads(read_member(labels, "package/meta/groups.json"))
        paths: dict[str, list[str]] = {}
        for path in images.getnames():
            if path.endswith(".webp"):
                paths.setdefault(key_of(Path(path).stem), []).append(path)
        emojis = []
        for entry in entries:
            key = key_of(entry["hexcode"])
            if key not in paths:
                continue
            exact = f"package/assets/{entry['hexcode'].lower()}.webp"
            path = exact if exact in paths[key] else paths[key][0]
            emojis.append(
                Emoji(
                    key=key,
                    hexcode=entry["hexcode"],
                    label=entry["label"],
                    group=names["groups"][str(entry["group"])],
                    subgroup=names["subgroups"][str(entry["subgroup"])],
                    picture=read_member(images, path),
                )
            )
    return sorted(emojis, key=lambda emoji: emoji.key)


def shrink(picture: bytes) -> bytes:
    """Composite a picture on white and scale it to 64 x 64 px RGB with antialiasing; returns WebP bytes."""
    with Image.open(io.BytesIO(picture)) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    opaque = Image.alpha_composite(white, rgba).convert("RGB")
    small = opaque.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=WEBP_QUALITY, method=6)
    return out.getvalue()


def members_of(emoji: Emoji) -> Iterator[tuple[str, bytes]]:
    """One emoji's shard members as (name, bytes): picture, metadata, and the caption where it is released."""
    yield f"{emoji.key}.webp", shrink(emoji.picture)
    about = {name: getattr(emoji, name) for name in ("label", "hexcode", "group", "subgroup")}
    yield f"{emoji.key}.json", json.dumps(about, ensure_ascii=False).encode()
    if has_caption(emoji.concept):
        yield f"{emoji.key}.txt", emoji.label.encode()


def write_shard(path: Path, emojis: list[Emoji]) -> None:
    """Write one tar shard. Equal input gives equal bytes: no time, no owner, plain USTAR headers."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for emoji in emojis:
            for name, payload in members_of(emoji):
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.mtime = len(payload), 0o644, 0
                shard.addfile(info, io.BytesIO(payload))


def shards_of(emojis: list[Emoji]) -> dict[str, list[Emoji]]:
    """Which emojis go into which shard file. Their order is a hash of the key, so each shard is a mixture."""
    mixed = sorted(emojis, key=lambda emoji: fraction_of("order", emoji.key))
    train = [emoji for emoji in mixed if split_of(emoji.concept) == "train"]
    shards = {f"train-{i:04d}.tar": train[i::TRAIN_SHARDS] for i in range(TRAIN_SHARDS)}
    shards["heldout-0000.tar"] = [emoji for emoji in mixed if split_of(emoji.concept) == "heldout"]
    return shards


def main(arguments: list[str] | None = None) -> None:
    """Command line: build every shard and say what is in it."""
    parser = argparse.ArgumentParser(description="Build the Fluent Emoji shards from two npm tarballs.")
    parser.add_argument("tarballs", type=Path, help="folder holding both tarballs (npm pack writes them)")
    parser.add_argument("--out", type=Path, default=SHARDS, help="folder the shards are written to")
    given = parser.parse_args(arguments)
    try:
        emojis = read_emojis(given.tarballs)
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in shards_of(emojis).items():
        write_shard(given.out / name, chosen)
        concepts = {emoji.concept for emoji in chosen}
        captions = sum(has_caption(emoji.concept) for emoji in chosen)
        size = (given.out / name).stat().st_size
        sys.stdout.write(
            f"{name}: {len(chosen)} images, {len(concepts)} concepts, {captions} captions, {size} bytes\n"
        )


if __name__ == "__main__":
    main()
