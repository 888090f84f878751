"""Captions as they stand in a shard: one in KEY.txt, several in KEY.json, a list."""

import json

from iomm.data.errors import BadSample

MAX_CAPTION_BYTES = 65_536  # of a caption file; the MLLM takes about one in a hundred of that


def caption_text(data: bytes) -> str:
    """The text of a caption file, without surrounding white space.

    Raises:
        BadSample: not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(
            f"the caption is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if not text:
        raise BadSample("the caption is empty")
    return text


def json_captions(data: bytes, field: str = "caption") -> tuple[str, ...]:
    """The captions of a JSON file: a list of texts, or an object with a text or such a list in `field`. Empty
    texts of a list are left out.

    Returns:
        none for an object without the field: JSON of other things.
    Raises:
        BadSample: not JSON, or anything else in the place of a text.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the caption is no JSON: {error}") from error
    where = "the caption's JSON"
    if not isinstance(record, dict | list):
        raise BadSample(f"{where} is no object and no list")
    if isinstance(record, dict):
        where, record = f"{where} in {field!r}", record.get(field)
        if record is None:
            return ()
    texts = record if isinstance(record, list) else [record]
    for text in texts:
        if not isinstance(text, str):
            raise BadSample(f"{where} holds no text but {type(text).__name__}")
    kept = [text for text in texts if text.strip()] if len(texts) > 1 else texts
    if not kept:
        raise BadSample(f"{where} holds no caption")
    return tuple(caption_text(text.encode("utf-8", "surrogatepass")) for text in kept)
