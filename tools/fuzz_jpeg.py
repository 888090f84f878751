"""Damaged JPEGs through the row-streaming decoder, built with the address and undefined-behaviour sanitizers.

    python -m tools.fuzz_jpeg [--inputs 20000] [--seed 0]

Every input is a small JPEG of some kind, most with a few bytes flipped, cut out, put in or copied; its part
and size come from its damaged header, as in training, or from the sound one where that is unreadable. Judged
are csrc/jpeg_view.c and csrc/resize_rows.h: the system's libjpeg-turbo has no sanitizers built in. The exit
status is 1 after a crash, a sanitizer's finding or an input without an answer.
"""

import argparse
import collections
import io
import itertools
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from iomm.data.decode_cpu import is_plain_jpeg, part_of
from iomm.data.decode_header import probe
from iomm.data.errors import BadSample
from iomm.data.view import View
from iomm_kernels import build

DRIVER = Path(__file__).with_name("fuzz_jpeg.c")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DIOMM_ONE_CLONE")
MAX_PIXELS = 1 << 20
_SEED_SIDES = ((8, 8), (17, 5), (40, 33), (3, 70), (97, 64))


def main() -> int:
    """Run the inputs; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if problem := build.JPEG.problem():
        sys.stderr.write(f"the JPEG decoder {problem}\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(build_driver(Path(folder)), arguments.inputs, arguments.seed)
    for answer, count in outcome.answers.most_common():
        sys.stdout.write(f"{count:8}  {answer}\n")
    sys.stdout.write(outcome.problem or f"{arguments.inputs} inputs, each answered, nothing found\n")
    return 1 if outcome.problem else 0


@dataclass(frozen=True)
class Outcome:
    """What came of the inputs."""

    answers: collections.Counter[str]
    problem: str  # empty: none


def build_driver(folder: Path) -> Path:
    """The decoder and its driver, compiled into `folder`.

    Raises:
        RuntimeError: the compiler failed.
    """
    program = folder / "fuzz_jpeg"
    compiler = build.JPEG.program()
    assert compiler is not None, build.JPEG.problem()
    flags = [flag for flag in build.JPEG.flags if not flag.startswith("-O")]
    links = [f"-l{name}" for name in build.JPEG.links]
    build.run([compiler, *flags, *SANITIZERS, str(DRIVER), "-o", str(program), *links])
    return program


def run(driver: Path, inputs: int, seed: int) -> Outcome:
    """All inputs through the driver."""
    data = b"".join(itertools.islice(_records(seed), inputs))
    done = subprocess.run([str(driver)], input=data, capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    answers = collections.Counter(re.sub(r"0x\w+|\d+", "N", line) for line in lines)
    problem = ""
    if done.returncode or len(lines) != inputs:
        problem = (
            f"input {len(lines)} of seed {seed} ended the decoder, status {done.returncode}:\n"
            + done.stderr.decode("utf-8", "replace")
        )
    return Outcome(answers, problem)


def _records(seed: int) -> Iterator[bytes]:
    """Cut, length and bytes of each input."""
    rng = np.random.default_rng(seed)
    kinds = list(_sound(rng))
    while True:
        sound = kinds[rng.integers(len(kinds))]
        data = _damaged(rng, sound)
        crop = (float(rng.random()), float(rng.random())) if rng.random() < 0.5 else None
        view = View(int(rng.integers(1, 48)), int(rng.integers(1, 48)), crop, bool(rng.integers(2)))
        try:
            header = probe(data, max_pixels=MAX_PIXELS)
            cut = part_of(header, view) if is_plain_jpeg(header) else None
        except BadSample:
            cut = None
        cut = cut or part_of(probe(sound), view)
        yield struct.pack("<11i", *astuple(cut)) + struct.pack("<I", len(data)) + data


def _sound(rng: np.random.Generator) -> Iterator[bytes]:
    """JPEGs of all kinds: chroma subsampling, progressive, restart markers, gray, EXIF orientation."""
    choices = itertools.product(_SEED_SIDES, (0, 1, 2, None), (False, True), (0, 2))
    for number, ((width, height), subsampling, progressive, restarts) in enumerate(choices):
        pixels_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels_HWC if subsampling is not None else pixels_HWC[..., 0])
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        options = {} if subsampling is None else {"subsampling": subsampling}
        file = io.BytesIO()
        image.save(
            file,
            "JPEG",
            quality=80,
            progressive=progressive,
            restart_marker_blocks=restarts,
            exif=exif,
            **options,
        )
        yield file.getvalue()


def _damaged(rng: np.random.Generator, sound: bytes) -> bytes:
    """One or two damages, or none; the headers are hit as often as the pixels."""
    data = bytearray(sound)
    for _ in range(int(rng.integers(3))):
        end = len(data) if rng.random() < 0.5 else max(2, data.find(b"\xff\xda") + 14)
        at = int(rng.integers(min(2, len(data)), max(3, min(end, len(data)))))
        some = int(rng.integers(1, 24))
        match int(rng.integers(6)):
            case 0:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 1 if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at : at + some]
            case 3:
                data[at:at] = rng.bytes(some)
            case 4:
                data[at:at] = data[at : at + 8 * some]
            case _ if rng.random() < 0.5:
                del data[at:]
            case _:
                data[at : at + 2] = bytes([0xFF, int(rng.integers(0xC0, 0x100))])
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
