"""Generation on packed prompts: equal to transformers, to a loop without cache, and to itself at batch 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fastmllm.infer import limits
from fastmllm.infer.answer import Answer
from fastmllm.infer.generation import decode, generate_tokens, stop_ids
from fastmllm.infer.sampling import SamplingParams
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
    together = generate_tokens(model, batch, SamplingParams(max_new_tokens=8))
    assert len({tuple(answer) for answer in together}) == 4
    for place, answer in enumerate(together):
        assert answer == without_cache(model, one(batch, place), 8)
        assert generate_tokens(model, one(batch, place), SamplingParams(max_new_tokens=8)) == [answer]


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
    answers = generate_tokens(model, batch, SamplingParams(max_new_tokens=8))
    for place, answer in enumerate(answers):
        ids = one(batch, place).input_ids[None]
        seen = torch.ones_like(ids)  # given, or transformers takes token 0 for padding
        expected = theirs.generate(ids, attention_mask=seen, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert answer == expected[0, ids.shape[1] :].tolist()


def test_stop_tokens_end_each_sequence_by_itself() -> None:
    model, batch = Toy(), prompts((5, 2, 9, 3))
    free = generate_tokens(model, batch, SamplingParams(max_new_tokens=10))
    stop = (free[0][0], free[1][3])  # the first answer is empty, the second has at most three tokens
    cut = generate_tokens(model, batch, SamplingParams(max_new_tokens=10), stop=stop)
    for answer, whole in zip(cut, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stop]
        assert answer == whole[: ends[0] if ends else 10]
    assert cut[0] == []
    assert max(len(answer) for answer in cut) > len(cut[1])


def test_sampling_draws_the_same_at_any_batch_size() -> None:
    model, batch = Toy(), prompts((5, 2, 9))
    warm = SamplingParams(temperature=1.5, top_p=0.9, seed=3, max_new_tokens=8)
    together = generate_tokens(model, batch, warm)
    assert together == [generate_tokens(model, one(batch, place), warm)[0] for place in range(3)]
    assert together != generate_tokens(model, batch, replace(warm, seed=4))
    assert together != generate_tokens(model, batch, SamplingParams(max_new_tokens=8))


def test_bf16_generates() -> None:
    model, batch = Toy(torch.bfloat16), prompts((5, 2))
    answers = generate_tokens(model, batch, SamplingParams(max_new_tokens=6))
    assert [len(answer) for answer in answers] == [6, 6]
    assert answers[0][0] == without_cache(model, one(batch, 0), 1)[0]


def test_no_graph_is_kept() -> None:
    model = Toy()
    generate_tokens(model, prompts((3,)), SamplingParams(max_new_tokens=2))
    assert all(parameter.grad_fn is None and parameter.grad is None for parameter in model.language.parameters())


def test_rejects_bad_prompts() -> None:
    model, batch = Toy(), prompts((5, 2))
    with pytest.raises(ValueError, match="stop token 61"):
        generate_tokens(model, batch, SamplingParams(max_new_tokens=2), stop=(61,))
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_tokens(model, batch, SamplingParams(max_new_tokens=0))
    empty = replace(batch, cu_seqlens=torch.tensor([0, 7, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="prompt 1 \\('sample1'\\) is empty"):
        generate_tokens(model, empty, SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match="no prompt"):
        generate_tokens(
            model, replace(batch, cu_seqlens=torch.zeros(1, dtype=torch.int32)), SamplingParams(max_new_tokens=2)
        )
    with pytest.raises(ValueError, match="cu_seqlens ends at 6"):
        generate_tokens(
            model,
            replace(batch, cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32)),
            SamplingParams(max_new_tokens=2),
        )


def test_stop_ids_names_what_is_unknown() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|im_end|>": 0, "cat": 1}, unk_token="cat"))
    assert stop_ids(tokenizer, ["cat", "<|im_end|>"]) == (1, 0)
    with pytest.raises(ValueError, match="</s>"):
        stop_ids(tokenizer, ["cat", "</s>"])


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    model, batch = Toy(), with_images(prompts((5, 2, 9, 3)))
    each = [
        SamplingParams(temperature=1.2, top_k=30, min_p=0.02, seed=1, max_new_tokens=7, logprobs=True),
        SamplingParams(max_new_tokens=9),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, top_p=0.8, max_new_tokens=2),
        SamplingParams(temperature=1.2, seed=5, max_new_tokens=12, logprobs=True),
    ]
    together = [Answer(params) for params in each]
    steps = list(decode(model, batch, together))
    assert steps[0] == [0, 1, 2, 3]
    assert steps[-1] == [3]  # the others have ended, and said so
    for place, (params, answer) in enumerate(zip(each, together, strict=True)):
        (alone,) = (Answer(params),)
        list(decode(model, one(batch, place), [alone]))
        assert (answer.ids, answer.finish_reason) == (alone.ids, "length")
        assert len(answer.ids) == params.max_new_tokens
        assert answer.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_log_probabilities_are_those_of_the_whole_sequence() -> None:
    model, batch = Toy(), prompts((5,))
    answer = Answer(SamplingParams(temperature=1.5, top_k=5, repetition_penalty=1.2, max_new_tokens=6, logprobs=True))
    list(decode(model, batch, [answer]))
    ids = torch.cat([batch.input_ids, torch.tensor(answer.ids)])
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model.language(model.language.embed(ids), torch.arange(len(ids)), bounds, len(ids))
        whole = model.language.logits(hidden).log_softmax(-1)
    expected = [whole[4 + n, token].item() for n, token in enumerate(answer.ids)]
    assert answer.log_probs == pytest.approx(expected, abs=1e-4)


def test_what_does_not_fit_is_said_before_the_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Toy(), prompts((5, 2))
    monkeypatch.setattr(limits, "free_bytes", lambda device: 10)
    monkeypatch.setattr(model, "start", None)
    with pytest.raises(RuntimeError, match="keys and values of 2 sequences of 6 tokens"):
        generate_tokens(model, batch, SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        list(decode(model, batch, [Answer(SamplingParams())]))
