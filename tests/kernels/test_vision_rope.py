"""vision_rope: equal to torch and to transformers' rotary positions; Triton and C++ equal the operator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from launches import Launches
from oracle import assert_as_accurate, gradients, strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.kernels import vision_rope as op
from fastmllm.kernels._rope_tables import axial_rope_tables, grid_positions, mrope_tables
from fastmllm.kernels.vision_rope import vision_rope

# T, H, Hkv, Hv, D, R: packed QKV, GQA with a partial rotation, a lone q, SigLIP's width, empty
SHAPES = [(5, 2, 2, 2, 8, 8), (3, 4, 1, 1, 10, 6), (4, 3, 0, 0, 6, 6), (2, 1, 1, 1, 72, 72), (0, 2, 2, 2, 8, 8)]
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _inputs(shape, dtype, device="cpu"):
    tokens, heads, kv_heads, values, head_dim, rotary = shape
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + kv_heads + values, head_dim).to(device, dtype)
    angles = 10 * torch.randn(tokens, rotary // 2)
    return qkv, angles.cos().to(device), angles.sin().to(device)


def _torch(qkv, cos, sin, heads, kv_heads, interleaved):
    """Multiply each pair by its matrix, entry by entry."""
    q, k, v = qkv.split([heads, kv_heads, qkv.shape[1] - heads - kv_heads], 1)
    half = cos.shape[1]
    first = range(0, 2 * half, 2) if interleaved else range(half)
    pairs = [(i, i + 1 if interleaved else i + half) for i in first]

    def turn(x):
        wide = x if x.dtype == torch.float64 else x.float()
        columns = list(wide.unbind(-1))
        for n, (i, j) in enumerate(pairs):
            c, s = cos[:, n, None].to(wide.dtype), sin[:, n, None].to(wide.dtype)
            columns[i], columns[j] = wide[..., i] * c - wide[..., j] * s, wide[..., i] * s + wide[..., j] * c
        return torch.stack(columns, -1).to(x.dtype)

    return turn(q), turn(k), v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
@LAYOUTS
@pytest.mark.parametrize("kind", ["contiguous", "strided", "rows"])
def test_matches_torch(shape, dtype, interleaved, kind):
    qkv, cos, sin = _inputs(shape, dtype)
    heads = shape[1:3]
    seeds = [torch.randn_like(t) for t in _torch(qkv, cos, sin, *heads, interleaved)]
    results = []
    for wide in (dtype, torch.float64):
        leaf = qkv.to(wide).requires_grad_()
        out = _torch(leaf, cos, sin, *heads, interleaved)
        results.append([*out, *gradients(out, [leaf], seeds)])
    leaf = {"contiguous": qkv, "strided": strided(qkv), "rows": torch.cat([qkv, qkv], 1)[:, : qkv.shape[1]]}[kind]
    leaf = leaf.detach().requires_grad_()
    out = vision_rope(leaf, strided(cos), strided(sin), *heads, interleaved)
    for g, s, o in zip([*out, *gradients(out, [leaf], seeds)], *results, strict=True):
        assert_as_accurate(g, s, o)
        assert g.dtype == dtype
    with torch.no_grad():
        for g, t in zip(vision_rope(leaf, cos, sin, *heads, interleaved), out, strict=True):
            assert torch.equal(g, t)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 20, 3, 3, 12, 8)], ids=str)
@DTYPES
@LAYOUTS
def test_triton_matches_reference(shape, dtype, interleaved, device, guard):
    qkv, cos, sin = _inputs(shape, dtype, device)
    heads = shape[1:3]
    for copy in (False, True):
        args = qkv, cos, sin, *heads, interleaved, copy
        got, want = guard.run(op.vision_rope_triton, *args), op.vision_rope_reference(*args)
        wide = op.vision_rope_reference(qkv.double(), *args[1:])
        for g, s, o in zip(got, want, wide, strict=True):
            assert_as_accurate(g, s, o)
    grads = [torch.randn_like(t) for t in got]
    got = guard.run(op.vision_rope_bwd_triton, *grads, cos, sin, interleaved)
    want = op.vision_rope_bwd_reference(*grads, cos, sin, interleaved)
    wide = op.vision_rope_bwd_reference(*[g.double() for g in grads], cos, sin, interleaved)
    assert_as_accurate(got, want, wide)


def test_triton_takes_many_tokens_and_strided_rows(device, guard):
    """More tokens than a program takes; a qkv that is a slice of wider rows is not copied."""
    qkv, cos, sin = _inputs((37, 1, 1, 1, 8, 8), torch.float32, device)
    rows = torch.cat([qkv, qkv], 1)[:, :3]
    assert not rows.is_contiguous()
    for tensor in (qkv, rows):
        got = op.vision_rope_triton(tensor, cos, sin, 1, 1, False, True)
        for g, w in zip(got, op.vision_rope_reference(qkv, cos, sin, 1, 1, False, True), strict=True):
            torch.testing.assert_close(g, w)
    assert op._config(1, 4, 8)["BLOCK_T"] < 37


@LAYOUTS
def test_triton_backward_of_a_stride_0_gradient(interleaved, device):
    _, cos, sin = _inputs(SHAPES[0], torch.float32, device)
    grads = [torch.ones((), device=device).expand(5, 2, 8)] * 3
    got = op.vision_rope_bwd_triton(*grads, cos, sin, interleaved)
    torch.testing.assert_close(got, op.vision_rope_bwd_reference(*grads, cos, sin, interleaved))


@pytest.mark.parametrize(
    "shape", [*SHAPES, (70, 16, 4, 4, 80, 80), (9, 3, 1, 1, 64, 64), (9, 2, 2, 2, 128, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@LAYOUTS
def test_native_matches_reference(shape, dtype, interleaved):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    qkv, cos, sin = _inputs(shape, dtype)
    for copy in (False, True):
        args = cos, sin, *shape[1:3], interleaved, copy
        got, want = torch.ops.fastmllm.vision_rope(strided(qkv), *args), op.vision_rope_reference(qkv, *args)
        wide = op.vision_rope_reference(qkv.double(), *args)
        for g, s, o in zip(got, want, wide, strict=True):
            assert_as_accurate(g, s, o)
            assert g.is_contiguous()
    grads = [torch.randn_like(t) for t in got]
    got = torch.ops.fastmllm.vision_rope_bwd(*map(strided, grads), cos, sin, interleaved)
    want = op.vision_rope_bwd_reference(*grads, cos, sin, interleaved)
    assert_as_accurate(got, want, op.vision_rope_bwd_reference(*[g.double() for g in grads], cos, sin, interleaved))


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_clone_turns_alike(level, tmp_path):
    """Compile the loops for one level alone; sizes below, at and between whole vectors."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if shutil.which("g++") is None or {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}.get(level, "sse2") not in flags:
        pytest.skip(f"needs g++ and a machine with {level}")
    csrc = Path(__file__).parents[2] / "csrc"
    (tmp_path / "shim.cpp").write_text("".join(f"""
        #include "vision_rope.h"
        using namespace fastmllm;
        extern "C" void turn_{name}(const {name} *x, {name} *y, const float *c, const float *s, int64_t d, int64_t half,
                                    bool pairs) {{
          turn(Heads<{name}>{{x, y, 2 * d, 2 * d, 2}}, c, s, 0, 3, d, half, -1.0f, pairs);
        }}""" for name in ("float", "bfloat16")))  # fmt: skip
    command = ["g++", "-O3", "-std=c++17", "-shared", "-fPIC", f"-march={level}", "-DFASTMLLM_ONE_LEVEL", f"-I{csrc}"]
    files = [tmp_path / "shim.cpp", csrc / "vision_rope.cpp", "-o", tmp_path / "loops.so"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    loops = ctypes.CDLL(str(tmp_path / "loops.so"))
    for half in (1, 5, 31, 32, 36, 40, 44, 64):
        for turn, dtype in ((loops.turn_float, torch.float32), (loops.turn_bfloat16, torch.bfloat16)):
            for pairs in (False, True):
                x, cos, sin = _inputs((3, 2, 0, 0, 2 * half + 6, 2 * half), dtype)
                got = torch.full_like(x, float("nan"))
                pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, got, cos, sin)]
                turn(*pointers, ctypes.c_int64(x.shape[2]), ctypes.c_int64(half), ctypes.c_bool(pairs))
                want, wide = (op._turn(t, cos, -sin, pairs) for t in (x, x.double()))
                assert_as_accurate(got, want, wide)


