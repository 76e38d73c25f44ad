"""attend: the modules' own values, exactly K, mixed sizes, nested queries whose attention is a constant matrix."""

from __future__ import annotations

import pytest
import torch
from device_calls import assert_compiles, device_calls

from fastmllm.compression.attend import Attend
from fastmllm.compression.tokens import Tokens

GRIDS = ((1, 6, 4), (1, 4, 4), (2, 4, 8))
OPTIONS = {
    "token_packer": {"head_dim": 4},
    "perceiver": {"depth": 1, "num_heads": 2, "head_dim": 4},
    "qformer": {"depth": 2, "num_heads": 2, "hidden": 12},
    "mqt": {"max_queries": 16, "num_heads": 2},
}
KEEP = {"token_packer": 1 / 4, "perceiver": 5, "qformer": 5, "mqt": (7, 5, 16)}


def packed(grids=GRIDS, width=8, dtype=torch.float32, seed=3) -> Tokens:
    total = sum(t * h * w for t, h, w in grids)
    return Tokens.of(torch.randn(total, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), grids)


def build(design, keep=None, **options) -> Attend:
    torch.manual_seed(5)
    module = Attend(KEEP[design] if keep is None else keep, 8, design=design, **{**OPTIONS[design], **options})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("design", OPTIONS)
def test_keeps_exactly_k_of_every_image_as_alone(design):
    tokens, module = packed(), build(design, width_out=10)
    out, plan = module(tokens)
    assert out.seqlens == {"token_packer": (6, 4, 16), "mqt": (7, 5, 16)}.get(design, (5, 5, 5))
    assert out.x.shape == (sum(out.seqlens), 10)
    assert (plan is None) == (design != "token_packer")
    for x, grid, k, batched in zip(tokens.x.split(tokens.seqlens), GRIDS, out.seqlens, out.x.split(out.seqlens),
                                   strict=True):  # fmt: skip
        module.keep = k
        alone, _ = module(Tokens.of(x, [grid]))
        torch.testing.assert_close(alone.x, batched, rtol=1e-4, atol=1e-5)
    module.keep = KEEP[design]
    others = tokens.x.clone()
    others[24:] += torch.randn(80, 8)  # the images behind the first
    moved = module(tokens.with_x(others))[0].x
    assert torch.equal(moved[: out.seqlens[0]], out.x[: out.seqlens[0]])
    assert not torch.equal(moved, out.x)


@pytest.mark.parametrize("design", OPTIONS)
def test_places_planes_and_sizes(design):
    tokens = packed()
    tokens = Tokens.of(tokens.x, GRIDS, planes=(torch.arange(104),))
    out, _ = build(design)(tokens)
    starts = torch.tensor([0, 24, 40]).repeat_interleave(torch.tensor(out.seqlens))
    assert torch.equal(out.planes[0], out.pos[:, 0] + starts)  # each row stands at a token of its own image
    assert (out.pos[: out.seqlens[0], 0].diff() > 0).all()
    for size, n in zip(out.size.split(out.seqlens), tokens.seqlens, strict=True):
        torch.testing.assert_close(size.sum(), torch.tensor(float(n)))


def test_an_image_that_keeps_all_of_its_tokens_stays_as_it_is():
    tokens = packed()
    for design, keep in (("token_packer", (6, 16, 16)), ("mqt", (3, 16, 9)), ("perceiver", 16), ("qformer", 16)):
        out, _ = build(design, keep)(tokens)
        assert torch.equal(out.x.split(out.seqlens)[1], tokens.x[24:40])
        assert out.pos.split(out.seqlens)[1][:, 0].tolist() == list(range(16))
        with pytest.raises(ValueError, match="stays as it is, 8 wide, but the others become 10"):
            build(design, keep, width_out=10)(tokens)


