"""Losses of captions are those of transformers, one caption at a time, whatever stands beside them in a chunk."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.network.operations import flops
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import row_losses
from flops_lightning.strategies import Backprop, LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets
from tests.language.models import tiny_gpt2
from tests.reference.language import VOCABULARY, WIDTH, caption_ids, one_loss, tiny_llama
from tests.reference.networks import gradients, normal

LENGTHS = (3, 1, 9, 4, 2, 6)


@pytest.fixture(scope="module")
def llm():
    return tiny_llama()


def vectors(k: int = 2):
    return 0.3 * normal(len(LENGTHS), k, WIDTH, seed=1)


def unpadded(captions: PaddedTargets):
    return [values[:n] for values, n in zip(captions.values, captions.lengths, strict=True)]


def alone(llm, z, captions: PaddedTargets, **settings):
    rows = [None] * len(captions) if z is None else z
    pairs = zip(rows, unpadded(captions), strict=True)
    return torch.stack([one_loss(llm, row, ids, **settings) for row, ids in pairs]).detach()


def test_lengths_are_not_rounded_beyond_the_context():
    """Positions that are learned end there."""
    llm = tiny_gpt2(n_positions=13)
    captions, z = PaddedTargets.of([torch.arange(12), torch.arange(5)]), torch.ones(2, 2, 16)
    rounded, exact = (CaptionLoss(llm, visual_tokens=2, multiple=multiple) for multiple in (8, 1))
    torch.testing.assert_close(rounded.score(z, captions), exact.score(z, captions))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("bos", [None, 1])
def test_every_caption_has_the_loss_that_transformers_give_it_alone(llm, bos, multiple):
    z, captions = vectors(), caption_ids(*LENGTHS, padding=-100)
    loss = CaptionLoss(llm, visual_tokens=2, bos=bos, multiple=multiple)
    expected = alone(llm, z, captions, bos=bos)
    torch.testing.assert_close(loss(z.flatten(1), captions), expected, rtol=1e-10, atol=0)
    for index in (torch.tensor([1, 4]), torch.tensor([5, 0, 1, 1])):  # cut to the longest of these
        found = loss(z[index], captions.take(index, index.numpy()))
        torch.testing.assert_close(found, expected[index], rtol=1e-10, atol=0)


def test_an_end_counts_as_the_captions_last_token(llm):
    z, captions = vectors(), caption_ids(*LENGTHS)
    longer = PaddedTargets.of([torch.cat([ids, torch.tensor([2])]) for ids in unpadded(captions)])
    expected = alone(llm, z, longer)
    torch.testing.assert_close(CaptionLoss(llm, visual_tokens=2, eos=2)(z, captions), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("eos", [None, 2])
def test_a_question_stands_before_the_caption_and_is_not_scored(llm, eos):
    z, captions, given = vectors(), caption_ids(*LENGTHS), np.array([0, 0, 5, 1, 1, 3])
    asked = PaddedTargets(captions.values, captions.lengths, given)
    loss = CaptionLoss(llm, visual_tokens=2, eos=eos)
    longer, closed = CaptionLoss(llm, visual_tokens=2)(z, loss.closed(captions)), captions.lengths + (eos is not None)
    of_question = CaptionLoss(llm, visual_tokens=2)(z, PaddedTargets(captions.values, np.maximum(given, 1)))
    of_question = torch.where(torch.from_numpy(given) > 0, of_question * torch.from_numpy(given), 0.0)
    assert loss.scored_tokens(asked).tolist() == (closed - given).tolist()
    expected = (longer * torch.from_numpy(closed) - of_question) / torch.from_numpy(closed - given)
    torch.testing.assert_close(loss(z, asked), expected, rtol=1e-9, atol=0)
    index = torch.tensor([5, 3])
    torch.testing.assert_close(loss(z[index], asked.take(index)), expected[index], rtol=1e-9, atol=0)
    with pytest.raises(SettingError, match="has no tokens"):
        CaptionLoss(llm, visual_tokens=2)(z, PaddedTargets(captions.values, captions.lengths, captions.lengths))


def test_captions_without_vectors_are_the_prior(llm):
    captions = caption_ids(*LENGTHS)
    loss = CaptionLoss(llm, bos=1)
    torch.testing.assert_close(loss.score(None, captions), alone(llm, None, captions, bos=1), rtol=1e-10, atol=0)
    with pytest.raises(SettingError, match="nothing from which the first token"):
        CaptionLoss(llm).score(None, captions)


def test_it_is_not_the_loss_of_a_batch_in_transformers(llm):
    """The mean over all tokens of a batch weighs long captions more."""
    z, captions = vectors(), caption_ids(*LENGTHS)
    own = CaptionLoss(llm, visual_tokens=2)(z, captions)
    lengths = torch.from_numpy(captions.lengths)
    of_batch = (own * lengths).sum() / lengths.sum()
    embeds = torch.cat([z, llm.get_input_embeddings()(captions.values)], 1)
    mask = captions.mask()
    labels = torch.cat([torch.full((len(z), 2), -100), captions.values.masked_fill(~mask, -100)], 1)
    wanted = torch.cat([mask.new_ones(len(z), 2), mask], 1)
    theirs = llm(inputs_embeds=embeds, attention_mask=wanted, labels=labels)
    torch.testing.assert_close(theirs.loss, of_batch.float())
    assert abs(float(own.mean() - of_batch)) > 0.01


def test_what_is_padded_is_never_read(llm):
    z, captions = vectors(), caption_ids(*LENGTHS)
    other = PaddedTargets(captions.values.masked_fill(~captions.mask(), 10**9), captions.lengths)
    loss = CaptionLoss(llm, visual_tokens=2)
    assert torch.equal(loss(z, captions), loss(z, other))


def test_half_precision_casts_the_vectors_and_sums_in_float32(llm):
    half = CaptionLoss(deepcopy(llm).bfloat16(), visual_tokens=2)
    z, captions = vectors().float(), caption_ids(*LENGTHS)
    found = row_losses(half, z, captions)
    assert found.dtype == torch.float32
    expected = CaptionLoss(llm, visual_tokens=2)(z, captions).float()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(found.bfloat16().float(), found)


def test_operations_are_those_of_the_model(llm):
    """Of each caption alone, whatever its length, with what comes before and after it."""
    captions = caption_ids(2, 30, 7)
    for settings in ({"visual_tokens": 3}, {"bos": 1, "eos": 2}):
        loss = CaptionLoss(llm, **settings)
        for told, ids in zip(loss.flops(captions), unpadded(captions), strict=True):
            one = PaddedTargets.of([ids])
            z = normal(1, loss.visual_tokens, WIDTH)
            assert told == pytest.approx(flops(lambda x, one=one, loss=loss: loss.score(x, one), z)[0], rel=1e-12)


def test_the_head_runs_at_caption_positions_alone(llm):
    loss, captions = CaptionLoss(llm, visual_tokens=4), caption_ids(3, 5)
    with FlopCounterMode(display=False) as counter:
        loss(normal(2, 4, WIDTH), captions)
    head = next(sum(by.values()) for name, by in counter.get_flop_counts().items() if name.endswith("lm_head"))
    assert head == 2 * 2 * 5 * WIDTH * VOCABULARY


def test_large_vocabularies_are_summed_a_few_rows_at_a_time(llm, monkeypatch):
    z, captions = vectors(), caption_ids(*LENGTHS)
    whole = CaptionLoss(llm, visual_tokens=2)(z, captions)
    monkeypatch.setattr("flops_lightning.language.caption_loss.LARGEST_SLICE", 2 * 9 * VOCABULARY)
    assert torch.equal(CaptionLoss(llm, visual_tokens=2)(z, captions), whole)


def test_the_model_belongs_to_no_module_and_is_left_as_it_is():
    llm = tiny_llama().train()
    before = {name: p.clone() for name, p in llm.state_dict().items()}

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = nn.Sequential(nn.Linear(3, WIDTH)).double()
            self.loss = CaptionLoss(llm)

    task = Task()
    assert set(task.state_dict()) == {"adapter.0.weight", "adapter.0.bias"}
    assert deepcopy(task).loss.llm is llm
    assert not llm.training
    assert not any(p.requires_grad for p in llm.parameters())
    x, captions = normal(4, 3), caption_ids(3, 1, 9, 4)
    site = {"stages": ["0"], "kind": "linear", "queries_per_sample": 4}
    for strategy in (Backprop(), LikelihoodRatio(sites=[site], seed=0)):
        strategy.bind(stage_network(task.adapter), task.loss)
        strategy.estimate(strategy.clean_pass(x, captions))
    assert all(torch.equal(p, before[name]) for name, p in llm.state_dict().items())


def test_backprop_goes_through_it(llm):
    adapter = nn.Sequential(nn.Linear(3, 2 * WIDTH)).double()
    x, captions = normal(len(LENGTHS), 3), caption_ids(*LENGTHS)
    strategy = Backprop()
    strategy.bind(stage_network(adapter), CaptionLoss(llm, visual_tokens=2))
    strategy.estimate(strategy.clean_pass(x, captions))
    found = gradients(adapter)
    rows = zip(adapter(x).view(-1, 2, WIDTH), unpadded(captions), strict=True)
    each = [one_loss(llm, z, ids) for z, ids in rows]
    exact = torch.autograd.grad(torch.stack(each).mean(), list(adapter.parameters()))
    torch.testing.assert_close(list(found.values()), list(exact), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_it_gives_the_same_in_few_shapes(llm):
    z, captions = vectors(), caption_ids(*LENGTHS)
    loss = CaptionLoss(llm, visual_tokens=2)
    compiled = loss.compiled()
    shapes = set()
    llm_forward = compiled._forward

    def forward(**inputs):
        shapes.add(inputs["inputs_embeds"].shape[1])
        return llm_forward(**inputs)

    compiled._forward = forward
    for rows in ([0, 1], [0, 4], [2, 3], [5, 5]):
        index = torch.tensor(rows)
        some = captions.take(index)
        with torch.no_grad():
            # The norms of a Llama compute in float32, compiled in another order.
            torch.testing.assert_close(compiled(z[index], some), loss(z[index], some), rtol=1e-6, atol=1e-6)
    assert shapes == {2 + 8 - 1, 2 + 16 - 1}


def test_one_graph_is_compiled_for_each_number_of_rows_and_length(monkeypatch):
    """Whatever the captions' own lengths, and none in a later step of the same ones."""
    compiled: list[tuple[int, ...]] = []

    def backend(graph, inputs):
        compiled.append(next(tuple(x.shape[:2]) for x in inputs if x.dim() == 3))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    adapter, captions = nn.Sequential(nn.Linear(3, 2 * WIDTH)), caption_ids(1, 2, 3, 4, 5, 6, 9, 12)
    site = {"stages": ["0"], "kind": "linear", "queries_per_sample": 5}
    strategy = LikelihoodRatio(sites=[site], seed=0, chunk_rows=10, compile_suffixes=True)
    strategy.bind(stage_network(adapter), CaptionLoss(tiny_llama().float(), visual_tokens=2))
    for _ in range(2):
        strategy.estimate(strategy.clean_pass(torch.randn(8, 3), captions))
        assert sorted(compiled) == [(8, 2 + 16 - 1), (10, 2 + 8 - 1), (10, 2 + 16 - 1)]


