"""``python -m benchmarks.language``: a step of an adapter before a frozen Llama, beside inference and backprop.

The models have random weights and three sizes. Inference is the model and its cross-entropy on as many rows as the step
has queries, in the step's own chunks, each cut to its longest caption. Peaks of memory, with as many rows in a forward
pass as the batch has samples, are taken in processes of their own that have run a smaller model before, and beside them
those of the tensors alone.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Record, Spread, alternate, command, finish, say, synchronizer, table
from benchmarks.memory import peak_in_a_process
from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.language import CaptionLoss
from flops_lightning.network.memory import give_back_freed, held, peak_bytes, restart_peak
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import CleanPass, plan_rows
from flops_lightning.strategies import Backprop, ForwardGradientStrategy, LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets

SIZES: dict[str, dict[str, int]] = {
    "0.3M": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": 512},
    "7M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 4096},
    "45M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 9, "vocab_size": 8192},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
}
FEATURES, LENGTHS = 192, (8, 24)
INFERENCE, STEP, BACKPROP, CHECKPOINTED = "inference", "step", "backprop", "checkpointed backprop"
PEAKS = (INFERENCE, STEP, BACKPROP, CHECKPOINTED)
STEPS = 2


@dataclass(frozen=True, eq=False)
class Problem:
    """An adapter, the model behind it, and a batch."""

    adapter: nn.Module
    loss: CaptionLoss
    x: Tensor
    captions: PaddedTargets
    queries: int
    chunk_rows: int

    @classmethod
    def of(
        cls, size: str, *, batch: int, queries: int, chunk_rows: int, device: torch.device, dtype: torch.dtype
    ) -> "Problem":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes: Any = SIZES[size]
        config = LlamaConfig(num_attention_heads=sizes["hidden_size"] // 64 * 4, **sizes)
        llm: Any = LlamaForCausalLM(config)
        adapter = nn.Sequential(nn.Linear(FEATURES, sizes["hidden_size"])).to(device)
        lengths = np.linspace(*LENGTHS, batch).astype(np.int64)  # ascending, as sorted batches are
        captions = PaddedTargets.of([torch.randint(sizes["vocab_size"], (int(n),)) for n in lengths]).to(device)
        x = torch.nn.functional.normalize(torch.randn(batch, FEATURES), dim=1).to(device)
        return cls(adapter, CaptionLoss(llm.to(device, dtype)), x, captions, queries, chunk_rows)

    def likelihood_ratio(self) -> LikelihoodRatio:
        # Wide enough for half precision, whose rounding would be refused.
        site = {"stages": ["0"], "kind": "linear", "sigma": 0.05, "queries_per_sample": self.queries}
        return self.bound(LikelihoodRatio(sites=[site], chunk_rows=self.chunk_rows, seed=0))

    def bound(self, strategy: Any) -> Any:
        strategy.bind(stage_network(self.adapter), self.loss)
        return strategy

    def step(self, strategy: ForwardGradientStrategy, allocator: OptimalAllocator | None = None) -> None:
        """``.grad`` of the batch."""
        self.adapter.zero_grad()
        clean = strategy.clean_pass(self.x, self.captions)
        if allocator is None or strategy.budget is None:
            strategy.estimate(clean)
            return
        counts = allocator.allocate(strategy.sample_statistics(clean, allocator.requests), strategy.budget).counts
        estimate = strategy.estimate(clean, counts, traces=True)
        if estimate.observation is not None:
            allocator.observe(estimate.observation)

    def rows(self, counts: np.ndarray) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What inference of so many queries a sample takes: vectors, ids and mask of each chunk."""
        with torch.no_grad():
            z = self.adapter(self.x)[:, None]
        found = []
        for chunk in plan_rows(counts, self.chunk_rows):
            index = torch.from_numpy(chunk.samples).to(z.device)
            some = self.captions.take(index, chunk.samples)
            found.append((z[index], some.trimmed(), some.mask()))
        return found

    @torch.no_grad()
    def losses(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        embed = self.loss.llm.get_input_embeddings()
        for z, ids, mask in rows:
            inputs = torch.cat([z.to(embed.weight.dtype), embed(ids[:, :-1])], 1)
            logits = self.loss.llm(inputs_embeds=inputs, use_cache=False, logits_to_keep=ids.shape[1]).logits.float()
            of_token = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
            (of_token * mask).sum(1).div(mask.sum(1))

    @torch.inference_mode()
    def infer(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.losses(rows)

    def contender(self, name: str) -> Callable[[], object]:
        """One of :data:`PEAKS`; inference of as many rows as the batch has samples."""
        if name == INFERENCE:  # without inference mode, which hides a part of its tensors from `peak_bytes`
            return partial(self.losses, self.rows(np.ones(len(self.x), dtype=np.int64)))
        step = partial(self.step, self.likelihood_ratio() if name == STEP else self.bound(Backprop()))

        def checkpointed() -> None:
            with self.checkpointed():
                step()

        return checkpointed if name == CHECKPOINTED else step

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Every layer of the model keeps its input alone; it has no dropout, so training mode changes nothing else."""
        llm = self.loss.llm
        llm.train()
        # Newer versions of transformers have another name for it.
        enable = getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)
        disable = getattr(llm, "activation_checkpointing_disable", llm.gradient_checkpointing_disable)
        enable({"use_reentrant": False})
        try:
            yield
        finally:
            disable()
            llm.eval()


def problem(size: str, options: argparse.Namespace) -> Problem:
    return Problem.of(
        size, batch=options.batch, queries=options.queries, chunk_rows=options.chunk_rows, device=options.device,
        dtype=getattr(torch, options.dtype),
    )  # fmt: skip


def timing(options: argparse.Namespace) -> dict[str, Any]:
    # A busy machine takes the processor away, and its time does not count.
    clock = time.perf_counter if options.device.type == "cuda" else time.process_time
    return {"rounds": options.rounds, "synchronize": synchronizer(options.device), "clock": clock}


def allocation(size: str, options: argparse.Namespace) -> Record:
    """Steps with the allocator beside steps with equal counts, and the allocator's own work beside these."""
    made = problem(size, options)
    strategy, allocator = made.likelihood_ratio(), OptimalAllocator(traces=TraceSettings(predictors=["loss"]))
    clean = strategy.clean_pass(made.x, made.captions)
    observation = strategy.estimate(clean, traces=True).observation
    assert observation is not None
    assert strategy.budget is not None

    def work() -> None:
        allocator.allocate(strategy.sample_statistics(clean, allocator.requests), strategy.budget)
        allocator.observe(observation)

    runs = {STEP: lambda: made.step(strategy), "allocated": lambda: made.step(strategy, allocator), "work": work}
    timed = alternate(runs, **timing(options))
    milliseconds = Spread.of(1000 * seconds for seconds in timed.seconds["work"])
    return {
        "size": size, "allocated": timed.ratio("allocated", STEP), "share": timed.ratio("work", STEP),
        "milliseconds": milliseconds,
    }  # fmt: skip


def measure(size: str, options: argparse.Namespace) -> Record:
    made = problem(size, options)
    strategy = made.likelihood_ratio()
    clean = strategy.clean_pass(made.x, made.captions)
    counts = np.full(options.batch, options.queries)
    rows, once = made.rows(counts), made.rows(np.ones(options.batch, dtype=np.int64))
    runs: dict[str, Callable[[], object]] = {
        INFERENCE: lambda: made.infer(rows),
        "queries": lambda: run_queries(strategy, clean, counts),
        "with clean": lambda: made.infer([*once, *rows]),
    } | {name: made.contender(name) for name in (STEP, BACKPROP, CHECKPOINTED)}
    timed = alternate(runs, **timing(options))
    return {
        "size": size, "parameters": sum(p.numel() for p in made.loss.llm.parameters()) / 1e6,
        "of_queries": timed.ratio(INFERENCE, "queries"), "of_step": timed.ratio("with clean", STEP),
        "over_backprop": timed.ratio(STEP, BACKPROP), "over_checkpointed": timed.ratio(STEP, CHECKPOINTED),
        "seconds": Spread.of(timed.seconds[STEP]),
    }  # fmt: skip


@torch.no_grad()
def run_queries(strategy: LikelihoodRatio, clean: CleanPass, counts: np.ndarray) -> None:
    strategy.engine.query(strategy.sites[0], clean, counts)


def small_steps(size: str, options: argparse.Namespace, *, batch: int) -> Problem:
    """A problem for peaks of memory: two queries a sample need no more than 20 and take less time."""
    dtype = getattr(torch, options.dtype)
    return Problem.of(size, batch=batch, queries=2, chunk_rows=batch, device=options.device, dtype=dtype)


def peak(name: str, size: str, options: argparse.Namespace) -> float:
    """MiB at the peak of steps, beyond what the process held before the model was built."""
    torch.set_num_threads(1)
    # Libraries are no part of a step, nor is what they read and set up at their first use, 9 MiB here.
    small_steps("0.3M", options, batch=2).contender(name)()
    give_back_freed()
    restart_peak()
    before = held("VmRSS") or 0.0
    run = small_steps(size, options, batch=options.batch).contender(name)
    for _ in range(STEPS):
        run()
    if options.device.type == "cuda":
        return torch.cuda.max_memory_allocated(options.device) / 2**20
    return (held("VmHWM") or 0.0) - before


def tensors(name: str, size: str, options: argparse.Namespace) -> float:
    """Bytes of the weights and, at their peak, of the tensors that a step makes."""
    made = small_steps(size, options, batch=options.batch)
    run = made.contender(name)
    run()  # the first counts operations
    return peak_bytes(run) + sum(p.nbytes for p in made.loss.llm.parameters())


def peaks(size: str, options: argparse.Namespace) -> Record:
    shared = ["--batch", str(options.batch), "--device", str(options.device), "--dtype", options.dtype]
    found = {
        name: [peak_in_a_process("benchmarks.language", "--one", name, "--sizes", size, *shared) for _ in range(3)]
        for name in PEAKS
    }
    inference = Spread.of(found[INFERENCE], tails=0).median
    ratios: Record = {
        f"memory {name}": Spread.of((x / inference for x in values), tails=0) for name, values in found.items()
    }
    of_tensors = {name: tensors(name, size, options) for name in PEAKS}
    ratios |= {f"tensors {name}": value / of_tensors[INFERENCE] for name, value in of_tensors.items()}
    return ratios | {"size": size, "mebibytes": inference, "mebibytes of tensors": of_tensors[INFERENCE] / 2**20}


TIMES = {
    "model": "{size}", "parameters, M": "{parameters:.1f}", "inference / queries": "{of_queries:.3f}",
    "inference / step": "{of_step:.3f}", "step / backprop": "{over_backprop:.1f}",
    "step / checkpointed": "{over_checkpointed:.1f}", "step, s": "{seconds:.2f}",
}  # fmt: skip
MEMORY = {
    "model": "{size}", "inference, MiB": "{mebibytes:.0f}", "step": "{memory step:.2f}",
    "backprop": "{memory backprop:.2f}", "checkpointed backprop": "{memory checkpointed backprop:.2f}",
    "tensors of inference, MiB": "{mebibytes of tensors:.1f}", "of a step": "{tensors step:.2f}",
    "of backprop": "{tensors backprop:.2f}", "of checkpointed": "{tensors checkpointed backprop:.2f}",
}  # fmt: skip


SHARES = {
    "model": "{size}", "allocated / equal": "{allocated:.3f}", "allocator / step": "{share:.4f}",
    "allocator, ms": "{milliseconds:.1f}",
}  # fmt: skip
PARTS: dict[str, tuple[Callable[[str, argparse.Namespace], Record], dict[str, str], str]] = {
    "time": (measure, TIMES, "Times of a step, of inference and of backprop"),
    "allocation": (allocation, SHARES, "Time of a step"),
    "memory": (peaks, MEMORY, "Peak memory over inference of as many rows as the batch has samples"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.language", __doc__, device=True, rounds=5, batch=8, queries=20, chunk_rows=256)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.3M", "7M", "45M"], help="models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--one", choices=PEAKS, help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args(argv)
    if options.one:
        print(peak(options.one, options.sizes[0], options))
        return
    found = []
    for part in options.parts:
        measured, columns, title = PARTS[part]
        records = []
        for size in options.sizes:
            say(f"{part}, {size} ...")
            records.append(measured(size, options))
        print(f"{title}:\n\n{table(columns, records)}\n")
        found += records
    finish(options, found)


if __name__ == "__main__":
    main()
