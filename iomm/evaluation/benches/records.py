"""JSON and JSON lines that others wrote: an error names the file and the line."""

import json
from pathlib import Path
from typing import Any

from iomm.evaluation.benches.layout import BenchError


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSON-lines file, as they stand and as objects; empty lines are left out.

    Raises:
        BenchError: a line that is no JSON object, or no UTF-8.
        OSError: no such file.
    """
    lines = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            lines.append((line, _object(line, f"{path}, line {number}")))
    return lines


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BenchError: no JSON.
        OSError: no such file.
    """
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise BenchError(f"{path} is no JSON ({error}). Give the file as it was written.") from error


def field[T](record: dict[str, Any], name: str, kind: type[T] | tuple[type[T], ...], where: str) -> T:
    """A field of a record.

    Raises:
        BenchError: it is not there, or of another type.
    """
    value = record.get(name)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    types = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    raise BenchError(
        f"{where}: {name} must be {types}, got {value!r}; it has {', '.join(record)}. Give the "
        "file as it was written."
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is no UTF-8 text ({error}). Give the file as it was written.") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where} is no JSON ({error}). Give the file as it was written.") from error
    if not isinstance(record, dict):
        raise BenchError(f"{where} is no JSON object: {line[:80]}. Give the file as it was written.")
    return record
