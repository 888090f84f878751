"""The name of an image file by its content. Without torch, which reading shards does not need."""

import hashlib


def cache_key(image_bytes: bytes) -> str:
    """Content hash of an image file: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(image_bytes).hexdigest()[:32]