def test_values_are_copied_for_a_backward_only():
    qkv, cos, sin = _inputs(SHAPES[0], torch.float32)
    assert vision_rope(qkv, cos, sin, 2)[2].data_ptr() == qkv[:, 4:].data_ptr()
    leaf = qkv.clone().requires_grad_()
    with torch.no_grad():
        assert vision_rope(leaf, cos, sin, 2)[2].data_ptr() == leaf[:, 4:].data_ptr()
    assert vision_rope(leaf, cos, sin, 2)[2].untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()


def test_one_launch_each_way_and_no_wait():
    qkv, cos, sin = _inputs(SHAPES[0], torch.bfloat16, "meta")
    with Launches(op, "_rope_kernel") as launches:
        q, k, v = op.vision_rope_triton(qkv[:, :, :], cos, sin, 2, 2, False, True)
        assert launches.take() == ["_rope_kernel"]
        op.vision_rope_triton(qkv.expand(3, *qkv.shape)[1], cos, sin, 2, 2, False, False)  # rows may be strided
        assert launches.take() == ["_rope_kernel"]
        op.vision_rope_bwd_triton(q, k, v, cos, sin, False)
        assert launches.take() == ["_rope_kernel"]
        op.vision_rope_triton(qkv[:0], cos[:0], sin[:0], 2, 2, False, True)
        assert launches.take() == []


