"""CMA-ES as a strategy: the fitness of a candidate is its mean loss, and every pass is counted once."""

import numpy as np
import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.strategies import CandidateSearch
from tests.reference.clip import prompted
from tests.reference.networks import cross_entropy

pytest.importorskip("cma", reason="the search is its")
SEARCH = {"population": 6, "sigma": 0.5, "seed": 3}


def searching(chunk_rows=256, loss=cross_entropy, **parts):
    network, images, targets = prompted(**parts)
    strategy = CandidateSearch(search=SEARCH, chunk_rows=chunk_rows)
    strategy.bind(network, loss)
    return strategy, images, targets


def set_numbers(strategy, vector):
    """What the parameters are, in their order; returns what they were."""
    parameters = list(strategy.network.trainable().values())
    before = torch.cat([p.detach().flatten() for p in parameters])
    with torch.no_grad():
        for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
    return before


@pytest.mark.parametrize("parts", [{}, {"image": False}, {"text": False}], ids=["both", "text", "image"])
@pytest.mark.parametrize("chunk_rows", [2, 256])
def test_a_fitness_is_the_mean_loss_with_the_candidate_in_the_prompts(parts, chunk_rows):
    strategy, images, targets = searching(chunk_rows, **parts)
    candidates = torch.from_numpy(strategy.search.ask())
    found = strategy._fitness(strategy.clean_pass(images, targets), candidates)
    expected, start = [], set_numbers(strategy, candidates[0])
    for candidate in candidates:
        set_numbers(strategy, candidate)
        with torch.no_grad():
            expected.append(cross_entropy(strategy.network.run(images), targets).mean())
    set_numbers(strategy, start)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_search_begins_at_the_parameters_and_its_gradient_ends_at_the_next_mean():
    strategy, images, targets = searching()
    start = torch.cat([p.detach().flatten() for p in strategy.network.trainable().values()])
    assert np.array_equal(strategy.search.mean, start.numpy())
    strategy.estimate(strategy.clean_pass(images, targets))
    step = torch.cat([p.grad.flatten() for p in strategy.network.trainable().values()])
    torch.testing.assert_close(start - step, torch.from_numpy(strategy.search.mean))


def test_a_generation_costs_one_text_pass_a_candidate_and_each_image_once_for_each():
    strategy, images, targets = searching()
    texts, seen = [], []
    module = strategy.network.module
    strategy.estimate(strategy.clean_pass(images, targets))  # counts the costs
    module.texts.transformer.register_forward_pre_hook(lambda _, args: texts.append(len(args[0])))
    module.visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    set_numbers(strategy, torch.zeros(10, dtype=torch.float64))
    estimate = strategy.estimate(strategy.clean_pass(images, targets))
    assert (sum(texts), sum(seen)) == (1 + 6, 3 + 6 * 3)
    assert estimate.queries == 6 * 3
    spent = {name: count.queries for name, count in strategy.meter.sites.items()}
    assert spent == {CLEAN: 0, "image_prompt": 2 * 6 * 3, "scores": 2 * 6}
    # A candidate costs what an image costs from its prompt on, three times, and the class texts once.
    clean, image, text = (strategy.meter.sites[name].forward_equivalents for name in (CLEAN, "image_prompt", "scores"))
    of_texts = clean / 2 - 3
    assert text == pytest.approx(2 * 6 * of_texts)
    assert 0.5 * 2 * 6 * 3 < image < 2 * 6 * 3


def test_a_candidate_that_is_lost_is_metered_and_a_lost_generation_moves_nothing():
    strategy, images, targets = searching(loss=lambda output, target: cross_entropy(output, target) * torch.nan)
    estimate = strategy.estimate(strategy.clean_pass(images, targets))
    assert estimate.lost_batch
    assert estimate.lost == 18
    assert strategy.meter.total().lost == 18 + 6
    assert all(p.grad is None for p in strategy.network.trainable().values())


def test_a_restored_search_goes_on_with_the_same_bits_wherever_the_parameters_are():
    first, images, targets = searching()
    for _ in range(3):
        first.estimate(first.clean_pass(images, targets))
    saved = first.state_dict()
    second, _, _ = searching()
    set_numbers(second, torch.ones(10, dtype=torch.float64))
    second.load_state_dict(saved)
    assert np.array_equal(second.search.ask(), first.search.ask())
    assert second.draw == 3
    assert second.meter.state_dict() == first.meter.state_dict()


def test_there_is_nothing_to_allocate():
    strategy, images, targets = searching()
    with pytest.raises(SettingError, match="CandidateSearch scores whole candidates"):
        strategy.sample_statistics(strategy.clean_pass(images, targets))
