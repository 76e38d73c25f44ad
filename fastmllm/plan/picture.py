"""A picture of a policy's tiles over the image: what is cut where, what is padding, and how large a token is."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastmllm.data.images import open_image, save_png
from fastmllm.data.resolution import Plan, Resize
from fastmllm.data.resolution.plan import View
from fastmllm.plan.tokens import TokenCounts

LONGEST = 1200  # pixels of the canvas
MARGIN, FOOT, FONT = 12, 30, 16
PAPER, PADDING, PLAIN, INK = "#ffffff", "#d8dde3", "#7f9172", "#1f2933"
TILE, OVERVIEW, TOKEN = "#d1495b", "#1b6ca8", "#ffffff"
LEAST = 4  # pixels of the canvas between two lines of tokens

Frame = tuple[float, float, float, float]


def _axis(length: int, view: View, axis: int) -> tuple[float, float]:
    """Return scale and shift of one axis: a pixel p of the image stands at scale p + shift in the view."""
    extent, scale, shift = length, 1.0, 0.0
    for step in view:
        new = (step.width, step.height)[axis]
        if isinstance(step, Resize):
            scale, shift = scale * new / extent, shift * new / extent
        else:
            shift += (step.left, step.top)[axis]
        extent = new
    return scale, shift


def frames(plan: Plan) -> list[tuple[int, Frame]]:
    """Return where each tile lies in the image: its view, and (left, top, right, bottom) in the image's pixels.

    What lies outside of the image is padding.
    """
    found = []
    for tile in plan.tiles:
        (sx, dx), (sy, dy) = (_axis(plan.size[i], plan.views[tile.view], i) for i in (0, 1))
        left, top, right, bottom = tile.box
        found.append((tile.view, ((left - dx) / sx, (top - dy) / sy, (right - dx) / sx, (bottom - dy) / sy)))
    return found


def _cells(plan: Plan, tokens: TokenCounts) -> tuple[int, int]:
    """Return columns and rows of tokens in a tile, in front of a compressor; (1, 1) where they are no grid."""
    if plan.grid_thw is not None:
        _, down, across = plan.grid_thw
        merge = math.isqrt(down * across // tokens.units[0])
        return across // merge, down // merge
    side = math.isqrt(tokens.units[0])
    return (side, side) if side**2 == tokens.units[0] else (1, 1)


def draw(plan: Plan, tokens: TokenCounts, title: str, image: Image.Image | None = None) -> Image.Image:
    """Draw a plan.

    Args:
        plan: of an image.
        tokens: of it.
        title: stands below.
        image: of the plan's size; None: a plain one.

    Returns:
        RGB; tiles with the detail in red, an overview's frame in blue, tokens as white lines where there is room.
    """
    width, height = plan.size
    placed = frames(plan)
    every = [(0.0, 0.0, float(width), float(height)), *(frame for _, frame in placed)]
    left, top = min(f[0] for f in every), min(f[1] for f in every)
    right, bottom = max(f[2] for f in every), max(f[3] for f in every)
    scale = (LONGEST - 2 * MARGIN) / max(right - left, bottom - top)

    def at(frame: Frame) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = ((v - o) * scale + MARGIN for v, o in zip(frame, (left, top, left, top), strict=True))
        return round(x0), round(y0), round(x1), round(y1)

    whole = at((left, top, right, bottom))
    font = ImageFont.load_default(FONT)
    across = max(whole[2], MARGIN + math.ceil(font.getlength(title)))
    canvas = Image.new("RGB", (across + MARGIN, whole[3] + MARGIN + FOOT), PAPER)
    pen = ImageDraw.Draw(canvas, "RGBA")
    pen.rectangle(whole, fill=PADDING)
    inside = at(every[0])
    shown = Image.new("RGB", (1, 1), PLAIN) if image is None else image
    canvas.paste(shown.resize((max(inside[2] - inside[0], 1), max(inside[3] - inside[1], 1))), inside[:2])
    columns, rows = _cells(plan, tokens)
    for number, (view, frame) in enumerate(placed):
        box = at(frame)
        if view == 0:
            _lines(pen, box, columns, rows)
            pen.rectangle(box, outline=TILE, width=3)
            pen.text((box[0] + 8, box[1] + 6), str(number + 1), fill=TILE, font=font)
        else:
            pen.rectangle([box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4], outline=OVERVIEW, width=3)
    pen.text((MARGIN, whole[3] + MARGIN), title, fill=INK, font=font)
    return canvas


def _lines(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], columns: int, rows: int) -> None:
    left, top, right, bottom = box
    if min((right - left) / columns, (bottom - top) / rows) < LEAST:
        return
    for k in range(1, columns):
        x = left + k * (right - left) / columns
        pen.line((x, top, x, bottom), fill=f"{TOKEN}60")
    for k in range(1, rows):
        y = top + k * (bottom - top) / rows
        pen.line((left, y, right, y), fill=f"{TOKEN}60")


def save_picture(plan: Plan, tokens: TokenCounts, policy: str, image: str, path: Path) -> None:
    """Draw a plan into a PNG.

    Args:
        plan, tokens: of the image.
        policy: for the title.
        image: a file, or "1920x1080".
        path: to write.

    Raises:
        ValueError: the file is no image.
    """
    left = f" -> {tokens.llm_left:,}" if tokens.llm_left != tokens.llm else ""
    beside = f", {tokens.cross:,} seen across" if tokens.cross else ""
    title = (
        f"{policy}: {plan.size[0]} x {plan.size[1]}, {len(plan.tiles)} tile(s), {tokens.vit:,} ViT tokens, "
        f"{tokens.llm:,}{left} in the text{beside}, {plan.waste:.0%} of the pixels wasted"
    )
    save_png(draw(plan, tokens, title, open_image(image) if Path(image).exists() else None), path)