def test_only_the_tables_are_saved():
    qkv, cos, sin = _inputs(SHAPES[0], torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        vision_rope(qkv.requires_grad_(), cos, sin, 2)
    assert saved == [cos.shape, sin.shape]


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_missing_gradient_is_zero(used):
    qkv, cos, sin = _inputs(SHAPES[0], torch.float32)
    leaf = qkv.requires_grad_()
    vision_rope(leaf, cos, sin, 2)[used].sum().backward()
    zero = [i for i in range(3) if i != used]
    assert all(leaf.grad.split(2, 1)[i].eq(0).all() for i in zero)
    assert leaf.grad.split(2, 1)[used].ne(0).all()


def test_the_backward_turns_back():
    qkv, cos, sin = _inputs((6, 2, 2, 2, 8, 8), torch.float64)
    out = vision_rope(qkv.requires_grad_(), cos.double(), sin.double(), 2)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, out)[0], qkv)  # a rotation's transpose is its inverse


def test_a_token_does_not_depend_on_its_neighbours_and_twice_is_the_same(device):
    qkv, cos, sin = _inputs((9, 2, 2, 2, 8, 8), torch.bfloat16, device)
    for function in (op.vision_rope_triton, op.vision_rope_reference, torch.ops.fastmllm.vision_rope):
        whole = function(qkv, cos, sin, 2, 2, False, True)
        part = function(qkv[4:7], cos[4:7], sin[4:7], 2, 2, False, True)
        again = function(qkv, cos, sin, 2, 2, False, True)
        assert all(torch.equal(w[4:7], p) for w, p in zip(whole, part, strict=True))
        assert all(torch.equal(w, a) for w, a in zip(whole, again, strict=True))


@LAYOUTS
def test_opcheck(interleaved):
    qkv, cos, sin = _inputs(SHAPES[1], torch.float32)
    for copy in (False, True):
        args = qkv.requires_grad_(), cos, sin, 4, 1, interleaved, copy
        torch.library.opcheck(torch.ops.fastmllm.vision_rope.default, args)
    grads = [torch.randn(3, n, 10) for n in (4, 1, 1)]
    torch.library.opcheck(torch.ops.fastmllm.vision_rope_bwd.default, (*grads, cos, sin, interleaved))


