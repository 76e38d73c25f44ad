"""Names and layouts of published checkpoints as tables that are read in both directions.

A table is a list of rules. Wildcards stand in braces: {i}, {j} for digits, {p} for weight or bias, others for one word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastmllm.modules.patch_embed import conv_to_patch_weight

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # computed with, and joined with each other


Shape = tuple[int, ...] | None


class Misfit(Exception):
    """A tensor of a checkpoint has a shape or a type that a form does not take; `to_ours` says which one."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at


def expect(theirs: Sequence[Tensor], *shape: int, at: int = 0) -> None:
    """Raise a `Misfit` unless a tensor has this shape, -1 for any size."""
    found = theirs[at].shape
    if len(found) != len(shape) or any(size not in (-1, own) for size, own in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise Misfit(at, f"is {tuple(found)}, not ({wanted})")


class Form:
    """How tensors of a checkpoint become tensors of ours: as they are."""

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        """Turn a checkpoint's tensors into ours.

        Raises:
            Misfit: one has a shape or a type that is not taken. What the model's config decides is for `fill` to say.
        """
        return theirs

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        """Turn ours back."""
        return ours


@dataclass(frozen=True, slots=True)
class Join(Form):
    """Several tensors of a checkpoint, one of ours: joined along the first axis.

    Args:
        sizes: rows of each; None for equal parts.
        parts: how many, for equal parts.
    """

    parts: int = 3
    sizes: tuple[int, ...] | None = None

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        rows, *row = theirs[0].shape or (-1,)
        for at in range(len(theirs)):
            expect(theirs, self.sizes[at] if self.sizes else rows, *row, at=at)
            if {theirs[0].dtype, theirs[at].dtype} - FLOATS and theirs[0].dtype != theirs[at].dtype:
                raise Misfit(at, f"is {theirs[at].dtype}, but is joined with {theirs[0].dtype}")
        return [torch.cat(theirs)]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        whole = ours[0]
        return list(whole.split(list(self.sizes)) if self.sizes else whole.chunk(self.parts))


@dataclass(frozen=True, slots=True)
class Conv(Form):
    """A patch convolution (D, C, P, P) or (D, C, T, P, P); ours is the matrix (K, D) in (frame, row, column, channel).

    Args:
        patch_size: P.
        frames: T of a three-dimensional convolution, None for a flat one.
        channels: C.
    """

    patch_size: int
    frames: int | None = None
    channels: int = 3

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        p = self.patch_size
        expect(theirs, -1, self.channels, *([self.frames] if self.frames else []), p, p)
        return [conv_to_patch_weight(theirs[0])]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        p = self.patch_size
        conv = ours[0].t().reshape(-1, self.frames or 1, p, p, self.channels).permute(0, 4, 1, 2, 3)
        return [(conv if self.frames else conv.squeeze(2)).contiguous()]


@dataclass(frozen=True, slots=True)
class View(Form):
    """The same numbers in another shape, each with at most one -1."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        expect(theirs, *self.theirs)
        return [theirs[0].reshape(self.ours)]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        return [ours[0].reshape(self.theirs)]


@dataclass(frozen=True, slots=True)
class Positions(Form):
    """A position table with a class token's row in front, (1 + N, D) or (1, 1 + N, D); ours are (D,) and (N, D)."""

    leading: bool = False  # theirs has a leading axis of 1

    def pack(self, theirs: list[Tensor]) -> list[Tensor]:
        expect(theirs, *([1] if self.leading else []), -1, -1)
        table = theirs[0].flatten(0, -2)
        return [table[:1].flatten().clone(), table[1:].clone()]

    def unpack(self, ours: list[Tensor]) -> list[Tensor]:
        table = torch.cat([ours[0][None], ours[1]])
        return [table[None] if self.leading else table]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table.

    Args:
        ours: our name, or several.
        theirs: the checkpoint's name, or several, in the order in which `form` takes them.
        form: what happens to the numbers.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    form: Form = field(default_factory=Form)


def prefixed(rules: Iterable[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """Put prefixes in front of every name of a table."""
    return [
        replace(r, ours=tuple(ours + n for n in _names(r.ours)), theirs=tuple(theirs + n for n in _names(r.theirs)))
        for r in rules
    ]


def to_ours(
    state: Mapping[str, Tensor], rules: Sequence[Rule], origin: str, unused: Mapping[str, Shape] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Translate a checkpoint's state dict.

    Args:
        state: the checkpoint's names and tensors.
        rules: the table; the first rule that fits a name counts.
        origin: what the messages call the checkpoint.
        unused: patterns of names that this model does not compute with, and their shapes, -1 for any size and None for
            any shape; they are kept apart.

    Returns:
        Our state dict, and the unused tensors under their own names: `to_theirs` writes them back.

    Raises:
        ValueError: a name that no rule knows, a tensor of a shape or type that its form does not take, or one that
            others need to be joined with is missing.
    """
    return _translate(state, [(r.theirs, r.ours, r.form.pack) for r in rules], origin, unused or {})


def to_theirs(
    state: Mapping[str, Tensor], rules: Sequence[Rule], rest: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Translate our state dict back into a checkpoint's; `rest` is what `to_ours` kept apart."""
    theirs, _ = _translate(state, [(r.ours, r.theirs, r.form.unpack) for r in rules], "this model", {})
    return theirs | dict(rest or {})


def their_name(name: str, rules: Sequence[Rule]) -> str:
    """Return the checkpoint's name for a tensor of ours, or several; ours where no rule has it."""
    for rule in rules:
        for ours in _names(rule.ours):
            if found := _pattern(ours).fullmatch(name):
                return " + ".join(theirs.format(**found.groupdict()) for theirs in _names(rule.theirs))
    return name


def fill(
    model: nn.Module, state: Mapping[str, Tensor], origin: str, their: Callable[[str], str] = lambda name: name
) -> None:
    """Give every parameter of `model` its tensor (the tensor itself: a model built on the meta device is filled).

    Args:
        model: its parameters and persistent buffers must be those of `state`.
        state: our names.
        origin: what the messages call the checkpoint.
        their: what they call a tensor of ours.

    Raises:
        ValueError: tensors are missing, too many, of another shape, or whole numbers where the model has fractions
            (quantised); the message names them.
    """
    own = model.state_dict()
    wrong = [
        f"{their(name)} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    whole = [
        f"{their(name)} is {state[name].dtype}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    for what, names in (
        ("lacks", [their(n) for n in own if n not in state]),
        ("has what the model does not", [their(n) for n in state if n not in own]),
        ("has other shapes than its config says", wrong),
        ("is quantised, which is not computed here", whole),
    ):
        if names:
            raise ValueError(f"fastmllm::weights: {origin} {what}: {_some(names)}")
    model.load_state_dict(dict(state), strict=True, assign=True)


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_WILD = {"i": r"\d+", "j": r"\d+", "p": "weight|bias"}


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile(
        "".join(f"(?P<{p}>{_WILD.get(p, r'[^.]+')})" if k % 2 else re.escape(p) for k, p in enumerate(parts))
    )


def _expect_named(name: str, tensor: Tensor, shape: tuple[int, ...], origin: str) -> None:
    try:
        expect([tensor], *shape)
    except Misfit as error:
        raise ValueError(f"fastmllm::weights: {origin}: {name} {error}") from None


_Change = Callable[[list[Tensor]], list[Tensor]]
_Line = tuple[str | tuple[str, ...], str | tuple[str, ...], _Change]  # names in, names out, what happens between


def _translate(
    state: Mapping[str, Tensor], table: Sequence[_Line], origin: str, unused: Mapping[str, Shape]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sources = [(_pattern(n), k, at) for k, (names, _, _) in enumerate(table) for at, n in enumerate(_names(names))]
    kept_apart = [(_pattern(name), shape) for name, shape in unused.items()]
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        for pattern, k, at in sources:
            if found := pattern.fullmatch(name):
                groups.setdefault((k, tuple(sorted(found.groupdict().items()))), {})[at] = tensor
                break
        else:
            for pattern, shape in kept_apart:
                if pattern.fullmatch(name):
                    rest[name] = tensor
                    if shape is not None:
                        _expect_named(name, tensor, shape, origin)
                    break
            else:
                unknown.append(name)
    if unknown:
        raise ValueError(f"fastmllm::weights: {origin} has tensors that nothing here computes with: {_some(unknown)}")
    result: dict[str, Tensor] = {}
    for (k, wild), parts in groups.items():
        names, targets, change = table[k]
        values = dict(wild)
        wanted = [name.format(**values) for name in _names(names)]
        if missing := [name for at, name in enumerate(wanted) if at not in parts]:
            raise ValueError(f"fastmllm::weights: {origin} lacks {_some(missing)}")
        try:
            changed = change([parts[at] for at in range(len(wanted))])
        except Misfit as error:
            raise ValueError(f"fastmllm::weights: {origin}: {wanted[error.at]} {error}") from None
        result |= dict(zip([name.format(**values) for name in _names(targets)], changed, strict=True))
    return result, rest
