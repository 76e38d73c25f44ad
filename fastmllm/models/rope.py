"""Rotary positions of language models: the frequencies and their scalings, one position a token or three (M-RoPE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TWO_PI = 2 * math.pi
_KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Stretch the rotary frequencies of a model beyond the length that it was first trained for.

    Args:
        kind: "linear" divides all frequencies by `factor` (position interpolation, arXiv 2306.15595); "llama3" divides
            the slow ones (Llama 3.1); "yarn" blends between the two and scales the tables (arXiv 2309.00071);
            "dynamic" changes nothing up to the model's `max_positions`, and longer sequences are refused: there
            transformers' frequencies depend on the longest sequence of the batch, and on earlier batches.
        factor: how much longer, >= 1 as published.
        original_max_positions: length of the first training ("llama3", "yarn").
        low_freq_factor, high_freq_factor: "llama3", wavelengths over `original_max_positions` that bound the blend.
        beta_fast, beta_slow: "yarn", turns within `original_max_positions` that bound the blend.
        truncate: "yarn", round those bounds to whole frequencies.
        attention_factor: "yarn", multiplies cosine and sine; None for 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"fastmllm::RopeScaling: kind {self.kind!r} is not one of {', '.join(_KINDS)}")
        if self.factor <= 0:
            raise ValueError(f"fastmllm::RopeScaling: factor must be positive, got {self.factor}")
        if self.kind in ("llama3", "yarn") and not (self.original_max_positions or 0) > 0:
            raise ValueError(f"fastmllm::RopeScaling: {self.kind} needs a positive original_max_positions")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"fastmllm::RopeScaling: low_freq_factor {self.low_freq_factor} must be positive and below "
                f"high_freq_factor {self.high_freq_factor}"
            )

    @property
    def table_factor(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.kind != "yarn":
            return 1.0
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's length-dependent temperature, 0.1 * scale * ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Compute the turn of every pair of entries a position, in radians; nothing is read back from the device.

    Args:
        head_dim: Dh, even.
        theta: base of the frequencies.
        scaling: None for the plain ones.
        device: of the result.

    Returns:
        (Dh/2,) fp32.
    """
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    plain = 1.0 / powers
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    assert scaling.original_max_positions is not None
    if scaling.kind == "llama3":
        return _llama3(plain, scaling, scaling.original_max_positions)

    def turned(turns: float) -> float:
        """Return the index of the frequency that turns so often within the original length."""
        length = scaling.original_max_positions or 0
        return head_dim * math.log(length / (turns * _TWO_PI)) / (2 * math.log(theta))

    low, high = turned(scaling.beta_fast), turned(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    keep = 1 - ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - keep) + plain * keep


def _llama3(plain: Tensor, scaling: RopeScaling, length: int) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wave = _TWO_PI / plain
    smooth = (length / wave - low) / (high - low)
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    slow, fast = wave > length / low, wave < length / high
    return torch.where(slow, plain / scaling.factor, torch.where(fast, plain, blended))


def rope_tables(
    position_ids: Tensor,
    frequencies: Tensor,
    mrope_section: Sequence[int] | None = None,
    interleaved: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of every token, in fp32; the halves of a head share them.

    Args:
        position_ids: (T,), or (3, T) time, row and column with `mrope_section`.
        frequencies: (Dh/2,) from `rope_frequencies`.
        mrope_section: host, how many frequencies follow time, row and column.
        interleaved: the three take turns and time has the rest (Qwen3-VL); otherwise one after another (Qwen2-VL).
        factor: multiplies both tables (YaRN).

    Returns:
        Two (T, Dh/2) tables (RoFormer, arXiv 2104.09864; M-RoPE, arXiv 2409.12191).

    `fastmllm.kernels` has `mrope_tables` for frequencies that are not scaled; a scaled model needs its own.
    """
    angles = position_ids.float().unsqueeze(-1) * frequencies  # (T, Dh/2) or (3, T, Dh/2)
    if angles.dim() == 3:
        assert mrope_section is not None
        if interleaved:
            mixed = angles[0].clone()
            for axis in (1, 2):
                own = slice(axis, 3 * mrope_section[axis], 3)
                mixed[:, own] = angles[axis, :, own]
        else:
            parts = angles.split(list(mrope_section), dim=-1)
            mixed = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        angles = mixed
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)
