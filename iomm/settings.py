"""Settings from plain data: dictionaries as JSON holds them, and the command line's `a.b=value`."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


def require(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless `ok`."""
    if not ok:
        raise ValueError(message)


def parse(raw: str) -> Any:
    """A value as the command line has it: JSON where it parses as such, else text."""
    text = {"True": "true", "False": "false", "None": "null"}.get(raw.strip(), raw.strip())
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return raw


def unknown(key: str, known: list[str], prefix: str) -> str:
    """The message for a setting that there is not, with the nearest one that there is."""
    full = f"{prefix}.{key}" if prefix else key
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = (
        f"Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
        if near
        else f"Known: {', '.join(sorted(known)) or 'none'}."
    )
    return f"unknown setting {full}. {hint}"


def build(cls: Any, data: Mapping[str, Any], prefix: str) -> Any:
    """An instance of dataclass `cls` from plain data, every key and type checked.

    Args:
        prefix: of the settings' names in messages, "" or such as "optimizer".
    Raises:
        ValueError: an unknown key, a missing one, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ValueError(unknown(key, list(fields), prefix))
    values = {}
    for name, spec in fields.items():
        full = f"{prefix}.{name}" if prefix else name
        if name in data:
            values[name] = _coerce(hints[name], data[name], full)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ValueError(f"setting {full} is missing and has no default.")
    return cls(**values)


def _coerce(kind: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"setting {name} must be a section, got {value!r}.")
        return build(kind, value, name)
    if origin is Literal:
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        require(
            value in args,
            f"setting {name} is {value!r}; it must be one of {', '.join(map(str, args))}.{hint}",
        )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            require(type(None) in args, f"setting {name} must not be null.")
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, name)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        require(isinstance(items, list | tuple), f"setting {name} must be a list, got {value!r}.")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], v, name) for v in items)
        require(len(items) == len(args), f"setting {name} must have {len(args)} values, got {len(items)}.")
        return tuple(_coerce(a, v, name) for a, v in zip(args, items, strict=True))
    return _scalar(kind, value, name)


def _scalar(kind: type, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # `--set name=7` parses as a number
    ok = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(ok, f"setting {name} must be {kind.__name__}, got {value!r} ({type(value).__name__}).")
    return value
