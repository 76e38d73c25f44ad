"""Read a recipe: YAML plus `section.key=value` overrides into the rooms' frozen dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A recipe says something that no room understands; the message names the key and the remedy."""


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and apply overrides such as `data.num_concepts=24` or `stages.0.steps=10`.

    Raises:
        ConfigError: the file is missing or no mapping, or an override does not address a value.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"recipe {path}: no such file" + (f"; {path.parent} has {', '.join(known)}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"recipe {path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"override {text!r}: write section.key=value, for example data.num_concepts=24")
    node: Any = tree
    *path, last = key.split(".")
    for part in path:
        node = _child(node, part, key, create=True)
    parsed = _parse(value, text)
    _child(node, last, key)  # the parent must be able to hold it
    node[int(last) if isinstance(node, list) else last] = parsed


def _parse(value: str, override: str) -> Any:
    """Read an override's value: lists, mappings and quoted text as YAML, all else as one number, bool, null or text.

    Text stays whole, where YAML would cut it at " #" and read "~" as null: paths have both.
    """
    value = value.strip()
    if value.startswith(("[", "{", '"', "'")):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(
                f"override {override!r}: not valid YAML ({reason}); close what is open, or put quotes around text"
            ) from error
    if value == "null":
        return None
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False))
    if tag.rpartition(":")[2] in ("int", "float", "bool"):
        with contextlib.suppress(ValueError):  # "0x_" looks like a number and is none
            return yaml.safe_load(value)
    return value


def _child(node: Any, part: str, key: str, create: bool = False) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise ConfigError(f"override {key!r}: {part!r} is not an index below {len(node)}")
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key!r}: {part!r} lies inside a plain value")
    if create and node.get(part) is None:
        node[part] = {}
    return node.get(part)


def build(cls: type, value: Any, where: str) -> Any:
    """Turn a mapping into the dataclass `cls`, recursively.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, or a value of the wrong kind.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {cls.__name__} keys, found {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}.{key}: unknown key; {hint}")
    arguments = {key: _coerce(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"{where}.{name}: missing; {cls.__name__} needs it")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        if isinstance(value, Mapping) and all(dataclasses.is_dataclass(option) for option in options):
            # the one that has most of the keys, so that what is wrong is said in its words
            return _coerce(
                max(options, key=lambda o: len({f.name for f in dataclasses.fields(o)} & set(value))), value, where
            )
        for option in options[:-1]:
            try:
                return _coerce(option, value, where)
            except ConfigError:
                continue
        return _coerce(options[-1], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_coerce(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}")
        return {k: _coerce(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is Any or (hint is int and type(value) is int) or (hint in (bool, str) and isinstance(value, hint)):
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
