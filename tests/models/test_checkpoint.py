"""What a checkpoint folder says and holds: ties, older names, parts that are not built, dtypes, files beside it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from fastmllm.models.families import tied
from fastmllm.models.mllm import MLLM
from tests.models.test_published import CONFIGS
from tests.support.tiny_mllm import MODELS, oracle

# family -> its embedding table and its head
TABLE = {"llava": "language_model.model.embed_tokens", "blip2": "language_model.model.decoder.embed_tokens",
         "idefics": "model.embed_tokens", "qwen2_5_vl": "model.embed_tokens",
         "qwen3_vl": "model.language_model.embed_tokens"}  # fmt: skip
TABLE = {name: f"{table}.weight" for name, table in TABLE.items()}
HEADS = {name: f"{'language_model.' if name in ('llava', 'blip2') else ''}lm_head.weight" for name in TABLE}
TOWER = "vision_tower.encoder.layers."


@pytest.fixture
def changed(saved, tmp_path):
    """Give a function: a copy of a family's folder with other tensors and another config.json."""

    def change(name, tensors=None, config=None):
        folder = shutil.copytree(saved(name), tmp_path / name)
        state, raw = read(folder)
        if tensors is not None:
            save_file(tensors(state), folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            config(raw)
            (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return change


def read(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def again(name, folder):
    return type(oracle(name)[0]).from_pretrained(folder, attn_implementation="eager").eval()


def logits(theirs, name):
    batch = oracle(name)[1]
    with torch.no_grad():
        return theirs(**batch).logits[batch["attention_mask"].bool()]


def assert_equal(name, folder, out):
    """A folder computes here what it does in transformers, and so does what is saved of it."""
    model, expected = MLLM.from_pretrained(folder), logits(again(name, folder), name)
    with torch.no_grad():
        found = model.logits(model.inputs(oracle(name)[1]))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(out)
    assert torch.equal(logits(again(name, out), name), expected)
    return model


# Tied heads -----------------------------------------------------------------------------------------------------------
def flags(whole, text):
    """Set or take out the two flags."""

    def change(raw):
        for part, flag in ((raw, whole), (raw.get("text_config", raw), text)):
            if flag is not ...:
                part.pop("tie_word_embeddings", None)
            if flag in (True, False):
                part["tie_word_embeddings"] = flag

    return change


@pytest.mark.parametrize("name", HEADS)
def test_two_that_differ_stay_two(name, changed, tmp_path):
    """A flag never overwrites the head that a file has."""

    def tensors(state):
        return state | {HEADS[name]: torch.randn_like(state[TABLE[name]])}

    model = assert_equal(name, changed(name, tensors, flags(True, ...) if name == "idefics" else flags(True, True)),
                         tmp_path / "out")  # fmt: skip
    assert not model.language.config.tie_embeddings
    state, raw = read(tmp_path / "out")
    assert HEADS[name] in state
    assert not tied(raw)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_the_table_is_tied(name, changed, tmp_path):
    folder = changed(name, lambda s: s | {HEADS[name]: s[TABLE[name]].clone()}, flags(True, True))
    model = assert_equal(name, folder, tmp_path / "out")
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight
    assert HEADS[name] not in read(tmp_path / "out")[0]


@pytest.mark.parametrize("kept", ["table", "head"])
def test_either_of_the_two_is_enough(kept, changed, tmp_path):
    gone = {"table": HEADS, "head": TABLE}[kept]["llava"]
    folder = changed("llava", lambda s: {n: t for n, t in s.items() if n != gone}, flags(True, ...))
    assert_equal("llava", folder, tmp_path / "out")


CASES = [(True, False), (False, True), (None, True), (True, None), (None, None), (False, False)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_config_ties_where_transformers_does(name, case, saved, tmp_path):
    _, raw = read(saved(name))
    flags(*case)(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cls = type(oracle(name)[0])
    with torch.device("meta"):
        theirs = cls(cls.config_class.from_pretrained(tmp_path))
        theirs.tie_weights()
    assert tied(raw) == (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight)


def test_a_head_that_nothing_ties_is_missed(changed):
    folder = changed("llava", lambda s: {n: t for n, t in s.items() if n != HEADS["llava"]})
    with pytest.raises(ValueError, match=r"lacks: language_model\.lm_head\.weight"):
        MLLM.from_pretrained(folder)


def test_a_composition_of_our_own_is_untied_too(tmp_path):
    config = CONFIGS["llava"]
    model = MLLM.from_config(
        replace(config, connector="resampler", language=replace(config.language, tie_embeddings=True))
    )
    assert model.checkpoint.raw["model_type"] == "fastmllm"
    model.save_pretrained(tmp_path / "tied")
    state, _ = read(tmp_path / "tied")
    head = torch.randn_like(state["language.model.embed_tokens.weight"])
    save_file(state | {"language.lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
    MLLM.from_pretrained(tmp_path / "tied").save_pretrained(tmp_path / "two")
    assert torch.equal(MLLM.from_pretrained(tmp_path / "two").language.lm_head.weight, head)


# Parts that are not built ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", lambda s: {n: t for n, t in s.items() if not n.startswith(f"{TOWER}2.")},
         r"lacks: vision_tower\.encoder\.layers\.2\."),
        ("llava", lambda s: {n: t[:3].clone() if n == f"{TOWER}2.mlp.fc1.weight" else t for n, t in s.items()},
         r"other shapes .*layers\.2\.mlp\.fc1"),
        ("llava", lambda s: s | {n.replace(f"{TOWER}2.", f"{TOWER}7."): t.clone() for n, t in s.items()},
         r"what the model does not: vision_tower\.encoder\.layers\.7\."),
        ("llava_onevision", lambda s: {n: t for n, t in s.items() if "post_layernorm" not in n}, "post_layernorm"),
        ("llava_onevision", lambda s: s | {"vision_tower.head.mlp.fc3.weight": torch.ones(2)}, r"computes with: .*fc3"),
        ("llava_onevision", lambda s: s | {"vision_tower.head.mlp.fc1.bias": torch.ones(2)},
         r"fc1\.bias is \(2,\), not \(64\)"),
        ("llava_next", lambda s: s | {"vision_tower.embeddings.position_ids": torch.ones(3)},
         r"position_ids is \(3,\), not \(1, any\)"),
        ("llava", lambda s: s | {"language_model.model.rotary_emb.inv_freq": torch.ones(6, 2)},
         r"inv_freq is \(6, 2\), not \(any\)"),
        ("blip2", lambda s: s | {"qformer.encoder.layer.9.attention.output.dense.bias": torch.ones(2)},
         r"does not: qformer\.encoder\.layer\.9\.attention\.output\.dense\.bias"),
        ("blip2", lambda s: s | {"embeddings.word_embeddings.weight": torch.ones(2, 2)},
         r"does not: embeddings\.word_embeddings"),
    ],
)  # fmt: skip
def test_what_is_kept_must_fit_too(name, change, message, changed):
    with pytest.raises(ValueError, match=message):
        MLLM.from_pretrained(changed(name, change))


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_that_does_not_fit_is_named_as_in_the_file(name, saved, tmp_path):
    folder = shutil.copytree(saved(name), tmp_path / name)
    state, _ = read(folder)
    some = next(n for n in state if n.endswith(("norm2.weight", "input_layernorm.weight")))
    deep = some.replace(".0.", ".77.")
    for change, message in (
        ({some: None}, f"lacks: {some}"),
        ({some: state[some][:-1].clone()}, f"other shapes than its config says: {some} is "),
        ({some: state[some].double()}, f"{some} in torch.float64"),
        ({some: state[some].to(torch.float8_e4m3fn)}, f"{some} in torch.float8_e4m3fn"),
        ({some: state[some].int()}, f"quantised, which is not computed here: {some} is torch.int32"),
        ({deep: state[some].clone()}, deep),
        ({some + "s": state[some].clone()}, f"computes with: {some}s"),
    ):
        kept = {n: t for n, t in (state | change).items() if t is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{re.escape(message)}"):
            MLLM.from_pretrained(folder)


def test_weights_of_several_dtypes_load_as_one_that_is_said(changed):
    folder = changed("llava", lambda s: {n: t.bfloat16() if "norm" in n else t for n, t in s.items()})
    with pytest.raises(ValueError, match=r"several dtypes: .* in torch\.float32, .* in torch\.bfloat16; say one with"):
        MLLM.from_pretrained(folder)
    model = MLLM.from_pretrained(folder, torch.float32)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    eighth = changed("internvl", lambda s: {n: t.to(torch.float8_e5m2) for n, t in s.items()})
    with pytest.raises(ValueError, match=r"a dtype that is not computed here: .* in torch\.float8_e5m2"):
        MLLM.from_pretrained(eighth)


def test_position_ids_of_a_question_are_kept(changed, tmp_path):
    """Files of transformers 4 hold this buffer."""
    ids = {"qformer.embeddings.position_ids": torch.arange(64)[None]}
    folder = changed("instructblip", lambda s: s | ids)
    assert_equal("instructblip", folder, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")[0]["qformer.embeddings.position_ids"], torch.arange(64)[None])


# Names ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "internvl", "mllama", "qwen2_5_vl", "qwen3_vl"]
)
def test_names_of_any_age_are_read_and_written_as_they_were(name, saved, tmp_path):
    """What transformers 5 calls its parameters, and with 4.52's vision_model in between, on some."""
    expected, theirs = MLLM.from_pretrained(saved(name)).state_dict(), oracle(name)[0].state_dict()
    today, _ = read(saved(name))
    renamed = {n: t.clone() for n, t in theirs.items()}
    if name.startswith("llava"):
        renamed = {n.replace("model.vision_tower.", "model.vision_tower.vision_model.", k % 2): t
                   for k, (n, t) in enumerate(renamed.items())}  # fmt: skip
    assert renamed.keys() != today.keys() or name == "qwen3_vl"
    shutil.copy(saved(name) / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MLLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    assert model.checkpoint_state().keys() == renamed.keys() - ({"lm_head.weight"} if name == "internvl" else set())


def test_one_tensor_under_two_names_is_refused(changed):
    new, old = "language_model.model.norm.weight", "model.language_model.norm.weight"
    folder = changed("llava", lambda s: s | {old: torch.zeros_like(s[new])})
    with pytest.raises(ValueError, match=rf"one tensor twice, as ({new} and as {old}|{old} and as {new})"):
        MLLM.from_pretrained(folder)


# Dtypes, and files beside the weights ---------------------------------------------------------------------------------
def test_the_dtype_is_that_of_all_weights(changed, tmp_path):
    def config(raw):
        raw["torch_dtype"] = raw.pop("dtype")
        raw["vision_config"]["torch_dtype"] = raw["vision_config"].pop("dtype", "float32")

    folder = changed("llava_onevision", None, config)  # it keeps tensors apart of both kinds
    model = MLLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.checkpoint.spare
    assert model.checkpoint.rest
    model.save_pretrained(tmp_path / "out")
    state, raw = read(tmp_path / "out")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    said = [part[key] for part in (raw, raw["text_config"], raw["vision_config"]) for key in part if "dtype" in key]
    assert said
    assert set(said) == {"bfloat16"}
    assert "torch_dtype" not in json.dumps(raw)
    assert again("llava_onevision", tmp_path / "out").dtype == torch.bfloat16


def test_only_files_of_the_checkpoint_go_along(saved, tmp_path, caplog):
    cache, out = tmp_path / "snapshots" / "main", tmp_path / "out"
    shutil.copytree(saved("llava"), cache)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("{}")
    (cache / "tokenizer.json").symlink_to("../../blobs/abc")  # as the hub's cache has it
    (tmp_path / "secret").write_text("secret")
    (cache / "secret.txt").symlink_to("../../secret")
    (cache / "nowhere.txt").symlink_to("nothing")
    (cache / "folder.json").mkdir()
    (cache / "chat.jinja").symlink_to("own.txt")
    (cache / "own.txt").write_text("own")
    MLLM.from_pretrained(cache).save_pretrained(out)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "chat.jinja").read_text() == "own"
    assert not {"secret.txt", "nowhere.txt", "folder.json"} & {p.name for p in out.iterdir()}
    assert "secret.txt leads out of its folder" in caplog.text
