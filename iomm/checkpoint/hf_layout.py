"""What an exported folder looks like, and how one is made whole or not at all.

FOLDER/
    model_index.json    diffusers' table of contents
    pipeline.py         text -> picture, imports nothing of iomm
    transformer/        FluxTransformer2DModel or ZImageTransformer2DModel: config.json, *.safetensors
    query_adapter/      adapter, connector and prompts, with their class
    vae/                the autoencoder's folder as it was
    scheduler/          Euler with the run's shift
    text_encoder/       the MLLM's folder as it was, or reference.json with its hub name and revision
    tokenizer/
    iomm.json           the run's configuration and where the weights come from; what `iomm import` reads
    README.md           model card
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from iomm.checkpoint.folder import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "iomm.json"
WEIGHTS = "diffusion_pytorch_model"  # stem of diffusers' weight files
REFERENCE = "reference.json"
ADAPTER_PREFIX, GENERATOR_PREFIX = "conditioner.", "generator."


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported folder says of itself in iomm.json."""

    config: dict[str, Any]  # the run's, as of `Config.to_dict`
    step: int  # optimizer steps done
    weights: Literal["ema", "raw"]
    dtype: str | None  # what weights were converted to; None: they are as they were
    commit: str | None  # of the code that trained them
    iomm_version: str

    def write(self, folder: Path) -> None:
        data = {"format": FORMAT_VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """None: the folder is not one of ours.

        Raises:
            CheckpointError: of another format version.
        """
        if not (folder / MANIFEST).is_file():
            return None
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if data.pop("format", None) != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / MANIFEST} is not of format {FORMAT_VERSION}, which this iomm reads. It was "
                f"written by iomm {data.get('iomm_version')}; use that version."
            )
        return cls(**data)


@contextlib.contextmanager
def whole_folder(final: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the name `final` when all has gone well, and is removed
    otherwise.

    Raises:
        CheckpointError: there is something at `final` already, or the disk is too full.
    """
    final = final.absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final} exists and is not empty. Choose another name, or remove it.")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.partial")
    if temporary.exists():  # left by a conversion that was killed
        shutil.rmtree(temporary)
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
        raise CheckpointError(_full(final, needed_bytes, free))
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(_full(final, needed_bytes, 0)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _full(final: Path, needed: int, free: int) -> str:
    return (
        f"the disk of {final.parent} is too full for {final.name}: it takes about {needed:,} bytes, {free:,} "
        "are free. Delete something there, or choose another place. Nothing was left behind."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder that somebody else may have made.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return data


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