def test_compile():
    qkv, cos, sin = _inputs(SHAPES[0], torch.float32)
    compiled = torch.compile(vision_rope, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (vision_rope, compiled):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf, cos, sin, 2)
        grads.append([*out, *torch.autograd.grad(sum(o.square().sum() for o in out), leaf)])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        for got, want in zip(compiled(qkv, cos, sin, 2), vision_rope(qkv, cos, sin, 2), strict=True):
            torch.testing.assert_close(got, want)


@LAYOUTS
def test_gradcheck(interleaved):
    qkv, cos, sin = (t.double() for t in _inputs((2, 2, 1, 1, 6, 4), torch.float64))
    assert torch.autograd.gradcheck(lambda x: vision_rope(x, cos, sin, 2, 1, interleaved), qkv.requires_grad_())


# tables ---------------------------------------------------------------------------------------------------------------
GRIDS = [(1, 4, 6), (3, 2, 4), (1, 2, 2)]


class _Watch(TorchDispatchMode):
    """Name every operator that was dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back():
    with _Watch() as watch:
        positions = grid_positions(GRIDS, 2)
        cos, sin = axial_rope_tables(positions, 8)
        mrope_tables(positions.t()[[0, 0, 1]], 8, [2, 1, 1], interleaved=True)
        made = len(watch.names)
        vision_rope(torch.randn(len(cos), 3, 8), cos, sin, 1)
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(watch.names)
    kernels = [n for n in watch.names[made:] if n not in ("randn", "detach", "slice")]
    assert kernels == ["vision_rope"]


@pytest.mark.parametrize("merge_size", [1, 2])
def test_positions_match_transformers(merge_size):
    vision = pytest.importorskip("transformers.vision_utils")
    want = vision.get_vision_position_ids(torch.tensor(GRIDS), merge_size)
    assert torch.equal(grid_positions(GRIDS, merge_size), want)
    assert grid_positions([], merge_size).shape == (0, 2)


def _hugging_face(family):
    return pytest.importorskip(f"transformers.models.{family}.modeling_{family}")


def _same(got, want):
    """The halves of transformers' tables are the same."""
    for g, w in zip(got, want, strict=True):
        w = w.squeeze(0)
        assert torch.equal(torch.cat([g, g], -1), w.float())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_matches_transformers(family):
    module = _hugging_face(family)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    width = "embed_dim" if family == "qwen2_vl" else "hidden_size"
    config = getattr(module, f"{name}VisionConfig")(**{width: 32, "num_heads": 4})
    if config.rope_parameters is None:
        config.rope_parameters = {"rope_type": "axial", "rope_theta": 10000.0}
    rotary = getattr(module, f"{name}VisionRotaryEmbedding", None) or module.Qwen2_5_VisionRotaryEmbedding
    positions = grid_positions(GRIDS, 2)
    cos, sin = axial_rope_tables(positions, 8)
    want = rotary(config)(torch.zeros(1), positions)
    _same((cos, sin), want)
    qkv = torch.randn(len(positions), 12, 8).bfloat16()
    q, k, _ = qkv.split(4, 1)
    got = vision_rope(qkv, cos, sin, 4)
    for g, w in zip(got, module.apply_rotary_pos_emb_vision(q, k, *want), strict=False):
        torch.testing.assert_close(g, w, rtol=2**-7, atol=2**-8)  # a rounding of bf16: one or two multiply-adds


def test_pixtral_matches_transformers():
    module = _hugging_face("pixtral")
    config = module.PixtralVisionConfig(hidden_size=32, num_attention_heads=4, image_size=64, patch_size=16)
    positions = grid_positions([(1, 3, 4), (1, 2, 2)])
    cos, sin = axial_rope_tables(positions, 8, config.rope_parameters["rope_theta"], staggered=True)
    want = module.PixtralVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    _same((cos, sin), want)
    q, k = torch.randn(2, 16, 4, 8).unbind(0)
    got = vision_rope(torch.cat([q, k], 1), cos, sin, 4)
    for g, w in zip(got, module.apply_rotary_pos_emb(q, k, *want, unsqueeze_dim=1), strict=False):
        torch.testing.assert_close(g, w)