def test_token_packer_reads_further_layers_from_planes():
    tokens = packed(dtype=torch.float64)
    deep = [torch.randn_like(tokens.x) for _ in range(3)]
    module = build("token_packer", levels=3, hidden=12).double()
    out, _ = module(Tokens.of(tokens.x, GRIDS, planes=(*deep, torch.arange(104))))
    assert torch.equal(out.x, module.body(tokens.x, torch.cat(deep, 1), GRIDS))
    assert len(out.planes) == 1
    with pytest.raises(ValueError, match="levels 3 are read from as many planes"):
        module(tokens)
    ninth, _ = build("token_packer", 1 / 9).double()(packed(((1, 6, 6),), dtype=torch.float64))
    assert ninth.grid == ((1, 2, 2),)


def test_nested_queries_do_not_depend_on_their_number():
    tokens, module = packed(dtype=torch.float64), build("mqt").double()
    sets = {}
    for n in (2, 7, 16):
        module.keep = n
        out, _ = module(packed(((1, 6, 6), (1, 4, 8)), dtype=torch.float64))
        sets[n] = out.x.view(2, n, 8)
    for n in (2, 7):
        torch.testing.assert_close(sets[n], sets[16][:, :n], rtol=0, atol=1e-14)
    module.keep = (2, 7, 15)  # one K an image
    out, _ = module(tokens)
    for image, n in enumerate(out.seqlens):
        module.keep = n
        every, _ = module(tokens)
        expected = every.x.split(every.seqlens)[image]
        torch.testing.assert_close(out.x.split(out.seqlens)[image], expected, rtol=0, atol=1e-14)


def test_the_attention_of_nested_queries_is_a_constant_matrix():
    """The same for every image: the whole connector is one matrix on LayerNorm(x), and gradients obey it too."""
    module = build("mqt", 7).double()
    body = module.body
    with torch.no_grad():
        weights = body.weights((1, 4, 6), 7)  # (H, n, N)
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 7, dtype=torch.float64))
        value = body.v.weight.view(2, 4, 8)  # (H, Dh, C)
        behind = (body.out.weight @ body.proj.weight).view(8, 2, 4)  # (C', H, Dh)
        constant = torch.einsum("hqk,ohd,hdc->qokc", weights, behind, value).reshape(7 * 8, 24 * 8)
        offset = body.out(body.proj(body.v.bias))  # the weights of a query sum to one
        for seed in range(3):
            tokens = packed(((1, 4, 6),), dtype=torch.float64, seed=seed)
            expected = (constant @ body.norm_value(tokens.x).flatten()).view(7, 8) + offset
            torch.testing.assert_close(module(tokens)[0].x, expected)


@pytest.mark.parametrize("design", OPTIONS)
def test_gradients(design):
    grids = ((1, 2, 2), (1, 4, 2))
    keep = {"token_packer": 1 / 4, "mqt": (2, 3)}.get(design, 2)
    tokens, module = packed(grids, dtype=torch.float64), build(design, keep).double()
    x = tokens.x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(tokens.with_x(x))[0].x, (x,), fast_mode=True)
    module(tokens)[0].x.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="design 'dab' is not one of"):
        Attend(4, 8, design="dab")
    for design in ("perceiver", "qformer"):
        for keep in (0.5, (1, 2), 0, True):
            with pytest.raises(ValueError, match=f"a {design} has one query a token"):
                Attend(keep, 8, design=design)
    with pytest.raises(ValueError, match=r"counts \(17,\) must lie in 1\.\.16"):
        build("mqt", 17)(packed(((1, 6, 4),)))
    with pytest.raises(ValueError, match="cannot become 5"):
        build("token_packer", 5)(packed())
    with pytest.raises(TypeError, match="regions"):
        build("token_packer", regions=2)


@pytest.mark.parametrize("design", OPTIONS)
def test_launches_no_more_for_more_images_and_never_waits(design):
    two, six = (Tokens.of(torch.randn(images, 16, 8)) for images in (2, 6))
    few = device_calls(build(design, 4), two).names
    assert device_calls(build(design, 4), six).names == few
    assert device_calls(build(design), packed()).names


@pytest.mark.parametrize("design", OPTIONS)
def test_compiles(design):
    assert_compiles(build(design), packed())
