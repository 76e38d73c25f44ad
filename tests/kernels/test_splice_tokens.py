"""splice_tokens: plans equal a loop and transformers, rows equal masked_scatter, Triton and C++ equal the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from oracle import gradients, strided
from torch.utils._python_dispatch import TorchDispatchMode

from fastmllm.kernels import _native
from fastmllm.kernels import splice_tokens as op
from fastmllm.kernels.splice_tokens import splice_plan, splice_tokens

IMAGE, VIDEO = 90, 91
# samples as users write them: text, image first, image last, two images side by side, no image, nothing
SAMPLES = [[5, IMAGE, 6, 7], [IMAGE, 8, 9], [3, 4, IMAGE], [1, IMAGE, IMAGE, 2], [11, 12], []]
COUNTS = [[3], [1], [4], [2, 5], [], []]
GRIDS = [[(1, 4, 6)], [(1, 2, 2)], [(2, 4, 2)], [(1, 2, 4), (1, 6, 4)], [], []]


def _packed(samples):
    bounds = [0]
    for s in samples:
        bounds.append(bounds[-1] + len(s))
    return [token for s in samples for token in s], bounds


def _plan(samples=SAMPLES, counts=COUNTS, **options):
    return splice_plan(*_packed(samples), counts, placeholder=[IMAGE, VIDEO], **options)


def _inputs(dtype=torch.float32, width=33, samples=SAMPLES, counts=COUNTS, device="cpu"):
    torch.manual_seed(0)
    t, v = sum(map(len, samples)), sum(map(sum, counts))
    return torch.randn(t, width).to(device, dtype), torch.randn(v, width).to(device, dtype)


def _expand(samples, counts):
    """Repeat placeholders, as a processor of transformers does."""
    out = []
    for sample, images in zip(samples, counts, strict=True):
        left = iter(images)
        out.append([x for token in sample for x in [token] * (next(left) if token in (IMAGE, VIDEO) else 1)])
    return out


def _masked_scatter(text, visual, samples=SAMPLES, counts=COUNTS):
    """Embed repeated placeholders, then replace them."""
    rows, is_visual = [], []
    images = (n for sample in counts for n in sample)
    for row, token in enumerate(x for sample in samples for x in sample):
        n = next(images) if token == IMAGE else 1
        rows += [row] * n
        is_visual += [token == IMAGE] * n
    mask = torch.tensor(is_visual, dtype=torch.bool, device=text.device).unsqueeze(1)
    wide = text[torch.tensor(rows, dtype=torch.int64, device=text.device)]
    return wide.masked_scatter(mask.expand_as(wide), visual)


# The plan -------------------------------------------------------------------------------------------------------------
def test_a_plan_is_what_a_loop_makes():
    labels = [[token + 1 for token in sample] for sample in SAMPLES]
    plan = _plan(labels=[x for s in labels for x in s])
    expanded, bounds = _packed(_expand(SAMPLES, COUNTS))
    assert plan.input_ids.tolist() == expanded
    assert plan.labels.tolist() == [-100 if token == IMAGE else token + 1 for token in expanded]
    assert plan.num_targets == sum(token != IMAGE for token in expanded)
    assert plan.cu_seqlens.tolist() == bounds
    assert plan.cu_seqlens.dtype == torch.int32
    assert plan.position_ids.tolist() == [i for s in _expand(SAMPLES, COUNTS) for i in range(len(s))]
    assert plan.max_seqlen == max(len(s) for s in _expand(SAMPLES, COUNTS))
    assert plan.visual_ends[3] == ("sample 3", 15)
    assert not plan.rope_deltas.any()


def test_labels_shift_within_their_sample():
    flat, _ = _packed(SAMPLES)
    plan = _plan(labels=flat, shift_labels=True)
    want = []
    for sample in _expand(SAMPLES, COUNTS):
        want += [*[-100 if token == IMAGE else token for token in sample[1:]], -100] if sample else []
    assert plan.labels.tolist() == want
    assert plan.num_targets == sum(label != -100 for label in want)
    assert _plan().labels is None


def test_lists_arrays_and_tensors_are_one():
    ids, bounds = _packed(SAMPLES)
    a = _plan(labels=ids)
    b = splice_plan(
        torch.tensor(ids), torch.tensor(bounds, dtype=torch.int32), COUNTS, placeholder=IMAGE, labels=torch.tensor(ids)
    )
    for name in ("source", "text_rows", "visual_rows", "labels", "position_ids", "cu_seqlens"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def test_a_sample_without_neighbours_gets_the_same_plan():
    together = _plan(grid_thw=GRIDS, counts=None)
    for s, sample in enumerate(SAMPLES):
        alone = splice_plan(*_packed([sample]), placeholder=IMAGE, grid_thw=[GRIDS[s]])
        part = slice(int(together.cu_seqlens[s]), int(together.cu_seqlens[s + 1]))
        torch.testing.assert_close(together.position_ids[:, part], alone.position_ids, rtol=0, atol=0)
        assert together.rope_deltas[s] == alone.rope_deltas[0]


def _published_mrope(sample, grids, merge, intervals):
    """Each part starts behind the largest position so far (arXiv 2409.12191)."""
    columns, left = [], iter(zip(grids, intervals, strict=True))
    for token in sample:
        start = max((max(c) for c in columns), default=-1) + 1
        if token in (IMAGE, VIDEO):
            (t, h, w), interval = next(left)
            columns += [
                (start + int(i * interval), start + j, start + k)
                for i in range(t)
                for j in range(h // merge)
                for k in range(w // merge)
            ]
        else:
            columns.append((start, start, start))
    return columns


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("interval", [1.0, 2.5, 25.0])
def test_mrope_is_the_published_one(merge, interval):
    intervals = [[interval] * len(s) for s in GRIDS]
    plan = _plan(counts=None, grid_thw=GRIDS, spatial_merge_size=merge, time_intervals=intervals)
    parts = [_published_mrope(s, g, merge, i) for s, g, i in zip(SAMPLES, GRIDS, intervals, strict=True)]
    assert list(zip(*plan.position_ids.tolist(), strict=True)) == [c for part in parts for c in part]
    after = [max((max(c) for c in part), default=-1) + 1 - len(part) for part in parts]
    assert plan.rope_deltas.tolist() == after


@functools.cache
def _transformers_model(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        text_config={"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 1, "num_key_value_heads": 1},
        vision_config={"depth": 1, "hidden_size": 8, "embed_dim": 8, "num_heads": 1, "spatial_merge_size": 2},
    )  # fmt: skip
    return getattr(transformers, f"{family}Model")(config)


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
def test_positions_equal_transformers(family):
    """Images of several shapes, and a video that is not longer in time than in space (see `splice_plan`)."""
    model = _transformers_model(family)
    samples = [[5, IMAGE, 6, 7], [IMAGE, 8], [3, IMAGE], [1, IMAGE, 2, IMAGE, 3], [11, 12], [1, VIDEO, 2]]
    grids = [[(1, 4, 6)], [(1, 2, 2)], [(1, 8, 4)], [(1, 2, 4), (1, 6, 4)], [], [(3, 8, 6)]]
    counts = [[t * h * w // 4 for t, h, w in s] for s in grids]
    intervals = [[1.0] * len(s) for s in grids]
    videos = {"video_grid_thw": torch.tensor(grids[5])}
    if family == "Qwen2_5_VL":
        intervals[5] = [1.5]
        videos["second_per_grid_ts"] = torch.tensor([1.5 / model.config.vision_config.tokens_per_second])
    plan = _plan(samples, counts, grid_thw=grids, time_intervals=intervals)
    for s, expanded in enumerate(_expand(samples, counts)):
        kind = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in expanded]])
        images = {"image_grid_thw": torch.tensor(grids[s]) if grids[s] else None}
        grid = videos if s == 5 else images
        want, delta = model.get_rope_index(input_ids=torch.tensor([expanded]), mm_token_type_ids=kind, **grid)
        part = slice(int(plan.cu_seqlens[s]), int(plan.cu_seqlens[s + 1]))
        torch.testing.assert_close(plan.position_ids[:, part], want[:, 0], rtol=0, atol=0)
        assert plan.rope_deltas[s] == delta[0, 0]


# The rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_masked_scatter(dtype):
    text, visual = _inputs(dtype)
    ours, theirs = ([f(t).requires_grad_() for t in (text, visual)] for f in (strided, torch.clone))
    out, want = splice_tokens(*ours, _plan()), _masked_scatter(*theirs)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    seed = torch.randn(out.shape)
    for g, w in zip(gradients([out], ours, [seed]), gradients([want], theirs, [seed]), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_placeholders_are_never_read_and_images_may_be_empty():
    text, visual = _inputs()
    plan = _plan()
    poisoned = torch.where((plan.text_rows < 0)[:, None], float("nan"), text)
    torch.testing.assert_close(splice_tokens(poisoned, visual, plan), splice_tokens(text, visual, plan))
    counts = [[0], [0], [0], [0, 0], [], []]
    text_only = splice_tokens(text.requires_grad_(), visual[:0], _plan(counts=counts))
    torch.testing.assert_close(text_only, text[plan.text_rows >= 0])
    text_only.sum().backward()
    torch.testing.assert_close(text.grad, (plan.text_rows >= 0).float()[:, None].expand_as(text))


def test_a_sample_does_not_depend_on_its_neighbours():
    text, visual = _inputs()
    plan = _plan()
    out = splice_tokens(text, visual, plan)
    first, rows, tokens = 0, 0, 0
    for sample, counts in zip(SAMPLES, COUNTS, strict=True):
        alone = splice_tokens(
            text[rows : rows + len(sample)], visual[tokens : tokens + sum(counts)], _plan([sample], [counts])
        )
        torch.testing.assert_close(out[first : first + len(alone)], alone, rtol=0, atol=0)
        first, rows, tokens = first + len(alone), rows + len(sample), tokens + sum(counts)
    torch.testing.assert_close(out, splice_tokens(text, visual, plan), rtol=0, atol=0)


@pytest.mark.parametrize("samples, counts", [(SAMPLES, COUNTS), ([[]], [[]]), ([[IMAGE]], [[2]]), ([[1, 2]], [[]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(samples, counts, dtype, device, guard, monkeypatch):
    monkeypatch.setattr(op, "_config", lambda d, dtype: {"BLOCK_M": 16, "BLOCK_D": 32, "num_warps": 4})
    text, visual = _inputs(dtype, 33, samples, counts, device)
    plan = _plan(samples, counts).to(device)
    rows = plan.text_rows, plan.visual_rows
    got = guard.run(op.splice_tokens_triton, text, visual, plan.source, *rows)
    want = op.splice_tokens_reference(text, visual, plan.source, *rows)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    cat = torch.cat((text, visual)).index_select(0, plan.source)
    torch.testing.assert_close(want, cat, rtol=0, atol=0)
    grad = torch.randn(want.shape, device=device).to(dtype)
    for wanted in [(True, True), (False, True), (True, False), (False, False)]:
        got = guard.run(op.splice_tokens_bwd_triton, grad, *rows, *wanted)
        expected = op.splice_tokens_bwd_reference(grad, *rows, *wanted)
        for g, w in zip(got, expected, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.parametrize("samples, counts", [(SAMPLES, COUNTS), ([[]], [[]]), ([[IMAGE]], [[0]]), ([[1, 2]], [[]])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_native_matches_reference(samples, counts, dtype):
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")
    text, visual = _inputs(dtype, 3000, samples, counts)  # rows of several tasks
    plan = _plan(samples, counts)
    rows = plan.text_rows, plan.visual_rows
    got = torch.ops.fastmllm.splice_tokens(strided(text), strided(visual), plan.source, *rows)
    torch.testing.assert_close(got, op.splice_tokens_reference(text, visual, plan.source, *rows), rtol=0, atol=0)
    grad = torch.randn(got.shape).to(dtype)
    for wanted in [(True, True), (False, True), (True, False)]:
        back = torch.ops.fastmllm.splice_tokens_bwd(strided(grad), *rows, *wanted)
        torch.testing.assert_close(back, op.splice_tokens_bwd_reference(grad, *rows, *wanted), rtol=0, atol=0)
    for wrong in (-2, len(text) + len(visual)):
        source = plan.source.clone()
        source[-1:] = wrong
        if source.numel():
            with pytest.raises(RuntimeError, match=r"splice_tokens: row \d+ comes from outside of the \d+ rows given"):
                torch.ops.fastmllm.splice_tokens(text, visual, source, *rows)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_one_launch_and_no_wait(device, monkeypatch):
    """The launchers allocate and launch; nothing is read back."""
    launches = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(self.name)

    monkeypatch.setattr(op, "_splice_kernel", Kernel("splice"))
    monkeypatch.setattr(op, "_split_kernel", Kernel("split"))
    text, visual = _inputs(device=device)
    plan = _plan().to(device)
    rows = plan.text_rows, plan.visual_rows
    with _Operators() as seen:
        out = op.splice_tokens_triton(text, visual, plan.source, *rows)
        op.splice_tokens_bwd_triton(out, *rows, True, True)
        op.splice_tokens_bwd_triton(out, *rows, False, True)
    assert launches == ["splice", "split", "split"]
    assert set(seen.names) == {"aten::new_empty"}


def test_a_stride_0_gradient_and_frozen_inputs():
    text, visual = _inputs()
    plan = _plan()
    splice_tokens(text, visual.requires_grad_(), plan).sum().backward()
    torch.testing.assert_close(visual.grad, torch.ones_like(visual))
    dtext, dvisual = torch.ops.fastmllm.splice_tokens_bwd(
        torch.ones(26, 33), plan.text_rows, plan.visual_rows, False, True
    )
    assert dtext.numel() == 0
    assert dvisual.shape == visual.shape


def test_opcheck():
    text, visual = _inputs()
    plan = _plan()
    args = (text.requires_grad_(), visual.requires_grad_(), plan.source, plan.text_rows, plan.visual_rows)
    torch.library.opcheck(torch.ops.fastmllm.splice_tokens.default, args)


def test_compile():
    compiled = torch.compile(splice_tokens, fullgraph=True, backend="aot_eager")
    for counts in (COUNTS, [[1], [2], [3], [4, 5], [], []]):
        text, visual = _inputs(counts=counts)
        leaves = text.requires_grad_(), visual.requires_grad_()
        got, want = compiled(*leaves, _plan(counts=counts)), splice_tokens(*leaves, _plan(counts=counts))
        torch.testing.assert_close(got, want)
        seed = torch.randn(want.shape)
        torch.testing.assert_close(gradients([got], leaves, [seed]), gradients([want], leaves, [seed]))


def test_gradcheck():
    text, visual = _inputs(torch.float64, 2)
    plan = _plan()
    leaves = text.requires_grad_(), visual.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, v: splice_tokens(t, v, plan), leaves)


def test_a_mismatch_names_the_sample():
    ids = [f"page-{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"splice_tokens: sample 3 has 2 image placeholders, but counts describes 1"):
        _plan(counts=[[3], [1], [4], [7], [], []])
    with pytest.raises(ValueError, match=r"sample 4 \('page-4'\) has 0 image placeholders, but grid_thw describes 1"):
        _plan(counts=None, grid_thw=[*GRIDS[:4], [(1, 2, 2)], []], ids=ids)
    with pytest.raises(
        ValueError, match=r"sample 3 \('page-3'\), image 1: 5 visual tokens, but the grid \(1, 6, 4\) .*6"
    ):
        _plan(counts=[[6], [1], [4], [2, 5], [], []], grid_thw=GRIDS, ids=ids)
    with pytest.raises(ValueError, match=r"sample 0, image 0: the grid \(1, 3, 4\) .*spatial_merge_size 2"):
        _plan(counts=None, grid_thw=[[(1, 3, 4)], *GRIDS[1:]])
    with pytest.raises(ValueError, match="sample 2, image 0: -4 visual tokens"):
        _plan(counts=[[3], [1], [-4], [2, 5], [], []])
    text, visual = _inputs()
    with pytest.raises(ValueError, match=r"visual \(13, 33\).* 15 visual tokens: they run out in sample 3"):
        splice_tokens(text, visual[:13], _plan())
    with pytest.raises(ValueError, match=r"visual \(16, 33\).* 15 visual tokens: some are left over"):
        splice_tokens(text, torch.cat((visual, visual[:1])), _plan())


def test_rejects_what_does_not_fit():
    text, visual = _inputs()
    with pytest.raises(ValueError, match="counts describes 5 samples, but cu_seqlens 6"):
        _plan(counts=COUNTS[:5])
    with pytest.raises(ValueError, match="give counts or grid_thw"):
        _plan(counts=None)
    with pytest.raises(ValueError, match="time_intervals need grid_thw"):
        _plan(time_intervals=[[1.0]] * 6)
    with pytest.raises(ValueError, match=r"cu_seqlens \[0, 3\] must rise from 0 to the length of input_ids \(2,\)"):
        splice_plan([1, 2], [0, 3], [[]], placeholder=IMAGE)
    with pytest.raises(ValueError, match=r"labels \(1,\) and input_ids \(2,\) differ"):
        splice_plan([1, 2], [0, 2], [[]], placeholder=IMAGE, labels=[1])
    with pytest.raises(ValueError, match=r"input_ids \(2,\) float64 must be a row of integers"):
        splice_plan([1.0, 2.0], [0, 2], [[]], placeholder=IMAGE)
    with pytest.raises(ValueError, match="is on meta: plan on the host"):
        splice_plan(torch.zeros(2, dtype=torch.int64, device="meta"), [0, 2], [[]], placeholder=IMAGE)
    with pytest.raises(ValueError, match="1 ids for 6 samples"):
        _plan(ids=["a"])
    with pytest.raises(ValueError, match=r"splice_tokens: text \(16, 33\) .*visual \(15, 32\)"):
        splice_tokens(text, visual[:, :32], _plan())
    with pytest.raises(ValueError, match=r"text \(15, 33\), but the plan is for 16 rows"):
        splice_tokens(text[:15], visual, _plan())
    with pytest.raises(ValueError, match="cast the visual tokens"):
        splice_tokens(text, visual.bfloat16(), _plan())
    with pytest.raises(ValueError, match=r"the plan on meta: plan.to\(device\)"):
        splice_tokens(text, visual, _plan().to("meta"))
