"""patch_embed: the operator equals normalise + convolution, Triton and native code equal it, autograd holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided
from patch_inputs import MEAN, PACKED, SCALE, SHIFT, STD
from patch_inputs import inputs as _inputs
from patch_inputs import packed_inputs as _packed_inputs

from fastmllm.kernels import _native
from fastmllm.kernels import patch_embed as op
from fastmllm.kernels.layer_norm import layer_norm
from fastmllm.kernels.patch_embed import patch_embed, patch_embed_packed, patch_weight

# I, H, W, P, D
SHAPES = [(2, 28, 42, 14, 33), (1, 32, 16, 16, 40), (3, 4, 6, 2, 5)]


def _torch(pixels, weight, bias, position, patch, mean=MEAN, std=STD):
    """Image processor + patch convolution + positions, as vision transformers do it."""
    channels, dim = pixels.shape[-1], weight.shape[1]
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(weight.dtype) / 255
    x = (pixels - torch.tensor(mean, dtype=weight.dtype)) / torch.tensor(std, dtype=weight.dtype)
    kernel = weight.view(patch, patch, channels, dim).permute(3, 2, 0, 1)
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride=patch)
    return out.flatten(2).transpose(1, 2) + position


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
def test_matches_torch(shape, dtype, uint8):
    inputs, patch = _inputs(shape, dtype, uint8), shape[3]
    pixels, *parameters = [strided(t) for t in inputs]
    leaves = [t.requires_grad_() for t in ([] if uint8 else [pixels]) + parameters]
    out = patch_embed(pixels, *parameters, mean=MEAN, std=STD, patch_size=patch)
    wide = [t if t.dtype == torch.uint8 else t.double() for t in inputs]
    assert out.dtype == dtype
    assert_as_accurate(out, _torch(*inputs, patch), _torch(*wide, patch), ulps=8)
    seed = torch.randn(out.shape).to(dtype)
    got = gradients([out], leaves, [seed])
    for a, s, o in zip(got, _torch_gradients(inputs, seed, patch), _torch_gradients(wide, seed, patch), strict=True):
        assert_as_accurate(a, s, o, ulps=16)


@pytest.mark.parametrize("shape", [(0, 8, 8, 4, 16), (2, 0, 8, 4, 16)])
@pytest.mark.parametrize("uint8", [True, False])
def test_empty(shape, uint8):
    pixels, *parameters = _inputs(shape, torch.float32, uint8)
    leaves = [t.requires_grad_() for t in parameters]
    out = patch_embed(pixels, *leaves, mean=MEAN, std=STD, patch_size=4)
    assert out.shape == (shape[0], len(leaves[2]), 16)
    for t, g in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(t))


@pytest.mark.parametrize("uint8", [True, False])
def test_planar_pixels_and_a_prefix(uint8):
    """(I, C, H, W) with the same weight; a class token and registers in front."""
    inputs = _inputs((2, 6, 8, 2, 5), torch.float32, uint8)
    pixels, *parameters = inputs
    planar, prefix = pixels.permute(0, 3, 1, 2).contiguous(), torch.randn(3, 5)
    leaves = [t.requires_grad_() for t in ([] if uint8 else [planar]) + [*parameters, prefix]]
    out = patch_embed(planar, *parameters, mean=MEAN, std=STD, patch_size=2, layout="chw", prefix=prefix)
    want = patch_embed(pixels, *parameters, mean=MEAN, std=STD, patch_size=2)
    torch.testing.assert_close(out, torch.cat([prefix.expand(2, -1, -1), want], 1))
    seed = torch.randn(out.shape)
    got = gradients([out], leaves, [seed])
    pixels = pixels if uint8 else pixels.requires_grad_()
    want = patch_embed(pixels, *parameters, mean=MEAN, std=STD, patch_size=2)
    want = gradients([want], ([] if uint8 else [pixels]) + parameters, [seed[:, 3:]])
    if not uint8:
        want = [want[0].permute(0, 3, 1, 2), *want[1:]]
    for g, w in zip(got, [*want, seed[:, :3].sum(0)], strict=True):
        torch.testing.assert_close(g, w)


def _torch_packed(pixels, weight, bias, position, prefix, case, mean=MEAN, std=STD):
    """Normalise, convolve each video on its own (Conv3d), reorder into merge blocks, add positions."""
    grids, frames, merge, planar, patch, dim = case
    kernel = weight.view(frames, patch, patch, 3, dim).permute(4, 3, 0, 1, 2)
    shape = [-1, 1, 1, 1]
    mean, std = torch.tensor(mean, dtype=weight.dtype).view(shape), torch.tensor(std, dtype=weight.dtype).view(shape)
    out, lengths, start = [weight.new_empty(0, dim)], [], 0
    for g in grids:
        t, (h, w) = g[0] if len(g) == 3 else 1, g[-2:]
        size = t * frames * h * w * patch * patch * 3
        video, start = pixels[start : start + size], start + size
        spatial = (h * patch, w * patch)
        video = video.view(t * frames, 3, *spatial) if planar else video.view(t * frames, *spatial, 3).movedim(3, 1)
        video = video.to(weight.dtype) / 255 if pixels.dtype == torch.uint8 else video
        normed = (video.transpose(0, 1) - mean) / std  # (C, F, H, W)
        y = weight.new_empty(dim, t, h, w)
        if y.numel():
            y = F.conv3d(normed[None], kernel, bias, stride=(frames, patch, patch))[0]
        y = y.view(dim, t, h // merge, merge, w // merge, merge).permute(1, 2, 4, 3, 5, 0)
        out.append(y.reshape(t * h * w, dim))
        lengths += [h * w] * t
    rows = torch.cat(out) + position
    parts = rows.split(lengths)
    return torch.cat([x for p in parts for x in (prefix, p) if x is not None] or [rows]), lengths


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("prefix_rows", [0, 2])
def test_packed_matches_torch(case, dtype, uint8, prefix_rows):
    grids, frames, merge, planar, patch, _ = case
    inputs = _packed_inputs(case, dtype, uint8, prefix_rows=prefix_rows)
    leaves = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()]
    pixels, *parameters, prefix = inputs
    out, cu_seqlens = patch_embed_packed(
        pixels, *parameters, grid_thw=grids, mean=MEAN, std=STD, patch_size=patch, temporal_patch_size=frames,
        merge_size=merge, layout="chw" if planar else "hwc", prefix=prefix,
    )  # fmt: skip
    same, lengths = _torch_packed(*inputs, case)
    wide_inputs = [t.detach().double() if t is not None and t.is_floating_point() else t for t in inputs]
    wide_leaves = [t.requires_grad_() for t in wide_inputs if t is not None and t.is_floating_point()]
    wide, _ = _torch_packed(*wide_inputs, case)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist() == [n + prefix_rows for n in lengths]
    assert_as_accurate(out, same, wide, ulps=8)
    seed = torch.randn(out.shape).to(dtype)
    runs = zip(
        *(gradients([o], ls, [seed]) for o, ls in ((out, leaves), (same, leaves), (wide, wide_leaves))), strict=True
    )
    for got, torchs, oracle in runs:
        if oracle is not None:
            assert_as_accurate(got, torchs, oracle, ulps=16)


def test_packed_takes_lists_of_images_and_videos():
    torch.manual_seed(0)
    images = [torch.rand(4, 6, 3), torch.rand(2, 2, 4, 3), torch.rand(0, 4, 3)]
    weight = torch.randn(12, 5)
    got, cu_seqlens = patch_embed_packed(images, weight, patch_size=2)
    want = [patch_embed(x if x.dim() == 4 else x[None], weight, patch_size=2).view(-1, 5) for x in images]
    torch.testing.assert_close(got, torch.cat(want))
    assert cu_seqlens.tolist() == [0, 6, 8, 10, 10]
    planar, _ = patch_embed_packed([x.movedim(-1, -3) for x in images], weight, patch_size=2, layout="chw")
    torch.testing.assert_close(planar, got)


def test_a_segment_does_not_depend_on_its_neighbours(device):
    """To the bit; in whole numbers, as the interpreter's product sums in an order that depends on the row's place."""
    case = ([(3, 5), (4, 2), (1, 1)], 1, 1, False, 2, 9)
    pixels, *rest, _ = _packed_inputs(case, torch.float32, True, device)
    w, b, p = ((9 * t).round() for t in rest)
    last = (2, 1, 1, False, [0.5] * 3, [1.0] * 3)

    def run(grids, pixels, p):
        return op.patch_embed_triton(pixels, w, b, p, None, op.grid_table(grids, 0, pixels.device), *last)

    both = run(case[0], pixels, p)
    assert torch.equal(both[15:23], run([(4, 2)], pixels[15 * 12 : 23 * 12], p[15:23]))
    assert torch.equal(both, run(case[0], pixels, p))


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_patches_cut_by_a_processor(order):
    """The matrix product alone, with positions and a prefix; a still image at half the work."""
    torch.manual_seed(0)
    conv = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    frame = torch.randn(6, 3, 1, 4, 4, dtype=torch.float64)
    patches = frame.expand(-1, -1, 2, -1, -1)
    want = torch.einsum("nctyx,dctyx->nd", patches, conv)
    patches = patches.reshape(6, -1) if order == "chw" else patches.permute(0, 2, 3, 4, 1).reshape(6, -1)
    position, prefix = torch.randn(6, 7, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64)
    grids = [(1, 2, 1), (2, 2, 1)]
    for still in (False, True):
        weight = patch_weight(conv, order, still)
        got, cu = patch_embed_packed(patches, weight, None, position, grid_thw=grids, patch_size=4, still=still,
                                     temporal_patch_size=2, layout=order, prefix=prefix)  # fmt: skip
        assert cu.tolist() == [0, 3, 6, 9]
        parts = (want + position).split(2)
        torch.testing.assert_close(got, torch.cat([x for part in parts for x in (prefix, part)]))
        (grad,) = torch.autograd.grad(got.sum(), conv, retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), conv, retain_graph=True)[0])
    assert patch_weight(conv[:, :, 0], "chw")._base is not None, "a view: no copy in every step"


def test_equals_qwen2_vl():
    """Image processor and Conv3d embedding end to end: from its patches, from them as stills, from pixels."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    torch.manual_seed(0)
    images = [torch.randint(0, 256, s, dtype=torch.uint8) for s in ((56, 112, 3), (84, 56, 3))]
    made = processing.Qwen2VLImageProcessorPil(do_resize=False)([x.numpy() for x in images], return_tensors="pt")
    conv = modeling.PatchEmbed(embed_dim=16)
    want = conv(made["pixel_values"])
    weight = conv.proj.weight.detach()
    options = {"patch_size": 14, "grid_thw": made["image_grid_thw"]}
    cut = {"temporal_patch_size": 2, "layout": "chw", **options}
    got, cu_seqlens = patch_embed_packed(made["pixel_values"], patch_weight(weight, "chw"), **cut)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert cu_seqlens.tolist() == [0, 32, 56]
    got, _ = patch_embed_packed(made["pixel_values"], patch_weight(weight, "chw", still=True), still=True, **cut)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    affine = {"mean": MEAN, "std": STD, "merge_size": 2}
    folded = patch_weight(weight, still=True)
    got, _ = patch_embed_packed(torch.cat([x.flatten() for x in images]), folded, **options, **affine)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got, _ = patch_embed_packed([x.expand(2, -1, -1, -1) for x in images], patch_weight(weight), patch_size=14,
                                temporal_patch_size=2, **affine)  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_equals_clip_with_its_norm():
    """Channels first, class token, positions, and `pre_layrnorm` composed behind it."""
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    torch.manual_seed(0)
    config = clip.CLIPVisionConfig(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4)
    source, norm = clip.CLIPVisionEmbeddings(config), torch.nn.LayerNorm(16)
    pixels = torch.randn(2, 3, 8, 8)
    position = source.position_embedding.weight
    prefix = source.class_embedding[None] + position[:1]
    tokens = patch_embed(pixels, patch_weight(source.patch_embedding.weight), None, position[1:], patch_size=4,
                         layout="chw", prefix=prefix)  # fmt: skip
    got = layer_norm(tokens, norm.weight, norm.bias)
    want = norm(source(pixels))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = [source.class_embedding, position, source.patch_embedding.weight]
    for g, w in zip(gradients([got], leaves, [pixels[:, 0, :5, :1].expand(2, 5, 16)]),
                    gradients([want], leaves, [pixels[:, 0, :5, :1].expand(2, 5, 16)]), strict=True):  # fmt: skip
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


