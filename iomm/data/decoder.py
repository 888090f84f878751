"""Which decoder a run uses: `data.decode = auto | cpu | dali`."""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from iomm.config import DataConfig
from iomm.data.decode_cpu import CpuDecoder, jpeg_way
from iomm.data.errors import BadSample
from iomm.data.view import View

INSTALL_DALI = "pip install 'iomm[data]'"
_log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Image files to pixels. The same file and view give the same pixels, whatever else is in the call."""

    @property
    def whole_batches(self) -> bool:
        """Whether it is better called once with a batch than by several threads with a file each."""
        ...

    @property
    def rescued(self) -> int:
        """Calls that failed and were decoded another way."""
        ...

    def decode(
        self, files: Sequence[bytes], views: Sequence[View], into: Sequence[Tensor] | None = None
    ) -> list[Tensor | BadSample]:
        """Each file's view, turned upright, on white, resized with antialiasing: uint8 (3, H, W); or why
        there is none. Nothing that is wrong with a file is raised.

        A result may be the tensor of `into` (uint8, contiguous, on the CPU) in its place, filled; a file that
        cannot be used may leave anything there.
        """
        ...


def dali_installed() -> bool:
    """Whether NVIDIA DALI is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("nvidia", "nvidia.dali"))


def open_decoder(data: DataConfig) -> Decoder:
    """The decoder that the configuration asks for; `auto` is DALI where there are it and a GPU.

    Raises:
        ValueError: DALI was asked for and is not installed.
    """
    if data.decode == "dali" and not dali_installed():
        raise ValueError(
            f"data.decode=dali, but NVIDIA DALI is not installed. Install it ({INSTALL_DALI}), or set "
            "data.decode=cpu."
        )
    _log.info("decoding %s", decoder_used(data))
    if not _uses_dali(data):
        return CpuDecoder(data.max_image_pixels)
    from iomm.data.decode_dali import DaliDecoder

    device_id = torch.cuda.current_device() if torch.cuda.is_available() else None
    return DaliDecoder(device_id, threads=data.decode_threads, max_pixels=data.max_image_pixels)


def decoder_used(data: DataConfig) -> str:
    """What `open_decoder` opens, and why, in words."""
    gpu = torch.cuda.is_available()
    if _uses_dali(data):
        return f"with DALI on the {'GPU' if gpu else 'CPU'}"
    why = ""
    if data.decode == "auto":
        why = f": DALI is not installed ({INSTALL_DALI})" if gpu else ": there is no GPU"
    return f"on the CPU{why}; {jpeg_way()}"


def _uses_dali(data: DataConfig) -> bool:
    chosen = data.decode == "auto" and torch.cuda.is_available() and dali_installed()
    return data.decode == "dali" or chosen
