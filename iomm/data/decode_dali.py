"""Image files to uint8 pixels with NVIDIA DALI: nvJPEG on the GPU (not yet run on a GPU), or on the CPU.

B = files of a call, C = 3 channels (red, green, blue), H and W the view's height and width.

DALI only decodes: which files, and which part of each, is decided here, so that order, resume and crops are
those of the CPU path. It is given plain JPEGs (gray or three components) whose header was read and found
sound; PNG, WebP and CMYK JPEG go the CPU path. An image that DALI fails on ends its pipeline, which is built
anew: the call's files go through it one by one, and only those that fail alone are decoded on the CPU. So a
file's pixels do not depend on its neighbours.

The pixels differ from the CPU path's by rounding, and by the reduced decode of images at least twice the
view's size, which DALI decodes in full. DALI takes some damaged files that the CPU path refuses.
"""

import logging
import threading
from collections.abc import Sequence
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from iomm.config import MAX_IMAGE_PIXELS
from iomm.data.decode_cpu import CpuDecoder, crop_and_size, is_plain_jpeg, planes
from iomm.data.decode_header import Header, probe
from iomm.data.errors import BadSample
from iomm.data.view import View
from iomm.errors import first_line

_log = logging.getLogger(__name__)


class DaliDecoder:
    """A `Decoder` of whole batches. Calls from several threads take turns.

    `rescued` counts the files that DALI failed on.
    """

    whole_batches = True

    def __init__(self, device_id: int | None, *, threads: int, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        """Start nothing yet: the pipeline is built by the first call, for its number of files.

        Args:
            device_id: the GPU to decode on, where the pixels stay; None: the CPU.
            threads: of DALI, on the CPU.
            max_pixels: an image with more is refused by its header.
        """
        self._device_id = device_id
        self._threads = threads
        self._max_pixels = max_pixels
        self._cpu = CpuDecoder(max_pixels)
        self._lock = threading.Lock()
        self._pipeline: _Pipeline | None = None
        self.rescued = 0

    def decode(
        self, files: Sequence[bytes], views: Sequence[View], into: Sequence[Tensor] | None = None
    ) -> list[Tensor | BadSample]:
        """As `Decoder.decode`; the tensors are on the decoder's device."""
        results: dict[int, Tensor | BadSample] = {}
        plain: dict[int, Header] = {}
        for place, (data, view) in enumerate(zip(files, views, strict=True)):
            try:
                header = probe(data, max_pixels=self._max_pixels)
            except BadSample as error:
                results[place] = error
                continue
            if is_plain_jpeg(header):
                plain[place] = header
            else:
                [results[place]] = self._cpu.decode([data], [view])
        if plain:
            taken = ([files[place] for place in plain], [views[place] for place in plain])
            decoded = self._decode(*taken, list(plain.values()))
            results |= dict(zip(plain, decoded, strict=True))
        return [self._place(results[place]) for place in range(len(files))]

    def _decode(
        self, files: Sequence[bytes], views: Sequence[View], headers: Sequence[Header]
    ) -> Sequence[Tensor | BadSample]:
        with self._lock:
            decoded = self._run(files, views, headers)
            if decoded is not None:
                return decoded
            alone = [([f], [v], [h]) for f, v, h in zip(files, views, headers, strict=True)]
            found = [self._run(*one) if len(files) > 1 else None for one in alone]
            self.rescued += found.count(None)
        return [
            one[0] if one is not None else self._cpu.decode([file], [view])[0]
            for one, file, view in zip(found, files, views, strict=True)
        ]

    def _run(
        self, files: Sequence[bytes], views: Sequence[View], headers: Sequence[Header]
    ) -> Sequence[Tensor] | None:
        """One call of DALI; None if it failed, which ends the pipeline."""
        try:
            if self._pipeline is None or self._pipeline.files < len(files):
                self._pipeline = _Pipeline(len(files), self._threads, self._device_id)
            return self._pipeline.run(files, views, headers)
        except RuntimeError as error:
            self._pipeline = None
            _log.warning("DALI failed on a call of %d files: %s", len(files), first_line(error))
            return None

    def _place(self, result: Tensor | BadSample) -> Tensor | BadSample:
        if isinstance(result, BadSample) or self._device_id is None:
            return result
        return result.to(f"cuda:{self._device_id}")


class _Pipeline:
    """A DALI pipeline: bytes, a box and a size for each file -> pixels, as they are stored."""

    def __init__(self, files: int, threads: int, device_id: int | None) -> None:
        """Build it for calls of at most `files` files."""
        # By name, because type checkers do not see what DALI adds to its modules as it is imported.
        fn, types, pipeline = map(
            import_module, ("nvidia.dali.fn", "nvidia.dali.types", "nvidia.dali.pipeline")
        )

        self.files = files
        self._device_id = device_id
        # Synchronous and without a queue: the batches ahead are the loader's.
        self._dali = pipeline.Pipeline(
            batch_size=files,
            num_threads=threads,
            device_id=device_id,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        with self._dali:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            begin_HW = fn.external_source(name="begin", dtype=types.INT32, ndim=1)
            shape_HW = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            size_HW = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            stored_HWC = fn.decoders.image_slice(
                encoded,
                start=begin_HW,
                shape=shape_HW,
                axes=[0, 1],
                device="cpu" if device_id is None else "mixed",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            resized_HWC = fn.resize(stored_HWC, size=size_HW, interp_type=types.INTERP_CUBIC, antialias=True)
            self._dali.set_outputs(resized_HWC)
        self._dali.build()

    def run(self, files: Sequence[bytes], views: Sequence[View], headers: Sequence[Header]) -> list[Tensor]:
        """The views of plain JPEGs.

        Raises:
            RuntimeError: DALI could not decode one of them.
        """
        cuts = [crop_and_size(header, view) for header, view in zip(headers, views, strict=True)]
        boxes = [box for _, box, _ in cuts]
        inputs = {
            "encoded": [np.frombuffer(data, np.uint8) for data in files],
            "begin": [np.array((box.top_px, box.left_px), np.int32) for box in boxes],
            "shape": [np.array((box.height_px, box.width_px), np.int32) for box in boxes],
            "size": [np.array(size_HW, np.float32) for _, _, size_HW in cuts],
        }
        for name, arrays in inputs.items():
            self._dali.feed_input(name, arrays)
        [images] = self._dali.run()
        if self._device_id is None:
            stored = [np.asarray(images.at(b)) for b in range(len(files))]
            return [
                torch.from_numpy(planes(view.mirrored(header.upright(image_HWC))).copy())
                for header, view, image_HWC in zip(headers, views, stored, strict=True)
            ]
        shown = enumerate(zip(headers, views, strict=True))
        return [_upright(torch.from_dlpack(images[b]), header, view) for b, (header, view) in shown]


def _upright(stored_HWC: Tensor, header: Header, view: View) -> Tensor:
    """`Header.upright`, then `View.mirrored`, for a tensor on the GPU, as a contiguous copy (C, H, W): DALI
    reuses its own."""
    turned = stored_HWC.transpose(0, 1) if header.sideways else stored_HWC
    axes = set(header.mirrored_axes) ^ ({1} if view.flip else set())
    return turned.flip(tuple(axes)).permute(2, 0, 1).contiguous()
