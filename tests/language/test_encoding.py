import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.language import (
    EncodedText,
    candidate_log_likelihoods,
    choice,
    completion,
    encode,
    pack,
    targets_of_labels,
    token_log_probabilities,
)
from tests.language.models import tiny, tiny_gpt2, transformers

TEXTS = [
    EncodedText([1, 5, 9], [[7, 8, 9], [7, 4]], 1), EncodedText([1, 6], [[3], [4, 5, 6, 7]], 0),
    EncodedText([1, 2, 3, 4, 5], [[9, 9], [9]], 0),
]  # fmt: skip


def alone(model, text: EncodedText) -> list[list[float]]:
    """Log-probabilities of each candidate's tokens, each candidate in a pass of its own."""
    found = []
    for candidate in text.candidates:
        ids = torch.tensor([text.prompt + candidate])
        log = model(ids).logits.log_softmax(2)[0, len(text.prompt) - 1 : -1]
        found.append([float(line[token]) for line, token in zip(log, candidate, strict=True)])
    return found


@pytest.mark.parametrize("model", [tiny(), tiny("Qwen2", "eager"), tiny_gpt2()], ids=["Llama", "eager", "GPT2"])
@torch.no_grad()
def test_candidates_behind_one_prompt_score_as_in_passes_of_their_own(model):
    inputs, targets = pack(TEXTS, branching=True)
    logits = model(**inputs).logits
    found = token_log_probabilities(logits, targets)
    for row, text in enumerate(TEXTS):
        for number, expected in enumerate(alone(model, text)):
            own = found[row, number]
            torch.testing.assert_close(own[: len(expected)], torch.tensor(expected), rtol=1e-4, atol=1e-5)
            assert not own[len(expected) :].any()
    likelihood = candidate_log_likelihoods(logits, targets)
    sums = torch.tensor([[sum(log) for log in alone(model, text)] for text in TEXTS])
    torch.testing.assert_close(likelihood, sums, rtol=1e-4, atol=1e-5)
    right = likelihood[range(3), [1, 0, 0]]
    torch.testing.assert_close(completion(logits, targets), -right / torch.tensor([2.0, 1.0, 2.0]))
    torch.testing.assert_close(choice(logits, targets), likelihood.logsumexp(1) - right)


@torch.no_grad()
def test_a_completion_needs_no_mask_and_padding_does_not_reach_its_loss():
    model, texts = tiny(), [EncodedText(t.prompt, t.candidates[:1]) for t in TEXTS]
    inputs, targets = pack(texts, branching=False)
    assert inputs["input_ids"].tolist()[1] == [1, 6, 0, 0, 0, 0]
    assert set(inputs) == {"input_ids"}
    losses = completion(model(**inputs).logits, targets)
    for loss, text in zip(losses, texts, strict=True):
        ids = torch.tensor([text.prompt + text.candidates[0]])
        labels = ids.clone()
        labels[:, : len(text.prompt)] = -100
        torch.testing.assert_close(loss, model(ids, labels=labels).loss, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_labels_as_transformers_has_them_give_its_loss_of_each_text():
    model, ids = tiny(), torch.tensor([[1, 5, 9, 20, 7], [1, 7, 8, 0, 0]])
    labels = torch.tensor([[-100, -100, 9, 20, 7], [-100, 7, 8, -100, -100]])
    losses = completion(model(ids).logits, targets_of_labels(labels))
    own = torch.stack([model(ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(2)])
    torch.testing.assert_close(losses, own, rtol=1e-5, atol=1e-6)
    assert float(losses.mean()) != pytest.approx(float(model(ids, labels=labels).loss), rel=3e-4)  # mean over tokens


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.full((1, 2, 4000), 20.0).bfloat16()
    loss = completion(logits, targets_of_labels(torch.tensor([[1, 2]])))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(8.2940, abs=1e-3)  # log 4000


class Letters:
    """A tokenizer of single letters, but ``ab`` is one token."""

    def __init__(self, bos: bool = True):
        self.bos = [1] if bos else []

    def __call__(self, text: str, add_special_tokens: bool):
        parts = text.replace("ab", "*")
        return {"input_ids": [*(self.bos if add_special_tokens else []), *(10 + ord(c) % 32 for c in parts)]}


def test_a_token_across_the_end_of_the_prompt_belongs_to_the_completion():
    assert encode(Letters(), "ca", ["t"]) == EncodedText([1, 13, 11], [[30]])
    joined = encode(Letters(), "ca", ["b", "t"], 1)
    assert joined == EncodedText([1, 13], [[20], [11, 30]], 1)
    assert encode(Letters(), "", ["t"]).prompt == [1]
    with pytest.raises(ValueError, match="no token for the beginning"):
        encode(Letters(bos=False), "", ["t"])
    with pytest.raises(ValueError, match="completion without tokens"):
        encode(Letters(), "c", [""])


def test_a_long_text_keeps_its_first_token_and_what_is_next_to_the_completion():
    text = EncodedText([1, 2, 3, 4, 5], [[6, 7], [8]], 1)
    assert text.tokens == 7
    assert text.truncated(7) == text
    assert text.truncated(5) == EncodedText([1, 4, 5], [[6, 7], [8]], 1)
    assert text.truncated(3) == EncodedText([1], [[6, 7], [8]], 1)
    assert EncodedText([1, 2], [[6, 7, 8]]).truncated(3) == EncodedText([1], [[6, 7]])
    with pytest.raises(SettingError, match=r"max_tokens = 2: leaves no room for a candidate of 2 tokens\. Write 3"):
        text.truncated(2)


def test_the_stand_in_tokenizer_splits_like_its_own(shared_data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data("models/stories260k"))
    text = encode(tokenizer, "It was", [" great", " terrible"])
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in text.candidates]
    assert tokens == [["▁g", "re", "at"], ["▁t", "er", "ri", "b", "le"]]
