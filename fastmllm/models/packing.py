"""From token ids and pictures to a packed batch, by the resolution policy of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastmllm.data.resolution import POLICIES
from fastmllm.data.resolution.plan import Pixels, Plan, Policy
from fastmllm.kernels.cross_attention import media_ranges, segment_ranges
from fastmllm.models.image_path import ImagePath, Seen
from fastmllm.models.inputs import IGNORE, Inputs, make_inputs
from fastmllm.models.tower import Known, Stored

Sample = Sequence[int | Pixels | Known]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How a model takes pictures.

    Args:
        policy: makes tiles of a picture.
        image_token: stands in the text for it.
    """

    policy: Policy
    image_token: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for a config.json."""
        name = next(name for name, cls in POLICIES.items() if type(self.policy) is cls)
        return {"resolution": {"name": name, **asdict(self.policy)}, "image_token_id": self.image_token}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], origin: str) -> Packing:
        """Read what `to_json` wrote.

        Raises:
            ValueError: an unknown policy, or values that it does not have.
        """
        try:
            options = {name: _tuples(value) for name, value in raw["resolution"].items() if name != "name"}
            return cls(policy=POLICIES[raw["resolution"]["name"]](**options), image_token=int(raw["image_token_id"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"fastmllm::MLLM: {origin}: {raw} is no resolution policy ({error})") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def pack(
    samples: Sequence[Sample],
    labels: Sequence[Sequence[int]] | None,
    path: ImagePath,
    packing: Packing,
    *,
    spliced: bool,
    across: str | None,
    mrope: bool,
    paths: Sequence[str] = (),
) -> Inputs:
    """Pack samples of token ids and pictures.

    Args:
        samples: each a sequence of token ids and, where pictures stand, PIL images, (H, W, 3) uint8 or `Known`; an
            object that stands in several places is encoded once.
        labels: aligned with them; -100 where a token is not scored, what stands at a picture does not count.
        path: of the model.
        packing: of the model.
        spliced: visual tokens stand in the text.
        across: which pictures a row sees across: a policy of `media_ranges`; "sample", all of its sample; or None.
        mrope: the language model has positions of grids.
        paths: of the distinct pictures, in the order of their first places, where a store keeps their features.

    Returns:
        The packed batch, on the CPU.

    Raises:
        ValueError: labels do not fit, a picture that the policy refuses, or a placeholder among the token ids.
    """
    if labels is not None and [len(s) for s in samples] != [len(s) for s in labels]:
        raise ValueError(
            f"fastmllm::MLLM.pack: labels of {[len(s) for s in labels][:8]} for samples of "
            f"{[len(s) for s in samples][:8]} tokens and pictures: they must be aligned"
        )
    pictures = [[at for at, item in enumerate(s) if not _is_token(item)] for s in samples]
    ids = [[int(item) if _is_token(item) else packing.image_token for item in s] for s in samples]  # type: ignore[arg-type]
    targets = None
    if labels is not None:
        targets = [
            [int(n) if _is_token(item) else IGNORE for item, n in zip(s, row, strict=True)]
            for s, row in zip(samples, labels, strict=True)
        ]
    images: list[Pixels | Known] = [s[at] for s, places in zip(samples, pictures, strict=True) for at in places]  # type: ignore[misc]
    placeholders = (packing.image_token,) if spliced else ()
    if not images:
        return make_inputs(ids, placeholders=placeholders, labels=targets)
    once = {id(image): image for image in images}  # a picture that stands in several places is encoded once
    numbers = {key: number for number, key in enumerate(once)}
    shown = [[numbers[id(s[at])] for at in places] for s, places in zip(samples, pictures, strict=True)]
    flat = [number for row in shown for number in row]
    plans = [packing.policy.plan(*_size(image)) for image in once.values()]
    seen, arguments, stored = _taken(list(once.values()), plans, path, packing.policy, paths)
    each = _counts(seen, path.merge_size)
    counts = [each[number] for number in flat]
    if spliced:
        grids = [seen.grids[number] for number in flat] if mrope and seen.grids is not None else None
        packed = make_inputs(
            ids, placeholders=placeholders, counts=None if grids else counts, grids=grids, labels=targets,
            images=arguments, spatial_merge_size=path.merge_size,
        )  # fmt: skip
    else:
        packed = make_inputs(ids, labels=targets, images=arguments)
    used = sum(min(plan.effective_pixels, plan.encoder_pixels) for plan in plans)
    pixels = sum(plan.encoder_pixels for plan in plans)
    packed = replace(packed, encoder_pixels=(pixels, used), stored=stored)
    beside = [plan.cross_tokens for plan in plans]
    if len(once) < len(images):
        packed = replace(packed, shown=(rows_of(each, flat), rows_of(beside, flat) if across == "sample" else None))
    if across is None:
        return packed
    bounds = torch.tensor([0, *([beside[number] for number in flat] if across == "sample" else counts)]).cumsum(0).int()
    if across == "sample":
        owned = torch.tensor([0, *map(len, pictures)]).cumsum(0)
        start, stop = segment_ranges(packed.cu_seqlens, bounds[owned], len(packed.plan.source))
    else:
        places = [set(p) for p in pictures]
        marked = [at in p for s, p in zip(samples, places, strict=True) for at in range(len(s))]
        start, stop = media_ranges(torch.tensor(marked), packed.cu_seqlens, bounds, across)
    return packed.with_media(start, stop, int((stop - start).max()))


def _taken(
    pictures: Sequence[Pixels | Known], plans: Sequence[Plan], path: ImagePath, policy: Policy, paths: Sequence[str]
) -> tuple[Seen, Mapping[str, Any] | None, Stored | None]:
    """Return how pictures fit the text, the arguments for those that are to be encoded, and what a store has."""
    known = {n: picture.features for n, picture in enumerate(pictures) if isinstance(picture, Known)}
    new = [n for n in range(len(pictures)) if n not in known]
    tiles = [policy.apply(pictures[n], plans[n]) for n in new]  # type: ignore[arg-type]
    taken = path.take(tiles, [plans[n] for n in new]) if new else None
    if taken is not None and not known and not paths:
        return taken, taken.arguments, None
    seen = path.take([_shapes(plan) for plan in plans], plans)
    stored = Stored(
        paths=tuple(paths),
        sizes=[plan.size for plan in plans],
        patches=[sum(path.units(path.take([_shapes(plan)], [plan]).arguments)) for plan in plans],
        known=known,
        layout={name: value for name, value in seen.arguments.items() if not isinstance(value, Tensor)},
    )
    return seen, None if taken is None else taken.arguments, stored


def _shapes(plan: Plan) -> tuple[Tensor, ...]:
    """Return an image's tiles for each encoder, (n, H, W, 3), without pixels."""
    boxes = [[t.box for t in plan.tiles if t.encoder == e] for e in range(max(t.encoder for t in plan.tiles) + 1)]
    return tuple(
        torch.empty(len(part), part[0][3] - part[0][1], part[0][2] - part[0][0], 3, dtype=torch.uint8, device="meta")
        for part in boxes
    )


