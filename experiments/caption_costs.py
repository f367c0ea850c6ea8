"""``python -m experiments.caption_costs``: tokens of a step whose captions are of unequal length, and where they go.

The slope of estimates on autograd's gradient; tokens run over tokens needed, padded and sorted in three ways; and the
variance ``J = sum_b Tr_b / A_b`` of the batch
gradient at an adapter whose bias is the mean embedding, for several ways to allocate the same tokens. Traces come from
queries of their own.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flops_lightning.allocators import CostAwareAllocator, OptimalAllocator, QueryAllocator, TraceSettings
from flops_lightning.allocators.cost_aware import cheapest_counts
from flops_lightning.allocators.objective import optimal_shares
from flops_lightning.allocators.rounding import largest_remainder
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.network.staging import stage_network
from flops_lightning.protocol import SampleStatistics
from flops_lightning.queries import plan_rows
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets

TOKENS, FEATURES, BATCH, QUERIES = 4, 16, 32, 20
WARM_UP, MEASURED = 10, 4
FIRST_QUERY = 10**6
"""Of the queries that show the traces: above all others."""
FOUR = ("a ship .", "a dog .", "a cat and a dog play in the park", "Lily was happy")
Values = dict[str, list[float]]


def padding(lengths: np.ndarray, *, batch: int, queries: int, chunk_rows: int) -> dict[str, float]:
    """Tokens run over tokens needed in an epoch, ``lengths`` being those of the sequences in their order."""
    run: dict[str, int] = defaultdict(int)
    batches = [lengths[i : i + batch] for i in range(0, len(lengths) - batch + 1, batch)]
    for some in batches:
        for name, order in (("longest of the chunk", some), ("sorted, longest of the chunk", np.sort(some))):
            plan = plan_rows(np.full(batch, queries), chunk_rows)
            run[name] += sum(chunk.rows * int(order[chunk.samples].max()) for chunk in plan)
        run["longest of the batch"] += batch * queries * int(some.max())
    needed = queries * int(np.concatenate(batches).sum())
    return {name: tokens / needed for name, tokens in run.items()}


def slopes(
    llm: Any, ids: Sequence[Sequence[int]], *, draws: int, seed: int, sigma: float = 0.004, beside: Any = None
) -> dict[str, float]:
    """Of estimates with 60 queries on the gradient at one vector before each caption, and cosines of the samples'.

    ``sigma`` is in units of the vectors' size. The gradient is that of the model ``beside``; None: of the same one.
    """
    captions, width = PaddedTargets.of([torch.tensor(each) for each in ids]), llm.get_input_embeddings().weight.shape[1]
    drawn = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors = (0.28 * drawn).float().requires_grad_(True)
    loss, layer = CaptionLoss(llm), nn.Linear(len(ids), width, bias=False)
    exact_loss = loss if beside is None else CaptionLoss(beside)
    (exact,) = torch.autograd.grad(exact_loss(vectors, captions).mean(), vectors)
    layer.weight.data = vectors.detach().T.contiguous()
    site = {"stages": ["0"], "kind": "linear", "sigma": sigma * 0.28, "queries_per_sample": 60}
    strategy = LikelihoodRatio(sites=[site], seed=seed)
    strategy.bind(stage_network(nn.Sequential(layer)), loss)
    found: Values = defaultdict(list)
    for _ in range(draws):
        layer.weight.grad = None
        strategy.estimate(strategy.clean_pass(torch.eye(len(ids)), captions))
        assert layer.weight.grad is not None
        gradient = layer.weight.grad.T
        found["slope"].append(float((gradient * exact).sum() / exact.square().sum()))
        found["cosine"].append(float(torch.cosine_similarity(gradient, exact, dim=1).mean()))
    error = statistics.stdev(found["slope"]) / draws**0.5 if draws > 1 else 0.0
    return {name: statistics.fmean(values) for name, values in found.items()} | {"standard error of the slope": error}


class Alignment:
    """An adapter whose bias is the mean embedding and whose weights are zero, before a model with its captions."""

    def __init__(self, llm: Any, ids: Sequence[Sequence[int]], seed: int) -> None:
        self.ids = [torch.tensor(each) for each in ids]
        self.generator = torch.Generator().manual_seed(seed)
        mean = llm.get_input_embeddings().weight.detach().mean(0)
        adapter = nn.Linear(FEATURES, TOKENS * len(mean))
        nn.init.zeros_(adapter.weight)
        adapter.bias.data = mean.repeat(TOKENS)
        sigma = 0.004 * float(mean.square().mean().sqrt())
        site = {"stages": ["0"], "kind": "linear", "sigma": sigma, "queries_per_sample": QUERIES}
        self.strategy = LikelihoodRatio(sites=[site], seed=seed, chunk_rows=256)
        self.strategy.bind(stage_network(nn.Sequential(adapter)), CaptionLoss(llm, visual_tokens=TOKENS))
        self.order = torch.randperm(len(ids), generator=self.generator).tolist()

    def batch(self) -> tuple[Tensor, PaddedTargets]:
        some, self.order = self.order[:BATCH], self.order[BATCH:]
        captions = PaddedTargets.of(sorted((self.ids[i] for i in some), key=len))
        x = torch.nn.functional.normalize(torch.randn(BATCH, FEATURES, generator=self.generator), dim=1)
        return x, captions


def gains(made: Alignment, truth: int) -> Mapping[str, float]:
    """``J`` at the tokens of equal counts over that of equal counts, mean over batches."""
    loss_alone = TraceSettings(predictors=["loss"])
    allocators: dict[str, QueryAllocator] = {
        "Neyman, from the loss": OptimalAllocator(traces=loss_alone),
        "with costs, from the loss": CostAwareAllocator(traces=loss_alone),
    }
    wanted = frozenset().union(*(each.requests for each in allocators.values()), {"counted_costs"})
    found: Values = defaultdict(list)
    for number in range(WARM_UP + MEASURED):
        clean = made.strategy.clean_pass(*made.batch())
        told = made.strategy.sample_statistics(clean, wanted)
        if number >= WARM_UP:
            counts = torch.full((1, BATCH), truth)
            # Two sets of queries: counts must not be judged by the errors that they were made from.
            shown, judged = (
                made.strategy.observe_traces(clean, counts, first_query=n * FIRST_QUERY).trace.double() for n in (1, 2)
            )
            for name, value in compared(made, told, shown, judged, allocators).items():
                found[name].append(value)
        estimate = made.strategy.estimate(clean, traces=True)
        assert estimate.observation is not None
        for allocator in allocators.values():
            allocator.observe(estimate.observation)
    return {name: statistics.fmean(values) for name, values in found.items()}


def compared(
    made: Alignment, told: SampleStatistics, shown: Tensor, judged: Tensor, allocators: Mapping[str, QueryAllocator]
) -> dict[str, float]:
    costs, budget = told.counted_costs, made.strategy.budget
    assert costs is not None
    assert budget is not None
    costs, total = costs.double(), float(costs.double().sum()) * QUERIES
    settings: dict[str, Any] = {"least": 1.0, "most": torch.tensor([10.0 * QUERIES], dtype=torch.float64)}
    ways = {name: each.allocate(told, budget).counts for name, each in allocators.items()}
    ways["lengths alone"] = cheapest_counts(torch.ones_like(shown), costs, total, multiple=1, **settings)
    neyman = optimal_shares(shown)[0] * BATCH * QUERIES
    ways["Neyman, from measured traces"] = largest_remainder(neyman, BATCH * QUERIES, minimum=1, multiple=1)
    ways["with costs, from measured traces"] = cheapest_counts(shown, costs, total, multiple=1, **settings)
    equal = float(judged.sum()) / QUERIES
    values = {}
    for name, counts in ways.items():
        # J falls as one over the tokens: at those of equal counts it would be so much.
        spent = float((costs * counts).sum()) / total
        values[name] = float((judged / counts).sum()) * spent / equal
    return values | {"spread of the costs": float(costs.std() / costs.mean())}


def main(argv: Sequence[str] | None = None) -> None:
    summary = (__doc__ or "").partition("\n")[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m experiments.caption_costs", description=summary)
    parser.add_argument("--captions", type=Path, required=True, help="a file in LLaVA's format")
    parser.add_argument("--llm", required=True, help="a language model, by name or folder")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--truth", type=int, default=96, help="queries behind a measured trace (default 96)")
    parser.add_argument("--draws", type=int, default=100, help="estimates behind a slope (default 100)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    llm, tokenizer = load_language_model(options.llm)
    entries = json.loads(options.captions.read_text())
    texts = [text for entry in entries for text in entry.get("captions", [entry["conversations"][-1]["value"]])]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    lengths = np.array([len(each) for each in ids])
    print(f"{len(ids)} captions of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average")
    four = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in FOUR]
    seeds = range(options.seeds)
    show(
        "Estimates with 60 queries at sigma 0.004 of the vectors",
        [slopes(llm, four, draws=options.draws, seed=seed) for seed in seeds],
    )
    epochs = [
        padding(np.random.default_rng(seed).permutation(lengths) + TOKENS - 1, batch=64, queries=60, chunk_rows=256)
        for seed in seeds
    ]
    show("Tokens run / needed, batch 64, 60 queries, chunks of 256 rows", epochs)
    found = [gains(Alignment(llm, ids, seed), options.truth) for seed in seeds]
    show("J at equal tokens / J of equal counts", found)


def show(title: str, by_seed: Sequence[Mapping[str, float]]) -> None:
    print(f"\n{title}; mean over {len(by_seed)} seeds (least - most)")
    for name in by_seed[0]:
        values = [each[name] for each in by_seed]
        print(f"  {name}: {statistics.fmean(values):.3f} ({min(values):.3f} - {max(values):.3f})")


if __name__ == "__main__":
    main()
