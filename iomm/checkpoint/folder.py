"""What a run's folder of checkpoints looks like, and which of them may be trusted. Imports no torch.

RUN/checkpoints/step_00001000/      a complete checkpoint: the rename to this name was the last step of
saving it
    checkpoint.json                 step, configuration, versions, and the size of every other file
    *.distcp, .metadata, metadata.json    Megatron's sharded format (torch_dist)
RUN/checkpoints/.tmp_*              being written, or left by a run that died; never read, removed by the
next save
RUN/checkpoints/damaged_step_*      could not be read when a run was to go on from it; kept to be looked at
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iomm.config import Config

FORMAT_VERSION = 1
INFO_FILE = "checkpoint.json"
TEMPORARY = ".tmp_"
DAMAGED = "damaged_"
PRIVATE = 0o700  # of a run's folder: its owner's alone
_OLD_COMMON = "common.pt"
_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})")

# Settings that decide the shapes of the weights or what the network's output means. A run with others may
# read the weights of a checkpoint into the wrong model, so it is refused. The rest (mask ratio, prompts,
# data, ...) may change.
_ARCHITECTURE = (
    "generator",
    "condition.queries",
    "condition.adapter_heads",
    "condition.condition_tokens",
    "condition.connector",
    "mllm.path",
    "mllm.revision",
    "codec.path",
    "codec.revision",
    "codec.patch",
)


class CheckpointError(Exception):
    """A checkpoint cannot be saved or used; the message says which, why, and the way out."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was saved, so an older one is the way out."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The part of a checkpoint that is plain data."""

    path: Path
    step: int  # optimizer steps done
    config: dict[str, Any]  # the run's, as of `Config.to_dict`
    extra: dict[str, Any]  # what the loop stored: data position, wandb id, ...
    has_ema: bool
    files: dict[str, int]  # name -> bytes
    iomm_version: str


def private_folder(run_dir: Path) -> None:
    """Make a run's folder, which nobody else may look into. One that is there keeps the rights it has: to
    share a run is the owner's choice (chmod g+rx)."""
    run_dir.mkdir(mode=PRIVATE, parents=True, exist_ok=True)


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder of checkpoints, oldest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / INFO_FILE).is_file()]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints, or None. A torn write is never one."""
    paths = complete(folder)
    return paths[-1] if paths else None


def find(path: Path) -> Path:
    """The checkpoint a user means: a checkpoint's folder, or a run or its `checkpoints` (then the newest).

    Raises:
        CheckpointError: there is none.
    """
    if (path / INFO_FILE).is_file():
        return path
    newest = latest(path / "checkpoints") or latest(path)
    if newest is None:
        raise CheckpointError(
            f"{path} is no checkpoint and holds none. Name a step_... folder, or a run that has saved one "
            "(a folder without checkpoint.json is not complete)."
        )
    return newest


def run_of(path: Path) -> Path | None:
    """The folder of the run that the checkpoint a user means belongs to; None if it lies by itself.

    Raises:
        CheckpointError: there is no checkpoint (see `find`).
    """
    folder = find(path).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def read_info(path: Path) -> CheckpointInfo:
    """The plain data of one checkpoint; its shard files are not opened.

    Raises:
        CheckpointError: no checkpoint, unreadable, or of another format version.
    """
    try:
        data = json.loads((path / INFO_FILE).read_text())
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} has no {INFO_FILE}, so it is not a complete checkpoint.") from None
    except OSError as error:
        raise CheckpointError(unanswered(path / INFO_FILE, error)) from error
    except ValueError as error:
        raise DamagedCheckpoint(
            f"{path / INFO_FILE} cannot be read: {error}. Use an older checkpoint."
        ) from error
    if data.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {data.get('format')}, this iomm reads {FORMAT_VERSION}. "
            f"It was saved by iomm {data.get('iomm_version')}; use that version."
        )
    return CheckpointInfo(
        path=path,
        step=data["step"],
        config=data["config"],
        extra=data["extra"],
        has_ema=data["has_ema"],
        files=data["files"],
        iomm_version=data["iomm_version"],
    )


def write_info(path: Path, info: Mapping[str, Any]) -> None:
    """Write `checkpoint.json` for the files now in `path`, and make all names and bytes durable."""
    files = {p.name: p.stat().st_size for p in path.iterdir() if p.name != INFO_FILE}
    for name in files:
        if not name.endswith(".distcp"):  # Megatron syncs its shards, not the small files
            _sync(path / name)
    with open(path / INFO_FILE, "w") as file:
        json.dump({"format": FORMAT_VERSION, **info, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name, atomically; one that has the name already is replaced."""
    if final.exists():
        old = final.with_name(f"{TEMPORARY}replaced_{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what runs that died while saving left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        try:
            shutil.rmtree(path)
        except OSError as error:  # a run that is believed dead may still write there
            _log.warning("%s cannot be removed (%s); the next save tries again", path, error)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; each loses its name first, so none is ever half
    there."""
    for path in complete(folder)[:-keep_last]:
        doomed = path.with_name(f"{TEMPORARY}pruned_{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def unanswered(path: Path, error: OSError) -> str:
    """What is said of a file that the disk does not give: nothing is known of its contents."""
    return (
        f"{path} cannot be read now: {error}. Try again once the disk answers; if it never does, rename the "
        f"checkpoint ({DAMAGED}...) to go on from the one before it."
    )


def set_aside(path: Path) -> Path:
    """Take its name from a damaged checkpoint, so that nobody goes on from it; its files stay, under the
    returned name."""
    aside = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def check_files(info: CheckpointInfo) -> None:
    """Refuse a checkpoint with missing, short or long files, or with one that Megatron would take for its
    own old kind of common state.

    Raises:
        CheckpointError: names the first of them.
    """
    if (info.path / _OLD_COMMON).exists():
        raise CheckpointError(
            f"checkpoint {info.path} has a {_OLD_COMMON}, which iomm never writes and Megatron would load. "
            "Remove it, or use another checkpoint."
        )
    for name, size in info.files.items():
        file = info.path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise DamagedCheckpoint(
                f"checkpoint {info.path} is damaged: {name} {problem}. Restore the file or use an "
                "older checkpoint."
            )


def check_names(info: CheckpointInfo) -> None:
    """Refuse a checkpoint of which this machine does not see every file; cheap, for every rank to call.

    Raises:
        CheckpointError: names the first that is missing.
    """
    seen = set(os.listdir(info.path)) if info.path.is_dir() else set()
    for name in info.files:
        if name not in seen:
            raise CheckpointError(
                f"{os.uname().nodename} does not see {name} of checkpoint {info.path}. All machines of a run "
                "need the same out_dir: put it on a disk that they share."
            )


def check_architecture(info: CheckpointInfo, config: Config) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        CheckpointError: names the first setting that differs, with both values.
    """
    ours, saved = config.to_dict(), _with_defaults(info)
    for section in _ARCHITECTURE:
        theirs_value, our_value = _lookup(saved, section), _lookup(ours, section)
        for key in {**our_value, **theirs_value}:  # in the order of config.py
            theirs, own = theirs_value.get(key), our_value.get(key)
            if _comparable(key, theirs) != _comparable(key, own):
                raise CheckpointError(
                    f"checkpoint {info.path} has {key} = {theirs}, this run {own}. "
                    f"Set {key} to {theirs}, or start from another checkpoint."
                )


def _with_defaults(info: CheckpointInfo) -> dict[str, Any]:
    """The run's settings; those that did not exist yet when it was saved have their defaults."""
    try:
        return Config.from_dict(info.config).to_dict()
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {info.path} was saved by iomm {info.iomm_version} with settings that this iomm "
            f"does not take: {error} Use that version."
        ) from error


def _lookup(config: Mapping[str, Any], section: str) -> dict[str, Any]:
    """All settings under a dotted name, by full name, in plain JSON types."""
    node: Any = config
    for part in section.split("."):
        node = node.get(part, {}) if isinstance(node, Mapping) else {}
    if not isinstance(node, Mapping):
        return {section: node}
    return {key: value for name in node for key, value in _lookup(config, f"{section}.{name}").items()}


def _comparable(key: str, value: Any) -> Any:
    if key.endswith(".path") and isinstance(value, str):
        return Path(value).name  # the same model may lie elsewhere on another machine
    return list(value) if isinstance(value, tuple) else value  # JSON knows lists only