@pytest.mark.parametrize(
    ("settings", "z", "lengths", "message"),
    [
        ({"visual_tokens": 0}, (2, WIDTH), (1, 1), "visual_tokens = 0"),
        ({"visual_tokens": 2}, (2, WIDTH), (1, 1), r"has 16 numbers a sample, .*visual_tokens = 2 vectors of width 16"),
        ({}, (2, WIDTH + 1), (1, 1), "has 17 numbers a sample"),
        ({}, (2, WIDTH), (3, 0), "captions = 1: this entry of the batch has no tokens"),
        ({"bos": 1}, (2, WIDTH), (64, 1), "captions = 64: tokens are more than the 63 .* context of 64"),
        ({"bos": VOCABULARY}, (2, WIDTH), (1, 1), "bos = 50: is no id of the language model, whose embedding has 50"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, settings, z, lengths, message):
    with pytest.raises(SettingError, match=message):
        CaptionLoss(llm, **settings)(normal(*z), caption_ids(*lengths))


def test_ids_of_another_tokenizer_are_refused(llm):
    ids = PaddedTargets.of([torch.tensor([4, 50]), torch.tensor([3])])
    with pytest.raises(SettingError, match=r"captions = 50: .*Use the tokenizer of this model"):
        CaptionLoss(llm)(normal(2, WIDTH), ids)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(SettingError, match=r"llm = .some/model.: needs the package transformers .*pip.*\[llm\]"):
        load_language_model("some/model")


def test_a_real_model_in_float32(shared_data):
    """Captions as they come, padded and in chunks, with and without BOS: the 1e-5 that float32 allows."""
    llm, tokenizer = load_language_model(str(shared_data("models/stories260k")))
    texts = ["a ship .", "Once upon a time, there was a little girl named Lily.", "a dog and a cat play", "red"]
    encoded = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    captions = PaddedTargets.of(encoded)
    z = 0.3 * normal(4, 4, llm.config.hidden_size, seed=1).float()
    for bos in (None, tokenizer.bos_token_id):
        loss = CaptionLoss(llm, visual_tokens=4, bos=bos)
        expected = alone(llm, z, captions, bos=bos)
        torch.testing.assert_close(loss(z, captions), expected, rtol=0, atol=1e-5)
        parts = [loss(z[i : i + 2], captions.take(torch.arange(i, i + 2))) for i in (0, 2)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
    assert np.all(np.diff(loss.flops(captions)[np.argsort(captions.lengths)]) > 0)


def test_a_query_of_vicuna_is_counted_without_its_weights():
    """Twenty tokens behind one vector run twenty positions, of twice 6.6e9 operations each."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig()  # that of Llama 7B, which Vicuna has too
    with torch.device("meta"):
        loss = CaptionLoss(transformers.LlamaForCausalLM(config))
    (query,) = loss.flops(PaddedTargets.of([torch.zeros(20, dtype=torch.long)]))
    assert query == pytest.approx(20 * 2 * 6.6e9, rel=0.02)
