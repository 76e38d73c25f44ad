"""Values of a config.json: each is of its kind and in its range, or the message names the key and the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

MOST_LAYERS = 1024  # above this a number is a mistake, and building that many takes minutes


def read_size(
    raw: Mapping[str, Any], name: str, default: int | None, origin: str, null: int | None = None, least: int = 1,
    most: int = 2**31 - 1,
) -> int:  # fmt: skip
    """Read a whole number.

    Args:
        raw: the object that has it.
        name: its key.
        default: where the key is missing; None: it must be there.
        origin: what the messages call the object.
        null: what null stands for; None: it is refused.
        least, most: the range.

    Raises:
        ValueError: as in all functions here, a value of another kind or out of range.
    """
    value = raw.get(name, default)
    value = null if value is None else value
    if value is None:
        raise ValueError(f"fastmllm::weights: {origin} lacks {name!r}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(origin, name, value, "no whole number")
    if not least <= value <= most:
        raise wrong(origin, name, value, f"not in {least} .. {'2^31 - 1' if most == 2**31 - 1 else most}")
    return value


def read_number(raw: Mapping[str, Any], name: str, default: float | None, origin: str, zero: bool = False) -> float:
    """Read a positive number, or with `zero` 0 too; null is the default."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"fastmllm::weights: {origin} lacks a number {name!r}, it says {value!r}")
    if not (0 < value < math.inf or (zero and value == 0)):  # NaN is neither
        raise wrong(origin, name, value, "no positive number")
    return float(value)


def read_flag(raw: Mapping[str, Any], name: str, default: bool, origin: str) -> bool:
    """Read true or false; null is false."""
    value = raw.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise wrong(origin, name, value, "neither true nor false")
    return bool(value)


_T = TypeVar("_T", int, str)


def read_list(
    raw: Mapping[str, Any], name: str, default: Sequence[_T], kind: type[_T], origin: str, length: int | None = None
) -> Sequence[_T]:
    """Read whole numbers or names, `length` of them or any number; null is the default."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, list | tuple) or not all(type(item) is kind for item in value):
        raise wrong(origin, name, value, f"no list of {'whole numbers' if kind is int else 'names'}")
    if length is not None and len(value) != length:
        raise wrong(origin, name, value, f"no list of {length}")
    return value


def read_pairs(
    raw: Mapping[str, Any], name: str, default: Sequence[tuple[int, int]], origin: str
) -> tuple[tuple[int, int], ...]:
    """Read pairs of whole numbers; null is the default."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, list | tuple):
        raise wrong(origin, name, value, "no list of pairs")
    pairs = [read_list({name: pair}, name, (), int, origin, length=2) for pair in value if pair is not None]
    if len(pairs) != len(value):
        raise wrong(origin, name, value, "no list of pairs")
    return tuple((first, second) for first, second in pairs)


def read_choice(raw: Mapping[str, Any], name: str, default: str, known: Collection[str], origin: str) -> str:
    """Read one of the names that are computed here."""
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"fastmllm::weights: {origin}: {name} {value!r} is not computed here ({', '.join(known)})")
    return value


def read_part(
    raw: Mapping[str, Any], name: str, origin: str, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Read an object inside of an object; missing or null it is the default, if there is one."""
    value = raw.get(name)
    value = default if value is None else value
    if value is None and name not in raw:
        raise ValueError(f"fastmllm::weights: {origin} lacks {name!r}")
    if not isinstance(value, Mapping):
        raise wrong(origin, name, value, "no object")
    return value


@contextmanager
def named(origin: str) -> Iterator[None]:
    """Say whose values do not go together."""
    try:
        yield
    except ValueError as error:
        if origin in str(error):
            raise
        raise ValueError(f"fastmllm::weights: {origin}: {error}") from error


def wrong(origin: str, name: str, value: object, what: str) -> ValueError:
    """Return the error that a value is."""
    return ValueError(f"fastmllm::weights: {origin} says {name!r} is {value!r}, which is {what}")
