"""``normalize: std`` of SPSA: GRZO's formula, any counts, several ranks, and what is refused."""

import statistics
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flops_lightning.callbacks import ForwardOnly
from flops_lightning.distributed import Communicator
from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, PilotSpec
from flops_lightning.strategies.parameter_queries import ParameterQueryResult, normalized
from tests.reference.networks import bound_to, estimated, squared_error
from tests.reference.parameter_perturbation import queries_of_sample

WHOLE = [{"stages": ["0", "4"], "sigma": 0.5}]
PAIRS = torch.tensor([4, 0, 6, 2])


def normalizing(module, *, loss=squared_error, layout="flipout", **settings):
    return bound_to(SPSA, module, loss, WHOLE, normalize="std", **{"layout": layout, "chunk_rows": 6, **settings})


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("layout", ["flipout", "factored", "shared"])
def test_as_printed_for_one_pair_a_sample_but_for_two_sigma(layout, tokens_net, tokens):
    strategy = normalizing(tokens_net, layout=layout)
    (site,) = strategy.sites
    rows = [queries_of_sample(tokens_net, strategy, site, *tokens, b, 2) for b in range(4)]
    delta = [plus.loss - minus.loss for plus, minus in rows]
    a = [each / statistics.pstdev(delta) for each in delta]
    printed = sum(a_b * row[0].direction for a_b, row in zip(a, rows, strict=True)) / (2 * site.sigma * 4)
    _, found = estimated(strategy, *tokens, torch.full((4,), 2))
    torch.testing.assert_close(flat(found), 2 * site.sigma * printed, rtol=1e-9, atol=1e-12)


def test_samples_count_alike_whatever_their_pairs_and_lost_ones_do_not(tokens_net, tokens):
    def losing(output: Tensor, target: Tensor) -> Tensor:
        losses = squared_error(output, target)
        return torch.where(losses > limit, torch.nan, losses)

    limit = float("inf")
    plain = bound_to(SPSA, tokens_net, losing, WHOLE, layout="flipout", chunk_rows=6)
    (site,) = plain.sites
    every = [queries_of_sample(tokens_net, plain, site, *tokens, b, n) for b, n in enumerate(PAIRS.tolist())]
    limit = max(row.loss for row in every[0]) - 1e-6  # loses one pair of the first sample
    alive = [[p for p in zip(rows[::2], rows[1::2], strict=True) if max(p).loss <= limit] for rows in every]
    weights = [[(plus.loss - minus.loss) / (2 * site.sigma) for plus, minus in pairs] for pairs in alive if pairs]
    assert [len(each) for each in weights] == [1, 3, 1]
    mean = statistics.mean(statistics.mean(each) for each in weights)
    s = statistics.mean(statistics.mean((w - mean) ** 2 for w in each) for each in weights) ** 0.5
    _, expected = estimated(plain, *tokens, PAIRS)
    _, found = estimated(normalizing(tokens_net, loss=losing), *tokens, PAIRS)
    torch.testing.assert_close(flat(found), flat(expected) / s, rtol=1e-9, atol=1e-12)


def test_whatever_the_scale_of_the_loss_and_zero_without_spread(tokens_net, tokens):
    _, found = estimated(normalizing(tokens_net), *tokens, PAIRS)
    for scale in (100.0, 0.0):
        scaled = normalizing(tokens_net, loss=lambda o, t, s=scale: s * squared_error(o, t))
        _, other = estimated(scaled, *tokens, PAIRS)
        torch.testing.assert_close(flat(other), flat(found) * (scale > 0), rtol=1e-9, atol=1e-12)
    _, alone = estimated(normalizing(tokens_net), tokens[0][:1], tokens[1][:1], torch.tensor([2]))
    assert flat(alone).eq(0).all()


def test_traces_stay_those_of_the_gradient(tokens_net, tokens):
    both = normalizing(tokens_net), bound_to(SPSA, tokens_net, squared_error, WHOLE, layout="flipout")
    seen = [s.estimate(s.clean_pass(*tokens), PAIRS, traces=True).observation.trace for s in both]
    torch.testing.assert_close(*seen, rtol=1e-9, atol=0, equal_nan=True)


class Rank(Communicator):
    """One of several ranks, each in a thread."""

    def __init__(self, meeting: threading.Barrier, said: dict[int, Tensor], rank: int) -> None:
        self.meeting, self.said, self.rank, self.size = meeting, said, rank, meeting.parties

    def sum(self, tensor: Tensor) -> Tensor:
        self.said[self.rank] = tensor
        self.meeting.wait(10)
        total = torch.stack([*self.said.values()]).sum(0)
        self.meeting.wait(10)
        return total


def test_the_spread_is_that_of_all_ranks_one_without_queries_included(tokens_net, tokens):
    strategy = normalizing(tokens_net)
    clean = strategy.clean_pass(*tokens)
    whole = strategy.engine.query(strategy.sites[0], clean, PAIRS.numpy())
    first = whole.sample < 2

    def part(rows: Tensor, samples: slice) -> ParameterQueryResult:
        own = {"weights": whole.weights[rows], "alive": whole.alive[rows], "survivors": whole.survivors[samples]}
        return replace(whole, sample=whole.sample[rows] - samples.start, **own)

    parts = [part(first, slice(0, 2)), part(~first, slice(2, 4)), None]
    meeting, said, found = threading.Barrier(3), {}, {}

    def work(rank: int) -> None:
        found[rank] = normalized(parts[rank], clean, Rank(meeting, said, rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = normalized(whole, clean, Communicator()).weights
    assert found[2] is None
    torch.testing.assert_close(torch.cat([found[0].weights, found[1].weights]), expected, rtol=1e-12, atol=0)


def test_what_is_refused(tokens_net, tokens):
    with pytest.raises(SettingError, match=r"normalize = 'max': is not one of the choices"):
        SPSA(normalize="max")
    with pytest.raises(SettingError, match=r"normalize = 'std': .*another one for pilots.*pilots: \{queries: 0"):
        SPSA(normalize="std", pilots=PilotSpec("lowest", 2))
    with pytest.raises(SettingError, match=r"ForwardOnly.strategy = 'SPSA': .*normalize: none"):
        ForwardOnly(SPSA(normalize="std"))
    strategy = normalizing(tokens_net)
    with pytest.raises(SettingError, match=r"normalize = 'std': changes the length .*budget: \{rule: fixed\}"):
        strategy.derivative_along(strategy.clean_pass(*tokens), {})
