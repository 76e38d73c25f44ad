"""Generation on packed prompts: equal to transformers, to a loop without cache, and to itself at batch 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fastmllm.infer.generate import generate, stop_ids
from fastmllm.infer.sampling import Sampling
from fastmllm.models.continuation import Continuation
from fastmllm.models.language import LanguageConfig, LanguageModel

VOCAB = 61


@dataclass
class Prompts:
    """The fields of a packed batch that inference reads."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    ids: list[str]
    image_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pixels: Tensor | None = None
    image_paths: list[str] = field(default_factory=list)


class Toy:
    """A decoder with images: an image's pixel mean, times a vector, stands at each of its places."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        config = LanguageConfig(
            vocab_size=VOCAB, width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48,
            tie_embeddings=True,
        )  # fmt: skip
        self.language = LanguageModel(config).eval()
        with torch.no_grad():
            for parameter in self.language.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(12)  # far from uniform, so that a wrong position changes the answer
        self.language.to(dtype)

    def start(self, batch: Prompts, cache=None) -> tuple[Tensor, Continuation]:
        embeds = self.embed_batch(batch)
        hidden = self.language(embeds, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, cache)
        return hidden, Continuation(language=self.language)

    def embed_batch(self, batch: Prompts) -> Tensor:
        out = self.language.embed(batch.input_ids)
        if batch.pixels is not None:
            means = batch.pixels.float().mean(dim=(1, 2, 3)) / 64
            means = means.repeat_interleave(len(batch.image_index) // len(means))
            out = out.index_copy(0, batch.image_index, means[:, None].to(out.dtype).expand(-1, out.shape[1]))
        return out


def prompts(lengths: tuple[int, ...], seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return Prompts(
        input_ids=torch.randint(0, VOCAB, (sum(lengths),), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        ids=[f"sample{place}" for place in range(len(lengths))],
    )


def one(batch: Prompts, place: int) -> Prompts:
    """Cut one prompt (and its image, the same number of places each) out of a batch."""
    begin, end = batch.cu_seqlens[place : place + 2].tolist()
    cut = Prompts(
        input_ids=batch.input_ids[begin:end],
        position_ids=batch.position_ids[begin:end],
        cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
        max_seqlen=end - begin,
        ids=[batch.ids[place]],
    )
    if batch.pixels is not None:
        mine = (batch.image_index >= begin) & (batch.image_index < end)
        cut = replace(cut, image_index=batch.image_index[mine] - begin, pixels=batch.pixels[place : place + 1])
    return cut


@torch.no_grad()
def without_cache(model: Toy, batch: Prompts, count: int) -> list[int]:
    """Greedy answer of one prompt, the whole sequence computed anew for every token."""
    embeds, answer = model.embed_batch(batch), []
    for _ in range(count):
        length = len(embeds)
        bounds = torch.tensor([0, length], dtype=torch.int32)
        hidden = model.language(embeds, torch.arange(length), bounds, length)
        answer.append(int(model.language.logits(hidden[-1:]).argmax()))
        embeds = torch.cat([embeds, model.language.embed(torch.tensor(answer[-1:]))])
    return answer


def with_images(batch: Prompts) -> Prompts:
    places = torch.cat([start + torch.arange(2) for start in batch.cu_seqlens[:-1].tolist()])
    pixels = torch.arange(len(batch.ids)).mul(40).to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    return replace(batch, image_index=places, pixels=pixels)


def test_greedy_equals_recomputing_everything_at_any_batch_size() -> None:
    model, batch = Toy(), with_images(prompts((5, 2, 9, 3)))
    together = generate(model, batch, max_new_tokens=8)
    assert len({tuple(answer) for answer in together}) == 4
    for place, answer in enumerate(together):
        assert answer == without_cache(model, one(batch, place), 8)
        assert generate(model, one(batch, place), max_new_tokens=8) == [answer]


def test_greedy_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model, batch = Toy(), prompts((5, 2, 9))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.language.state_dict(), strict=True)
    answers = generate(model, batch, max_new_tokens=8)
    for place, answer in enumerate(answers):
        ids = one(batch, place).input_ids[None]
        seen = torch.ones_like(ids)  # given, or transformers takes token 0 for padding
        expected = theirs.generate(ids, attention_mask=seen, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert answer == expected[0, ids.shape[1] :].tolist()


def test_stop_tokens_end_each_sequence_by_itself() -> None:
    model, batch = Toy(), prompts((5, 2, 9, 3))
    free = generate(model, batch, max_new_tokens=10)
    stop = (free[0][0], free[1][3])  # the first answer is empty, the second has at most three tokens
    cut = generate(model, batch, max_new_tokens=10, stop=stop)
    for answer, whole in zip(cut, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stop]
        assert answer == whole[: ends[0] if ends else 10]
    assert cut[0] == []
    assert max(len(answer) for answer in cut) > len(cut[1])


def test_sampling_draws_the_same_at_any_batch_size() -> None:
    model, batch = Toy(), prompts((5, 2, 9))
    warm = Sampling(temperature=1.5, top_p=0.9, seed=3)
    together = generate(model, batch, max_new_tokens=8, sampling=warm)
    assert together == [generate(model, one(batch, place), max_new_tokens=8, sampling=warm)[0] for place in range(3)]
    assert together != generate(model, batch, max_new_tokens=8, sampling=replace(warm, seed=4))
    assert together != generate(model, batch, max_new_tokens=8)


def test_bf16_generates() -> None:
    model, batch = Toy(torch.bfloat16), prompts((5, 2))
    answers = generate(model, batch, max_new_tokens=6)
    assert [len(answer) for answer in answers] == [6, 6]
    assert answers[0][0] == without_cache(model, one(batch, 0), 1)[0]


def test_no_graph_is_kept() -> None:
    model = Toy()
    generate(model, prompts((3,)), max_new_tokens=2)
    assert all(parameter.grad_fn is None and parameter.grad is None for parameter in model.language.parameters())


def test_rejects_bad_prompts() -> None:
    model, batch = Toy(), prompts((5, 2))
    with pytest.raises(ValueError, match="stop token 61"):
        generate(model, batch, max_new_tokens=2, stop=(61,))
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, batch, max_new_tokens=0)
    empty = replace(batch, cu_seqlens=torch.tensor([0, 7, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="prompt 1 \\('sample1'\\) is empty"):
        generate(model, empty, max_new_tokens=2)
    with pytest.raises(ValueError, match="no prompt"):
        generate(model, replace(batch, cu_seqlens=torch.zeros(1, dtype=torch.int32)), max_new_tokens=2)
    with pytest.raises(ValueError, match="cu_seqlens ends at 6"):
        generate(model, replace(batch, cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32)), max_new_tokens=2)


def test_stop_ids_names_what_is_unknown() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|im_end|>": 0, "cat": 1}, unk_token="cat"))
    assert stop_ids(tokenizer, ["cat", "<|im_end|>"]) == (1, 0)
    with pytest.raises(ValueError, match="</s>"):
        stop_ids(tokenizer, ["cat", "</s>"])