def test_llama4_vision_matches_transformers():
    module = _hugging_face("llama4")
    config = module.Llama4VisionConfig(hidden_size=32, num_attention_heads=4, image_size=48, patch_size=16)
    table = module.Llama4VisionRotaryEmbedding(config)(torch.zeros(1))  # the CLS token stands last
    positions = torch.cat([grid_positions([(1, 3, 3)]).flip(1) + 1, torch.zeros(1, 2, dtype=torch.int64)])
    cos, sin = axial_rope_tables(positions, 8, config.rope_parameters["rope_theta"])
    q, k = torch.randn(2, 10, 4, 8).unbind(0)
    got = vision_rope(torch.cat([q, k], 1), cos, sin, 4, interleaved=True)
    want = module.vision_apply_rotary_emb(q[None], k[None], freqs_ci=table)
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("section", [[4, 2, 2], [2, 3, 3]])
def test_mrope_matches_transformers(family, section):
    module = _hugging_face(family)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    config = getattr(module, f"{name}TextConfig")(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    )
    rotary = getattr(module, f"{name}RotaryEmbedding", None) or module.Qwen3VLTextRotaryEmbedding
    positions = torch.randint(0, 5000, (3, 11))
    cos, sin = mrope_tables(positions, 16, section, 1e6, interleaved=family == "qwen3_vl")
    want = rotary(config)(torch.zeros(1), positions[:, None])
    _same((cos, sin), want)
    qkv = torch.randn(11, 8, 16)
    q, k, _ = qkv.transpose(0, 1).unsqueeze(0).split([4, 2, 2], 1)
    got = vision_rope(qkv, cos, sin, 4, 2)
    for g, w in zip(got, module.apply_rotary_pos_emb(q, k, *want), strict=False):
        torch.testing.assert_close(g.transpose(0, 1), w[0])


def test_rejects_what_does_not_fit():
    qkv, table = torch.zeros(3, 6, 8), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"vision_rope: qkv \(3, 48\) must be \(T, heads, D\)"):
        vision_rope(qkv.flatten(1), table, table, 2)
    with pytest.raises(ValueError, match=r"vision_rope: qkv \(3, 6, 8\).*num_heads 4 \+ num_kv_heads 4"):
        vision_rope(qkv, table, table, 4)
    with pytest.raises(ValueError, match=r"vision_rope: cos \(3, 4\) and sin \(3, 3\)"):
        vision_rope(qkv, table, table[:, :3], 2)
    with pytest.raises(ValueError, match=r"vision_rope: cos \(2, 4\) .*qkv is \(3, 6, 8\)"):
        vision_rope(qkv, table[:2], table[:2], 2)
    with pytest.raises(ValueError, match=r"vision_rope: cos \(3, 5\).*R <= D"):
        vision_rope(qkv, torch.zeros(3, 5), torch.zeros(3, 5), 2)
    with pytest.raises(ValueError, match="floating point"):
        vision_rope(qkv.int(), table, table, 2)
    with pytest.raises(ValueError, match=r"is on cpu, but cos is on meta"):
        vision_rope(qkv, table.to("meta"), table, 2)
    with pytest.raises(ValueError, match=r"grid_positions: grid 1 \(1, 3, 4\).*merge_size 2"):
        grid_positions([(1, 2, 2), (1, 3, 4)], 2)
    with pytest.raises(ValueError, match=r"axial_rope_tables: position_ids \(3, 3\)"):
        axial_rope_tables(torch.zeros(3, 3), 8)
    with pytest.raises(ValueError, match=r"mrope_tables: position_ids \(2, 5\) must be \(3, T\)"):
        mrope_tables(torch.zeros(2, 5), 8, [2, 1, 1])
    with pytest.raises(ValueError, match=r"mrope_tables: mrope_section \[2, 1, 2\].*rotary_dim is 8"):
        mrope_tables(torch.zeros(3, 5), 8, [2, 1, 2])
