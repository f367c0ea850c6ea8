"""What the processes train, and the same ranks simulated one after the other in one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flops_lightning.allocators import (
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    SampleStatistics,
    TraceObservation,
    TraceSettings,
)
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    CoordinateFiniteDifferences,
    EvolutionStrategies,
    ForwardGradientStrategy,
    LikelihoodRatio,
    MeZO,
    PilotSpec,
    SiteSpec,
)
from flops_lightning.tasks import ForwardCausalLM, ForwardImageClassifier
from flops_lightning.tasks.forward_module import ForwardModule
from tests import digits

MODEL = {**digits.MODEL, "model_kwargs": {**digits.TINY, "embed_dim": 8, "depth": 2}}
LR = 1e-2
Batch = tuple[Any, Any]


def two_sites(queries: int = 4) -> list[SiteSpec]:
    return [
        SiteSpec(name="body", stages=["embed", "blocks.1"], queries_per_sample=queries, sigma=1e-2),
        SiteSpec(name="head", stages=["pool", "head"], queries_per_sample=queries, sigma=1e-2),
    ]


def three_sites() -> list[SiteSpec]:
    """The lowest of them has several tokens."""
    body, head = two_sites()
    low = SiteSpec(name="low", stages=["embed", "blocks.0"], queries_per_sample=4, sigma=1e-2)
    return [low, replace(body, stages=["blocks.1"]), head]


@dataclass(frozen=True)
class Scenario:
    strategy: Callable[[], ForwardGradientStrategy]
    allocator: Callable[[], QueryAllocator] | None = None
    steps: int = 6
    accumulate: int = 1  # batches of a step
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    spoil: tuple[int, ...] = ()  # ranks whose second batch holds NaN
    budget: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)  # which parameters of a language model learn

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        return OptimizerSettings(lr=LR, accumulate_grad_batches=self.accumulate, **self.optimizer)


PREDICTION, BOTH = TraceSettings(source="prediction"), TraceSettings(source="both")


def lr(queries: int = 4, **settings: Any) -> Callable[[], LikelihoodRatio]:
    return lambda: LikelihoodRatio(**{"sites": two_sites(queries), "seed": 0, **settings})


def spsa(exchange: Any) -> Callable[[], SPSA]:
    return lambda: SPSA(sites=two_sites(), seed=0, exchange=exchange)


def mezo(exchange: Any) -> Callable[[], MeZO]:
    return lambda: MeZO(queries=4, seed=0, exchange=exchange)


def subspace() -> EvolutionStrategies:
    """Over two refreshes and a half."""
    return EvolutionStrategies(sites=two_sites(), seed=0, layout="subspace", rank=3, refresh=2, exchange="losses")


def gaussian(**settings: Any) -> Callable[[], QueryAllocator]:
    return lambda: GaussianAllocator(seed=0, **settings)


def of_language(queries: int = 8) -> LikelihoodRatio:
    """Two sites in a language model of three layers."""
    ranges = {"low": ["model.embed_tokens", "model.layers.1"], "top": ["model.layers.2", "lm_head"]}
    sites = [SiteSpec(name=n, stages=s, queries_per_sample=queries, sigma=1e-2) for n, s in ranges.items()]
    return LikelihoodRatio(sites=sites, seed=0, pilots=PilotSpec(sites=[*ranges], queries=2))


WIDE = {"embed_dim": 16}
SCENARIOS = {
    "lr_gaussian": Scenario(lr(8, pilots=PilotSpec(sites=["body"], queries=2)), gaussian()),
    "lr_optimal": Scenario(
        lr(8, pilots=PilotSpec(sites=["body", "head"], queries=2)), lambda: OptimalAllocator(traces=BOTH)
    ),
    "lr_learned_widths": Scenario(lr(sites=three_sites(), token_sigma=True, learn_sigma=0.05)),
    "lr_drawn": Scenario(lr(), lambda: OptimalAllocator(min_queries=0.25)),
    "lr_budget": Scenario(
        lr(exact_head=True),
        lambda: OptimalAllocator(min_queries=0.25),
        budget={"rule": "improvement", "price": "queries", "least": 0.25},
    ),
    "lr_site_by_site": Scenario(lr(update="site_by_site")),
    "accumulated": Scenario(lr(), steps=5, accumulate=2),
    "one_rank_lost": Scenario(lr(), spoil=(1,)),
    "all_ranks_lost": Scenario(lr(), spoil=(0, 1)),
    "spsa_gradients": Scenario(spsa("gradients"), gaussian(traces=PREDICTION)),
    "spsa_losses": Scenario(spsa("losses"), gaussian(traces=PREDICTION)),
    "spsa_losses_equal": Scenario(spsa("losses"), EqualAllocator),
    "spsa_losses_wide": Scenario(spsa("losses"), EqualAllocator, model_kwargs=WIDE),
    "spsa_losses_one_rank_lost": Scenario(spsa("losses"), spoil=(1,)),
    "es_losses": Scenario(lambda: EvolutionStrategies(sites=two_sites(), seed=0, exchange="losses")),
    "spsa_flipout": Scenario(lambda: SPSA(sites=two_sites(), seed=0, layout="flipout"), gaussian(traces=PREDICTION)),
    "zo_muon": Scenario(subspace, optimizer={"name": "muon", "momentum": 0.5}),
    "mezo_gradients": Scenario(mezo("gradients")),
    "mezo_losses": Scenario(mezo("losses")),
    "mezo_losses_wide": Scenario(mezo("losses"), model_kwargs=WIDE),
    "backprop": Scenario(Backprop),
    "language": Scenario(of_language, lambda: OptimalAllocator(traces=BOTH), language={"kind": "full"}),
    "language_lora": Scenario(of_language, gaussian(traces=BOTH), language={"kind": "lora", "rank": 2, "alpha": 4.0}),
    "coordinates": Scenario(lambda: CoordinateFiniteDifferences(coordinates=20, grasp_queries=4, seed=0)),
}
SUMMARISED = "lr_gaussian"
"""The run that writes ``summary.json``."""


def rank_batches(name: str, world_size: int) -> list[list[Batch]]:
    """``[step][rank]`` batches; ranks have 5 samples, in the last step the first has one more than the others."""
    scenario = SCENARIOS[name]
    generator = torch.Generator().manual_seed(7)
    steps = []
    for step in range(scenario.steps):
        sizes = [5 if step < scenario.steps - 1 else 2 + (rank == 0) for rank in range(world_size)]
        steps.append([_texts(n, generator) if scenario.language else _images(n, generator) for n in sizes])
    for rank in scenario.spoil:
        steps[1][rank][0].fill_(torch.nan)
    return steps


def _images(n: int, generator: torch.Generator) -> Batch:
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 10


def _texts(n: int, generator: torch.Generator) -> Batch:
    """Prompts and completions of unequal length."""
    from flops_lightning.language import EncodedText, pack

    lengths = torch.randint(1, 6, (n, 2), generator=generator).tolist()
    ids = [[torch.randint(3, 50, (k,), generator=generator).tolist() for k in both] for both in lengths]
    return pack([EncodedText([1, *prompt], [completion]) for prompt, completion in ids], branching=False)


def texts_to_test(number: int = 7) -> DataLoader[Any]:
    """Texts one by one, an odd number of them."""
    generator = torch.Generator().manual_seed(8)
    return DataLoader([_texts(1, generator) for _ in range(number)], batch_size=1, collate_fn=itemgetter(0))


def size_of(targets: Any) -> int:
    """Number of samples."""
    return len(targets) if isinstance(targets, Tensor) else len(targets["label"])


def save_model(folder: Path) -> str:
    """Write the tiny language model of the scenarios, once."""
    from tests.language.models import tiny

    if not folder.exists():
        tiny(tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


def make_task(name: str, folder: Path) -> ForwardModule:
    """The task of a scenario, from the same start wherever it is made; its language model is in ``folder/model``."""
    scenario = SCENARIOS[name]
    learns: dict[str, Any] = {"strategy": scenario.strategy(), "optimizer": scenario.optimizer_settings}
    if scenario.language:
        given: dict[str, Any] = {"model_name": save_model(folder / "model"), "target": scenario.language}
        torch.manual_seed(0)
        return ForwardCausalLM(**given, **learns).double()
    torch.manual_seed(0)
    kwargs = {**MODEL["model_kwargs"], **scenario.model_kwargs}
    return ForwardImageClassifier(**{**MODEL, "model_kwargs": kwargs}, **learns).double()


# -- the same ranks, one after the other -------------------------------------------------------------------------------


def simulate(name: str, world_size: int, folder: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters after the run, and the ``(s, B)`` counts of every step (none without an allocator)."""
    scenario = SCENARIOS[name]
    task = make_task(name, folder)
    network: nn.Module = task.network.module
    strategies = [scenario.strategy() for _ in range(world_size)]
    for rank, strategy in enumerate(strategies):
        strategy.bind(task.network, task.loss)
        strategy.rank = rank
    allocator = scenario.allocator() if scenario.allocator else None
    optimizer = build_optimizer(network, scenario.optimizer_settings)
    gathered: list[tuple[dict[str, Tensor], int]] = []
    counts: list[Tensor] = []
    batches = rank_batches(name, world_size)
    for step, ranks in enumerate(batches):
        sizes = [size_of(targets) for _, targets in ranks]
        cleans = [s.clean_pass(*batch) for s, batch in zip(strategies, ranks, strict=True)]
        own: list[Tensor | None] = [None] * world_size
        weights: list[Tensor | None] = [None] * world_size
        drawn: list[Tensor | None] = [None] * world_size
        if allocator is not None:
            names = frozenset(allocator.requests)
            stats = [s.sample_statistics(c, names) for s, c in zip(strategies, cleans, strict=True)]
            budget = stats[0].budget
            assert budget is not None
            allocation = allocator.allocate(_joined(stats), budget)
            drawn = _split(allocation.inclusion, sizes)
            equal_parts = allocation.inclusion is None
            fixed = _in_equal_parts(allocation.counts, sizes, budget.multiple) if equal_parts else allocation.counts
            counts.append(fixed)
            own = list(fixed.split(sizes, dim=1))
            weights = _split(allocation.pilot_weight, sizes)
        before: tuple[str, ...] = ()
        for group in strategies[0].update_groups:
            observed = []
            if before:
                cleans = [s.refresh(c, before) for s, c in zip(strategies, cleans, strict=True)]
            before = group
            for rank, (strategy, clean) in enumerate(zip(strategies, cleans, strict=True)):
                network.zero_grad()
                watched = allocator is not None
                estimate = strategy.estimate(
                    clean,
                    own[rank],
                    group or None,
                    pilot_weight=weights[rank],
                    inclusion=drawn[rank],
                    traces=watched,
                )
                observed.append(estimate.observation)
                found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
                gathered.append((found, sizes[rank]))
            if allocator is not None:
                allocator.observe(_seen(observed))
            last = step == len(batches) - 1
            if len(gathered) < scenario.accumulate * world_size and not last:
                continue
            network.zero_grad()
            total = sum(size for _, size in gathered)
            for key, parameter in network.named_parameters():
                parts = [found[key] * size for found, size in gathered if key in found]
                if parts:
                    parameter.grad = torch.stack(parts).sum(0) / total
            optimizer.step()
            gathered = []
    return {key: p.detach().clone() for key, p in network.named_parameters()}, counts


