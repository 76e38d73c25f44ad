"""SigLIP2's NaFlex tower: packed images of any grid against transformers' padded and masked ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_towers import SIZES, assert_gradients, assert_near, normalise, shake
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastmllm.models.naflex import naflex_grid  # noqa: E402
from fastmllm.models.vision import VisionTransformer  # noqa: E402
from fastmllm.models.weights.mapping import to_ours  # noqa: E402
from fastmllm.models.weights.towers import FAMILIES, read_tower  # noqa: E402

GRIDS = [(4, 4), (2, 7), (1, 3), (5, 3)]  # native; wide; shrunk, so that the table is antialiased; mixed
LENGTH = 18  # the oracle pads to it


def tiny_naflex() -> nn.Module:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
    return shake(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16)))


def ours(reference: nn.Module, **changes: Any) -> VisionTransformer:
    return read_tower(reference.config.to_dict(), reference.state_dict(), "the oracle", changes=changes)


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (4 * h, 4 * w, 3), dtype=torch.uint8, generator=generator) for h, w in GRIDS]


def cut(image: Tensor, config: Any) -> Tensor:
    """Normalise an image and cut it as the processor does: (h * w, P * P * 3) in (row, column, channel) order."""
    x = normalise(image[None], config)[0]
    return x.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).permute(1, 3, 2, 4, 0).reshape(-1, 48)


def padded(config: Any) -> dict[str, Tensor]:
    """Return the oracle's input; the padding's pixels are not zero: they must not matter."""
    values, mask = torch.full((len(GRIDS), LENGTH, 48), 3.0), torch.zeros(len(GRIDS), LENGTH)
    for row, image in enumerate(images()):
        patches = cut(image, config)
        values[row, : len(patches)], mask[row, : len(patches)] = patches, 1
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(GRIDS)}


def packed(x: Tensor) -> Tensor:
    return torch.cat([row[: h * w] for row, (h, w) in zip(x, GRIDS, strict=True)])


def their_gradients(reference: nn.Module, model: VisionTransformer) -> dict[str, Tensor]:
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    family = FAMILIES["siglip2_vision_model"]
    translated, _ = to_ours(grads, family.rules(model.config), "the oracle", family.unused(model.config))
    return {name: grad for name, grad in translated.items() if name in dict(model.named_parameters())}


@pytest.mark.parametrize("layer", [None, -2])
def test_packed_equals_padded_forward_and_backward(layer: int | None) -> None:
    reference = tiny_naflex()
    changes: dict[str, Any] = {} if layer is None else {"layer": layer, "final_norm": False}
    model = ours(reference, **changes)
    out = reference(**padded(model.config), output_hidden_states=True)
    expected = packed(out.last_hidden_state if layer is None else out.hidden_states[layer])
    y = model.forward_packed(images())
    assert_near(y, expected)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_gradients(model, their_gradients(reference, model))
    patches = torch.cat([cut(image, model.config) for image in images()])
    assert_near(model.forward_packed(patches, GRIDS), y, 1e-6)


def test_one_column_of_patches_has_the_positions_of_one_row_of_the_transposed_table() -> None:
    # No grid (h, 1) above: torch 2.13 on the CPU resamples wrongly, antialiased, to a width of 1 where the height
    # changes too, and with it transformers 5.23: up to 0.9 off on a 4 x 4 table of standard normals.
    model = ours(tiny_naflex(), layer=0, final_norm=False)
    table = model.patch_embed.position
    grey = torch.zeros(3, 48)
    column = model.forward_packed(grey, [(3, 1)])
    transposed = table.detach().view(4, 4, -1).transpose(0, 1).reshape(16, -1)
    with torch.no_grad():
        table.copy_(transposed)
    assert_near(model.forward_packed(grey, [(1, 3)]), column, 1e-6)


def test_the_pooling_head_reads_no_padding() -> None:
    reference = tiny_naflex()
    model = ours(reference, pool=True)
    expected = reference(**padded(model.config)).pooler_output
    y = model.forward_pooled(images())
    assert_near(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model, their_gradients(reference, model))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    model = ours(tiny_naflex())
    together = model.forward_packed(images()).split([h * w for h, w in GRIDS])
    for image, mine, (h, w) in zip(images(), together, GRIDS, strict=True):
        assert_near(model.forward_packed([image]), mine, 1e-6)
        assert_near(model(image[None])[0], mine, 1e-6)
        assert mine.shape == (h * w, 32)
    with torch.no_grad():
        half = ours(tiny_naflex()).bfloat16().forward_packed(images())
    assert_near(half, torch.cat(together), 0.1)


def test_a_table_that_is_no_square_is_refused() -> None:
    raw = tiny_naflex().config.to_dict() | {"num_patches": 15}
    with pytest.raises(ValueError, match="num_patches 15"):
        FAMILIES["siglip2_vision_model"].config(raw)


def test_the_grid_is_the_processors() -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    generator = torch.Generator().manual_seed(0)
    cases = torch.randint(1, 3000, (60, 2), generator=generator).tolist()
    for height, width in [*cases, [1, 1], [1, 5000], [16, 16], [224, 224]]:
        for patch, most in ((16, 256), (14, 729), (16, 1), (32, 64)):
            expected = get_image_size_for_max_num_patches(height, width, patch, most)
            h, w = naflex_grid(height, width, patch, most)
            assert (h * patch, w * patch) == expected
            assert h * w <= most
    with pytest.raises(ValueError, match="height=0"):
        naflex_grid(0, 10)