def rows_in_text(width: int, height: int, path: ImagePath, packing: Packing, spliced: bool) -> int:
    """Return the rows of a packed batch that a picture of this size, in pixels, takes.

    Args:
        width, height: of the upright picture.
        path, packing, spliced: as `pack`.

    Raises:
        ValueError: the policy refuses it.
    """
    plan = packing.policy.plan(width, height)
    return sum(_counts(path.take([_shapes(plan)], [plan]), path.merge_size)) if spliced else 1


def rows_of(counts: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Return the packed rows of images, in the order of `numbers`, that have `counts` rows each, (N,) int64."""
    starts = [0, *accumulate(counts)]
    return torch.tensor([row for n in numbers for row in range(starts[n], starts[n + 1])], dtype=torch.int64)


def _is_token(item: object) -> bool:
    """Tell a token id, also one of numpy or a tensor's, from a picture."""
    return isinstance(item, int) or getattr(item, "shape", None) == ()


def _size(image: Pixels | Known) -> tuple[int, int]:
    """Return (width, height)."""
    if isinstance(image, Tensor) or hasattr(image, "ndim"):
        return int(image.shape[1]), int(image.shape[0])  # type: ignore[union-attr]
    return image.size  # type: ignore[return-value]


def _counts(seen: Seen, merge_size: int) -> list[int]:
    """Return the visual tokens of each image."""
    if seen.counts is not None:
        return list(seen.counts)
    return [t * h * w // merge_size**2 for t, h, w in seen.grids or ()]
