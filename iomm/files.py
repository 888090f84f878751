"""Small files that others may read at any moment."""

from pathlib import Path


def write_whole(path: Path, text: str, *, part: Path | None = None) -> None:
    """Put a text file (UTF-8) in place whole, or leave what was there.

    Not made durable: after a power cut the old or the new file is there, or, where the file system does not
    order its writes, an empty one. What has to survive that is `iomm.data.stores.replacing`'s.

    Args:
        part: where it is written first, in the same folder; None: PATH.part. Name one where two processes may
            write at once.
    Raises:
        OSError: it cannot be written.
    """
    part = part or path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
