"""A Run to and from plain dictionaries (config.json), strict about names and types."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from mmx.config.errors import ConfigError, nearest
from mmx.config.run import Run


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Run, where: str = "") -> Any:
    """Builds a configuration dataclass from what ``to_dict`` made; absent fields keep their defaults.

    Raises:
      ConfigError: for an unknown field (the nearest name is suggested) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise ConfigError(f"unknown field {path!r}{nearest(name, known)}")
        built[name] = _convert(value, hints[name], path)
    try:
        return cls(**built)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def _convert(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a group of fields, not {value!r}")
        return from_dict(value, hint, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, not {value!r}")
        return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, args[0], path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {value!r}")
    return value


def save_json(run: Run, path: str | Path) -> None:
    """Writes the resolved configuration."""
    Path(path).write_text(json.dumps(to_dict(run), indent=2) + "\n")


def load_json(path: str | Path) -> Run:
    """Reads what ``save_json`` wrote. Raises ConfigError if the file is missing or is not such a file."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is this a directory that launch.pretrain wrote?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a configuration")
    return from_dict(values)


def check_field(run: Run, path: str) -> None:
    """Raises ConfigError if the dotted ``path`` names no field of ``run``, suggesting the nearest name."""
    node: Any = run
    parts = path.split(".")
    for depth, name in enumerate(parts):
        name = name.split("[")[0]
        fields = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name not in fields:
            parent = ".".join(parts[:depth]) or "config"
            raise ConfigError(f"unknown field {path!r}: {parent} has no {name!r}{nearest(name, fields)}")
        node = getattr(node, name)
