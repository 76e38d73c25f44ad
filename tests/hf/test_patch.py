"""What `patch` leaves as it was, says and survives."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hf_checks import allowed, distance, gradients, outputs
from tiny_hf_llava import llava, llava_batch, llava_prompt
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmllm
from fastmllm.hf import PatchError, Report, patch, unpatch
from fastmllm.hf.fusion import is_fused
from fastmllm.hf.rules import OPS


def near(found, expected):
    return distance(found, expected) <= allowed(0.0, torch.float32) * 8


@pytest.fixture(scope="module")
def expected():
    return outputs(llava(), llava_batch()), gradients(llava(), llava_batch())


@pytest.fixture
def model():
    return llava()


def test_the_report_says_what_was_replaced_and_why_the_rest_was_left(model):
    report = fastmllm.patch(model)
    assert isinstance(report, Report)
    said = " ".join(str(report).split())
    assert "model.language_model.layers.*.input_la" in said
    assert "oneDNN" in said  # why the patch convolution was left in fp32
    norm = next(row for row in report.replaced if row.module == "model.language_model.norm")
    assert (norm.kind, norm.op) == ("LlamaRMSNorm", "rms_norm")
    assert {row.module for row in report.left}.isdisjoint(row.module for row in report.replaced)
    names = dict(model.named_modules())
    assert all(is_fused(names[row.module]) for row in report.replaced)
    assert not any(is_fused(names[row.module]) for row in report.left)


def test_only_what_is_asked_for(model):
    report = patch(model, ops=["layer_norm"])
    assert {row.op for row in report.rows} == {"layer_norm"}
    assert len(report.replaced) == 8


def test_an_unknown_operator_is_an_error(model):
    with pytest.raises(ValueError, match=r"\['flash'\] are none of"):
        patch(model, ops=["flash"])


def test_strict_raises_for_what_does_not_apply_and_changes_nothing(model):
    patch(model, ops=["layer_norm"], strict=True)
    unpatch(model)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(
        PatchError, match=r"LlavaForConditionalGeneration\), linear_cross_entropy: its logits are capped"
    ):
        patch(model, ops=["linear_cross_entropy"], strict=True)
    with pytest.raises(PatchError, match="anything: no module"):
        patch(nn.Linear(3, 3), strict=True)
    with pytest.raises(PatchError, match="patch_embed: no module of this model computes it"):
        patch(nn.Sequential(nn.LayerNorm(4)), ops=["patch_embed", "layer_norm"], strict=True)
    assert not any(is_fused(m) for m in model.modules())


def test_what_is_no_model_or_no_list_is_said(model):
    for given in (None, type(model)):
        with pytest.raises(TypeError, match="takes a model, an instance"):
            patch(given)
    with pytest.raises(TypeError, match=r"give a list of names, \['rms_norm'\]"):
        patch(model, ops="rms_norm")


@pytest.mark.parametrize("wrong", [{"compress": "divprun:4"}, {"ops": ["pixel_shuffle"], "strict": True}], ids=str)
def test_a_patched_model_stays_so_where_patching_anew_fails(model, wrong):
    report = patch(model, ops=["rms_norm", "linear_cross_entropy"], compress="divprune:2")
    with torch.no_grad():
        before = model.eval()(**llava_batch())
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=r"unknown method|does not apply"):
            patch(model, **wrong)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(**llava_batch()).logits, before.logits)
    assert not report.fallbacks()
    with pytest.raises(ValueError, match="none of"):
        patch(model, ops=["flash"])
    assert is_fused(model)


def test_weights_on_the_meta_device_are_left():
    with torch.device("meta"):
        report = patch(nn.Sequential(nn.LayerNorm(4)), ops=["layer_norm"])
    assert "meta device" in report.left[0].reason


def test_an_unknown_model_is_left_where_nothing_fits():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    x = torch.randn(2, 3)
    before = model(x)
    assert patch(model).rows == []
    assert torch.equal(model(x), before)


def test_patching_twice_is_patching_once(model, expected):
    first = patch(model, ops=OPS)
    classes = [type(m) for m in model.modules()]
    second = patch(model, ops=OPS)
    assert [type(m) for m in model.modules()] == classes
    assert first.rows == second.rows
    patch(model, ops=["layer_norm"])  # anew: what was asked for before is taken back
    assert not is_fused(model)
    assert near(outputs(model, llava_batch()), expected[0])


def test_names_of_classes_stay(model):
    before = [(type(m).__name__, str(type(m))) for m in model.modules()]
    originals = [type(m) for m in model.modules()]
    patch(model, ops=OPS)
    assert [(type(m).__name__, str(type(m))) for m in model.modules()] == before
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), originals, strict=True))


def test_torch_and_other_models_are_not_touched(model, expected):
    import transformers.models.clip.modeling_clip as clip
    import transformers.models.llama.modeling_llama as llama

    other = llava()
    spaces = [torch.nn, torch.nn.functional, torch, torch.Tensor, clip, llama, *{type(m) for m in other.modules()}]
    before = [dict(vars(space)) for space in spaces]
    patch(model, ops=OPS)
    gradients(model, llava_batch())
    outputs(model, llava_batch())
    for space, was in zip(spaces, before, strict=True):
        now = dict(vars(space))
        assert {k for k in now if now[k] is not was.get(k)} <= {"__warningregistry__"}, space
        assert was.keys() <= now.keys()
    assert not any(is_fused(m) for m in other.modules())
    found = gradients(other, llava_batch())
    assert all(torch.equal(found[name], expected[1][name]) for name in found)


def test_what_is_saved_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    patch(model, ops=OPS)
    model.save_pretrained(tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert sorted(p.name for p in (tmp_path / "after").iterdir()) == files
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    again = type(model).from_pretrained(tmp_path / "after")
    assert not any(is_fused(m) for m in again.modules())


def test_a_deep_copy_is_patched_and_its_own(model, expected):
    patch(model, ops=OPS)
    copied = copy.deepcopy(model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    unpatch(model)
    assert is_fused(copied)
    assert near(gradients(copied, llava_batch()), expected[1])


def test_a_patched_model_is_pickled_and_saved_whole(model, expected):
    patch(model, ops=OPS)  # before its first forward, which hangs functions on it that transformers makes on the fly
    again = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for one in (again, torch.load(buffer, weights_only=False)):
        assert [type(m) for m in one.modules()] == [type(m) for m in model.modules()]
        assert near(outputs(one, llava_batch()), expected[0])
        assert not any(is_fused(m) for m in unpatch(one).modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_every_layer(model, expected, reentrant):
    calls = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: calls.append(module))

    def recomputed():
        calls.clear()
        found = gradients(model, llava_batch())
        return len(calls), found

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    unpatched, _ = recomputed()
    assert unpatched == 4  # 2 layers, twice
    report = patch(model, ops=OPS)
    patched, found = recomputed()
    assert patched == unpatched
    assert not report.fallbacks()
    assert near(found, expected[1])


def test_torch_compile_makes_no_more_graphs(model, expected):
    def graphs(compiled):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        with torch.no_grad():
            out = torch.compile(compiled, backend=counter)(
                **{k: v for k, v in llava_batch().items() if k != "labels"}
            ).logits
        return counter.frame_count, out

    before, _ = graphs(model)
    patch(model, ops=OPS)
    after, found = graphs(model)
    assert after <= before
    assert near([found], expected[0])


def test_torch_compile_trains(model, expected):
    torch._dynamo.reset()
    patch(model, ops=OPS)
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    compiled(**llava_batch()).loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    unused = {name for name in found if name not in expected[1]}  # zeros, where eager code leaves None
    assert not any(found.pop(name).any() for name in unused)
    assert near(found, expected[1])


@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_before_and_after(expected, first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "fc1", "gate_proj", "linear_1", "lm_head"], init_lora_weights=False
    )

    def lora(model):
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    plain = lora(llava())
    wanted = gradients(plain, llava_batch())
    model = llava()
    if first == "patch":
        patch(model, ops=OPS)
        model = lora(model)
    else:
        model = lora(model)
        patch(model, ops=OPS)
    found = gradients(model, llava_batch())
    assert near(found, wanted)
    assert near(outputs(model, llava_batch()), outputs(plain, llava_batch()))
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    assert near(outputs(merged, llava_batch()), outputs(wanted, llava_batch()))
    unpatch(merged)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(merged, llava_batch()), outputs(wanted, llava_batch()), strict=True)
    )


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_accelerates_hooks_before_and_after(expected, first):
    hooks = pytest.importorskip("accelerate.hooks")
    model = llava()

    class Count(hooks.ModelHook):
        seen = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.seen += 1
            return args, kwargs

    def add():
        for module in model.modules():
            if not list(module.children()):
                hooks.add_hook_to_module(module, Count())

    if first == "hooks":
        add()
        report = patch(model, ops=OPS)
    else:
        report = patch(model, ops=OPS)
        add()
    assert {row.op for row in report.replaced} >= {"layer_norm", "rms_norm"}
    assert near(outputs(model, llava_batch()), expected[0])
    assert Count.seen
    norm = model.model.language_model.norm
    assert is_fused(norm)
    unpatch(model)
    assert norm._old_forward.__func__ is type(norm).forward  # accelerate calls the class's own again
    hooks.remove_hook_from_submodules(model)
    found = outputs(model, llava_batch())
    assert all(torch.equal(a, b) for a, b in zip(found, expected[0], strict=True))


def test_accelerate_mixed_precision(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # the process's, which Trainers of other tests have made
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    plain = accelerator.prepare(llava())
    wanted = gradients(plain, llava_batch())
    patch(model, ops=OPS)
    found = gradients(accelerator.prepare(model), llava_batch())
    assert distance(found, wanted) < 0.05  # rounding of bfloat16
    accelerate.state.AcceleratorState._reset_state(True)


def test_a_forward_that_somebody_bound_is_left(model):
    norm = model.model.language_model.norm
    norm.forward = lambda x: x  # what Liger and `kernels` do
    report = patch(model, ops=["rms_norm"])
    row = next(row for row in report.left if row.module == "model.language_model.norm")
    assert "already replaced" in row.reason


def test_a_method_that_somebody_kept_is_transformers_after_unpatching(model, expected):
    patch(model, ops=OPS)
    kept = model.model.language_model.norm.forward
    unpatch(model)
    x = torch.randn(3, 48)
    assert torch.equal(kept(x), model.model.language_model.norm(x))
    assert "_fastmllm_fallbacks" not in model.model.language_model.norm.__dict__


def test_a_class_that_somebody_derived_from_a_patched_one_is_said(model):
    patch(model, ops=["rms_norm"])
    norm = model.model.language_model.norm
    norm.__class__ = type("FSDPLlamaRMSNorm", (type(norm),), {})
    with pytest.raises(PatchError, match=r"model\.language_model\.norm is now a .*unwrap it first"):
        unpatch(model)


def test_generating_is_the_same_twice_over(model):
    said = model.generate(**llava_prompt(), max_new_tokens=6, do_sample=False)
    for _ in range(2):
        patch(model)
        assert torch.equal(model.generate(**llava_prompt(), max_new_tokens=6, do_sample=False), said)
        unpatch(model)
    assert torch.equal(model.generate(**llava_prompt(), max_new_tokens=6, do_sample=False), said)


def test_keywords_and_more_arguments_run_transformers(model):
    report = patch(model, ops=["layer_norm", "rms_norm", "patch_embed"])
    norm, conv = model.model.language_model.norm, model.model.vision_tower.embeddings.patch_embedding
    x, pixels = torch.randn(2, 3, 48), torch.randn(2, 3, 28, 28)
    assert near([norm(hidden_states=x)], [norm(x)])
    assert near([conv(input=pixels)], [conv(pixels)])
    assert conv(pixels[:0]).shape == (0, 32, 4, 4)
    assert len(report.fallbacks()) == 2


def test_forward_mode_and_functional_transforms_run_transformers(model):
    norm, x = model.model.language_model.norm, torch.randn(3, 48)
    expected = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    each = torch.func.vmap(torch.func.grad(lambda row: norm(row).square().sum()))(x)
    patch(model, ops=["rms_norm"])
    found = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    assert torch.equal(found[1], expected[1])
    with torch.autograd.forward_ad.dual_level():
        dual = norm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1])
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda row: norm(row).square().sum()))(x), each)


def test_a_class_that_somebody_derived_from_transformers_is_left_and_said():
    class Mine(type(llava())):
        pass

    model = llava()
    model.__class__ = Mine
    report = patch(model, ops=OPS)
    row = next(row for row in report.left if row.module == "")
    assert "Mine is derived from LlavaForConditionalGeneration" in row.reason
    assert {row.op for row in report.replaced} >= {"rms_norm", "insert_features"}


def test_a_family_without_rules_is_said():
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    report = patch(model)
    assert any("no rules for vit" in row.reason for row in report.left)


def test_what_cannot_be_looked_into_is_left(model, monkeypatch):
    from fastmllm.hf.fused.norms import FusedRMSNorm

    def fails(module):
        raise RuntimeError("got mixed torch.Tensor and DTensor")

    monkeypatch.setattr(FusedRMSNorm, "refuses", staticmethod(fails))
    report = patch(model, ops=["rms_norm"])
    assert all("cannot be looked into (RuntimeError: got mixed" in row.reason for row in report.rows)


def test_what_accelerates_hooks_leave_behind_does_not_matter(model, expected):
    hooks = pytest.importorskip("accelerate.hooks")
    norm = model.model.language_model.norm
    hooks.add_hook_to_module(norm, hooks.ModelHook())
    hooks.remove_hook_from_module(norm)
    assert "forward" in norm.__dict__
    report = patch(model, ops=["rms_norm"])
    assert not report.left
    assert norm.__dict__["forward"].__func__ is type(norm).forward
    unpatch(model)
    assert norm.__dict__["forward"].__func__ is type(norm).forward
    assert near(outputs(model, llava_batch()), expected[0])