TRITON = [(2, 12, 18, 6, 33), (1, 16, 16, 8, 40), (2, 12, 14, 2, 5), (1, 6, 6, 6, 70), (0, 8, 8, 4, 16)]


def _check_triton(guard, inputs, last, flags):
    """Launcher and reference, forward and backward, for one set of arguments."""
    pixels, w, b, p, prefix, grids = inputs
    wide = [t if t is None or not t.is_floating_point() else t.double() for t in inputs]
    got = guard.run(op.patch_embed_triton, pixels, w, None if b is None else b.float(), p, prefix, grids, *last)
    want = op.patch_embed_reference(*inputs, *last)
    assert_as_accurate(got, want, op.patch_embed_reference(*wide, *last))
    grad = torch.randn(want.shape).to(w)
    rest = (last[0], *flags, grids, 0 if prefix is None else prefix.shape[0], *last[1:])
    got = guard.run(op.patch_embed_bwd_triton, grad, pixels, w, *rest)
    want = op.patch_embed_bwd_reference(grad, pixels, w, *rest)
    wide = op.patch_embed_bwd_reference(grad.double(), *wide[:2], *rest)
    for g, s, o in zip(got, want, wide, strict=True):
        assert_as_accurate(g, s, o)


@pytest.mark.parametrize("shape", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
def test_triton_matches_reference(shape, dtype, uint8, device, guard):
    pixels, w, b, p = _inputs(shape, dtype, uint8, device)
    affine = (SCALE, SHIFT) if uint8 else ([0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    _check_triton(guard, [pixels, w, b, p, None, None], (shape[3], 1, 1, False, *affine), (not uint8, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_without_anything_optional(dtype, device, guard):
    pixels, w, _, _ = _inputs((2, 12, 18, 6, 33), dtype, False, device)
    last = (6, 1, 1, False, [1.0] * 3, [0.0] * 3)
    _check_triton(guard, [pixels, w, None, None, None, None], last, (False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uint8", [True, False])
def test_triton_takes_planar_pixels_and_a_prefix(dtype, uint8, device, guard):
    pixels, w, b, p = _inputs((2, 8, 12, 4, 20), dtype, uint8, device)
    planar, prefix = pixels.permute(0, 3, 1, 2).contiguous(), torch.randn(2, 20).to(device, dtype)
    affine = (SCALE, SHIFT) if uint8 else ([0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    _check_triton(guard, [planar, w, b, p, prefix, None], (4, 1, 1, True, *affine), (not uint8, True))


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("dtype, uint8, prefix_rows", [(torch.float32, False, 2), (torch.bfloat16, True, 0)])
def test_triton_takes_packed_images(case, dtype, uint8, prefix_rows, device, guard):
    grids, frames, merge, planar, patch, _ = case
    *inputs, prefix = _packed_inputs(case, dtype, uint8, device, prefix_rows)
    table = op.grid_table(op.segments("patch_embed", grids), prefix_rows, torch.device(device))
    affine = (SCALE, SHIFT) if uint8 else ([0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    last = (patch, frames, merge, planar, *affine)
    _check_triton(guard, [*inputs, prefix, table], last, (not uint8, True))


class _Recorder:
    """Stand in for a kernel, and note its launch."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append(self.name)


def test_launches_and_no_host_sync(monkeypatch):
    """On meta tensors, which have no value to read: one launch for images of any sizes, and one for a prefix."""
    launches = []
    for name in ("_fwd_kernel", "_prefix_kernel", "_rows_kernel", "_bwd_weight_kernel", "_bwd_pixels_kernel"):
        monkeypatch.setattr(op, name, _Recorder(name, launches))
    grids, frames, merge, planar, patch, _ = PACKED[0]
    *inputs, prefix = _packed_inputs(PACKED[0], torch.float32, True, "meta", 2)
    sizes = op.segments("patch_embed", grids)
    last = (patch, frames, merge, planar, SCALE, SHIFT)
    op.patch_embed_triton(*inputs, None, op.grid_table(sizes, 0, torch.device("meta")), *last)
    assert launches == ["_fwd_kernel"]
    table = op.grid_table(sizes, 2, torch.device("meta"))
    y = op.patch_embed_triton(*inputs, prefix, table, *last)
    assert launches[1:] == ["_fwd_kernel", "_prefix_kernel"]
    op.patch_embed_bwd_triton(y, *inputs[:2], patch, False, True, table, 2, *last[1:])
    assert launches[3:] == ["_rows_kernel", "_bwd_weight_kernel"]


def test_triton_backward_of_a_stride_0_gradient(device):
    """`.sum().backward()` hands the backward an expanded scalar."""
    pixels, w, _, _ = _inputs((2, 4, 6, 2, 5), torch.float32, False, device)
    grad = torch.ones((), device=device).expand(2, 6, 5)
    last = (2, True, True, None, 0, 1, 1, False, SCALE, SHIFT)
    got = op.patch_embed_bwd_triton(grad, pixels, w, *last)
    want = op.patch_embed_bwd_reference(grad.contiguous(), pixels, w, *last)
    for g, s in zip(got, want, strict=True):
        torch.testing.assert_close(g, s)


def test_triton_hands_fp64_to_the_reference(device):
    pixels, w, b, p = _inputs((2, 4, 6, 2, 5), torch.float64, True, device)
    last = (2, 1, 1, False, SCALE, SHIFT)
    got = op.patch_embed_triton(pixels, w, b, p, None, None, *last)
    assert torch.equal(got, op.patch_embed_reference(pixels, w, b, p, None, None, *last))
    last = (2, False, True, None, 0, *last[1:])
    got = op.patch_embed_bwd_triton(torch.ones_like(got), pixels, w, *last)[1]
    assert torch.equal(got, op.patch_embed_bwd_reference(got.new_ones(2, 6, 5), pixels, w, *last)[1])


def _check_native(args, last, flags):
    got = torch.ops.fastmllm.patch_embed(*args, *last)
    assert got.dtype == args[1].dtype
    assert got.is_contiguous()
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    want = op.patch_embed_reference(*wide, *last)
    assert_as_accurate(got, op.patch_embed_reference(*args, *last), want, ulps=2)
    patch, frames, merge, planar, scale, shift = last
    grad = torch.randn(got.shape).to(got.dtype)
    named = {"grids": args[5], "prefix_rows": 0 if args[4] is None else args[4].shape[0], "merge_size": merge}
    named |= {"temporal_patch_size": frames, "planar": planar, "scale": scale, "shift": shift}
    got = torch.ops.fastmllm.patch_embed_bwd(grad, *args[:2], patch, *flags, **named)
    same = op.patch_embed_bwd_reference(grad, *args[:2], patch, *flags, **named)
    want = op.patch_embed_bwd_reference(grad.double(), *wide[:2], patch, *flags, **named)
    for g, s, o in zip(got, same, want, strict=True):
        assert g.dtype == s.dtype
        assert_as_accurate(g, s, o, ulps=2)


@pytest.fixture
def native():
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("parts", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
def test_native_matches_reference(dtype, uint8, parts, native):
    affine = (SCALE, SHIFT) if uint8 else ([0.5, 2.0, 3.0], [0.0, 0.5, 1.0])
    for shape in [*SHAPES, (0, 8, 8, 4, 16), (2, 0, 8, 4, 16), (2, 70, 70, 14, 80)]:  # the last one through oneDNN
        pixels, w, b, p = _inputs(shape, dtype, uint8)
        b = None if not parts[0] else b if dtype == torch.float64 else b.float()
        prefix = torch.randn(2, shape[-1]).to(dtype) if parts[2] else None
        rest = (strided(w), b, strided(p) if parts[1] else None, prefix, None)
        _check_native((strided(pixels), *rest), (shape[3], 1, 1, False, *affine), (not uint8, True))
        _check_native((pixels.permute(0, 3, 1, 2), *rest), (shape[3], 1, 1, True, *affine), (not uint8, True))


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("uint8, prefix_rows", [(True, 0), (False, 2)])
def test_native_takes_packed_images(case, dtype, uint8, prefix_rows, native):
    grids, frames, merge, planar, patch, _ = case
    *inputs, prefix = _packed_inputs(case, dtype, uint8, prefix_rows=prefix_rows)
    table = op.grid_table(op.segments("patch_embed", grids), prefix_rows, torch.device("cpu"))
    _check_native((*inputs, prefix, table), (patch, frames, merge, planar, SCALE, SHIFT), (not uint8, True))


def _torch_gradients(inputs, seed, patch):
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    return gradients([_torch(*leaves, patch)], [t for t in leaves if t.requires_grad], [seed])


@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("mean, std", [(None, None), ((0.5,), None), (None, (0.5,))])
def test_normalisation_is_optional(uint8, mean, std):
    pixels, w, _, _ = _inputs((2, 8, 4, 4, 6), torch.float64, uint8, channels=1)
    got = patch_embed(pixels, w, mean=mean, std=std, patch_size=4)
    want = _torch(pixels, w, None, torch.zeros(()), 4, mean or (0.0,), std or (1.0,))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("uint8", [True, False])
def test_opcheck(uint8):
    pixels, *rest = _inputs((2, 8, 4, 4, 6), torch.float32, uint8)
    inputs = [pixels if uint8 else pixels.requires_grad_(), *(t.requires_grad_() for t in rest)]
    last = (4, 1, 1, False, SCALE, SHIFT)
    torch.library.opcheck(torch.ops.fastmllm.patch_embed.default, (*inputs, torch.randn(1, 6), None, *last))
    torch.library.opcheck(torch.ops.fastmllm.patch_embed.default, (*inputs[:2], None, None, None, None, *last))
    case = PACKED[0]
    packed = [t if t is None or t.dtype == torch.uint8 else t.requires_grad_()
              for t in _packed_inputs(case, torch.float32, uint8, prefix_rows=1)]  # fmt: skip
    table = op.grid_table(op.segments("patch_embed", case[0]), 1, torch.device("cpu"))
    torch.library.opcheck(torch.ops.fastmllm.patch_embed.default, (*packed, table, 2, 2, 2, False, SCALE, SHIFT))


@pytest.mark.parametrize("uint8", [True, False])
def test_compile(uint8):
    inputs = _inputs((2, 8, 4, 4, 6), torch.float32, uint8)
    inputs[1].requires_grad_()
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, mean=MEAN, std=STD, patch_size=4)
    torch.testing.assert_close(got, patch_embed(*inputs, mean=MEAN, std=STD, patch_size=4))
    got.sum().backward()
    assert inputs[1].grad is not None


def test_compile_packed():
    case = PACKED[0]
    pixels, w, *rest = _packed_inputs(case, torch.float32, True, prefix_rows=1)
    w.requires_grad_()

    def run(pixels, w, b, p, prefix):
        return patch_embed_packed(pixels, w, b, p, grid_thw=case[0], mean=MEAN, std=STD, patch_size=2,
                                  temporal_patch_size=2, merge_size=2, prefix=prefix)  # fmt: skip

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(pixels, w, *rest)
    torch.testing.assert_close(got, run(pixels, w, *rest))
    got[0].sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize("case", PACKED[:3], ids=str)
def test_gradcheck_packed(case):
    grids, frames, merge, planar, patch, _ = case
    inputs = _packed_inputs((*case[:5], 3), torch.float64, False, prefix_rows=2)
    leaves = [t.requires_grad_() for t in inputs]

    def run(pixels, w, b, p, prefix):
        tokens, _ = patch_embed_packed(
            pixels, w, b, p, grid_thw=grids, mean=MEAN, std=STD, patch_size=patch, temporal_patch_size=frames,
            merge_size=merge, layout="chw" if planar else "hwc", prefix=prefix,
        )  # fmt: skip
        return tokens

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("uint8", [True, False])
def test_gradcheck(uint8):
    pixels, *rest = _inputs((2, 4, 4, 2, 3), torch.float64, uint8)
    leaves = [pixels if uint8 else pixels.requires_grad_(), *(t.requires_grad_() for t in rest)]
    assert torch.autograd.gradcheck(lambda *a: patch_embed(*a, mean=MEAN, std=STD, patch_size=2), leaves)
    assert torch.autograd.gradcheck(lambda *a: patch_embed(*a, patch_size=2), leaves[:2])


def test_frozen_weights_cost_no_gradient():
    pixels, w, b, p = _inputs((2, 8, 4, 4, 6), torch.float32, False)
    patch_embed(pixels.requires_grad_(), w, b, p, patch_size=4).sum().backward()
    assert pixels.grad is not None
    grad = torch.ones(2, 2, 6)
    dx, dw = torch.ops.fastmllm.patch_embed_bwd(
        grad, pixels.detach(), w, 4, False, False, None, prefix_rows=0, temporal_patch_size=1, merge_size=1,
        planar=False, scale=SCALE, shift=SHIFT,
    )  # fmt: skip
    assert dx.numel() == dw.numel() == 0


def test_rejects_what_does_not_fit():
    pixels, w = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(48, 6)
    with pytest.raises(ValueError, match=r"patch_embed: pixels \(1, 8, 9, 3\).*whole number of 4 x 4 patches"):
        patch_embed(torch.zeros(1, 8, 9, 3), w, patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: weight \(47, 6\) must have 48 rows"):
        patch_embed(pixels, torch.zeros(47, 6), patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: pixels must be \(I, H, W, C\)"):
        patch_embed(pixels[0], w, patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: bias \(5,\)"):
        patch_embed(pixels, w, torch.zeros(5), patch_size=4)
    with pytest.raises(ValueError, match=r"patch_embed: position \(3, 6\) must be \(4, 6\)"):
        patch_embed(pixels, w, None, torch.zeros(3, 6), patch_size=4)
    with pytest.raises(ValueError, match="patch_embed: mean has 1 values"):
        patch_embed(pixels, w, mean=(0.5,), patch_size=4)
    with pytest.raises(ValueError, match="uint8 or float"):
        patch_embed(pixels.int(), w, patch_size=4)
    with pytest.raises(ValueError, match="layout must be 'hwc' or 'chw', not 'cwh'"):
        patch_embed(pixels, w, patch_size=4, layout="cwh")
    with pytest.raises(ValueError, match=r"prefix \(1, 5\) must be \(R, 6\)"):
        patch_embed(pixels, w, patch_size=4, prefix=torch.zeros(1, 5))


def test_packed_rejects_what_does_not_fit():
    pixels, w = torch.zeros(96, dtype=torch.uint8), torch.zeros(48, 6)
    for message, arguments, options in (
        (r"must be a list of images, or flat", (pixels, w), {}),
        (r"pixels \(96,\) must have 3 \* 48 values", (pixels, w), {"grid_thw": [(1, 3)]}),
        (r"a grid must be \(h, w\)", (pixels, w), {"grid_thw": [(2,)]}),
        (r"multiples of merge_size 2", (pixels, w), {"grid_thw": [(1, 2)], "merge_size": 2}),
        (r"a list of images has its own grids", ([pixels], w), {"grid_thw": [(1, 2)]}),
        (r"an image \(4, 5, 3\) must be \(H, W, C\) of whole 4 x 4", ([torch.zeros(4, 5, 3)], w), {}),
        (r"already normalised", (torch.zeros(2, 48), w), {"grid_thw": [(1, 2)], "mean": MEAN, "std": STD}),
        (r"patches \(2, 47\)", (torch.zeros(2, 47), w), {"grid_thw": [(1, 2)]}),
        (r"leave still out", (pixels, w), {"grid_thw": [(1, 2)], "still": True}),
        (r"position \(3, 6\) must be \(2, 6\)", (pixels, w, None, torch.zeros(3, 6)), {"grid_thw": [(1, 2)]}),
    ):
        with pytest.raises(ValueError, match="fastmllm::patch_embed: .*" + message):
            patch_embed_packed(*arguments, patch_size=4, **options)
    with pytest.raises(ValueError, match=r"must be \(D, C, P, P\)"):
        patch_weight(torch.zeros(48, 6))