def _split(table: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    return [None] * len(sizes) if table is None else list(table.split(sizes, dim=1))


def _joined(stats: Sequence[SampleStatistics]) -> SampleStatistics:
    first = stats[0]

    def cat(name: str, dim: int = -1) -> Any:
        return None if getattr(first, name) is None else torch.cat([getattr(each, name) for each in stats], dim)

    named = first.predictors
    predictors = named and {n: torch.cat([s.predictors[n] for s in stats], -1) for n in named}  # type: ignore[index]
    tables = {"trace": cat("trace"), "trace_queries": cat("trace_queries")}
    if first.embedding is not None:  # of texts, ranks have different widths
        lines = [line for each in stats for line in each.embedding]  # type: ignore[union-attr]
        tables["embedding"] = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    return replace(first, loss=cat("loss"), predictors=predictors, **tables)


def _seen(observations: Sequence[TraceObservation | None]) -> TraceObservation:
    known = [each for each in observations if each is not None]
    return TraceObservation(
        torch.cat([each.trace for each in known], 1), torch.cat([each.queries for each in known], 1), known[0].unit
    )


def _in_equal_parts(counts: Tensor, sizes: Sequence[int], multiple: int) -> Tensor:
    """Rescale each rank's counts to its part of the budget, one query (or pair) at a time."""
    columns: list[list[int]] = []
    for line in (counts // multiple).tolist():
        total, batch, place, fixed = sum(line), len(line), 0, []
        wanted = [total * n / batch for n in sizes]
        parts = [int(w) for w in wanted]
        while sum(parts) < total:
            rank = max(range(len(sizes)), key=lambda r: (wanted[r] - parts[r], -r))
            parts[rank] += 1
        for n, part in zip(sizes, parts, strict=True):
            mine, least = line[place : place + n], min(line)
            place += n
            # The level at which all that is above the floor fits.
            level = brentq(lambda x: sum(max(x * c, least) for c in mine) - part, 0.0, float(part))  # noqa: B023
            exact = [max(level * c, least) for c in mine]
            whole = [int(x + 1e-9) for x in exact]
            while sum(whole) < part:
                k = max(range(n), key=lambda i: (round(exact[i] - whole[i], 9), -i))
                whole[k] += 1
            fixed += whole
        columns.append(fixed)
    return torch.tensor(columns) * multiple
