"""Parts of ``python -m benchmarks.gpu``: a real run with Lightning, and two processes on one device over gloo."""

import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from benchmarks.cases import VIT_MICRO, Case
from benchmarks.gpu_parts import SMALL, Plan, goal, precision, waits_of
from benchmarks.gpu_speed import EventClock, HostMark, cuda_mark
from benchmarks.harness import Record, alternate, synchronizer
from flops_lightning.distributed import ProcessGroup, reduce_gradients
from flops_lightning.objectives import cross_entropy
from flops_lightning.phases import timed_phases
from flops_lightning.strategies import LikelihoodRatio

PIXELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Mean and standard deviation of CIFAR-10."""
SECONDS, BATCH, PER_CLASS = 60, 128, {"train": 2500, "test": 200}
RANKS = 2


def training(plan: Plan) -> Iterator[Record]:
    """(f) ViT-Micro from random weights with Lightning and the Gaussian allocator: what waits, and a minute's worth.

    It needs torchdata, which tasks import.
    """
    if plan.device.type == "cuda":
        few = torch.randn(4 * BATCH, 3, 32, 32), torch.arange(4 * BATCH) % 10
        places = waits_of(lambda: fit(plan, few, max_epochs=1))
        yield {"what": "four training steps", "waits": sum(places.values()), "where": dict(places)}
    if plan.cifar10 is None:
        yield {"what": "CIFAR-10", "left out": "no images: give their folder with --cifar10"}
        return
    train, test = (images(plan.cifar10, part, PER_CLASS[part]) for part in ("train", "test"))
    yield fit(plan, train, test, max_epochs=-1, max_time={"seconds": 1 if plan.quick else SECONDS})


def fit(plan: Plan, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor] | None = None, **length: Any) -> Record:
    """Train on images; accuracies on ``test`` before and after, images a second, the allocator's share of the time."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from flops_lightning.allocators import GaussianAllocator, TraceSettings
    from flops_lightning.callbacks import QueryAllocatorCallback
    from flops_lightning.tasks import ForwardImageClassifier, OptimizerSettings

    torch.manual_seed(0)
    cuda = plan.device.type == "cuda"
    kwargs = {"img_size": 32, "patch_size": 4, "depth": 1 if plan.quick else 6, "num_heads": 6, "mlp_ratio": 2.0}
    task = ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=10,
        strategy=LikelihoodRatio(chunk_rows="auto", seed=0), optimizer=OptimizerSettings(lr=1e-3),
    )  # fmt: skip
    callback = QueryAllocatorCallback(allocator=GaussianAllocator(traces=TraceSettings(source="prediction")))
    trainer = Trainer(
        accelerator=plan.device.type, devices=1, logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, **length,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*train), batch_size=min(BATCH, len(train[0])), shuffle=True, pin_memory=cuda)
    held = None if test is None else DataLoader(TensorDataset(*test), batch_size=BATCH)
    accuracies = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        if held is not None:
            accuracies.append(trainer.test(task, held, verbose=False)[0]["test/accuracy"])
        clock = EventClock(mark=cuda_mark if cuda else HostMark)
        with timed_phases(clock=clock):
            start = clock.mark()
            trainer.fit(task, loader)
            end = clock.mark()
        synchronizer(plan.device)()
        if held is not None:
            accuracies.append(trainer.test(task, held, verbose=False)[0]["test/accuracy"])
    seconds, phases = start.elapsed_time(end) / 1e3, clock.read()
    share = phases.get("allocation", 0.0) / seconds
    return {
        "what": "CIFAR-10", "minutes": seconds / 60, "steps": trainer.global_step,
        "images a second": trainer.global_step * min(BATCH, len(train[0])) / seconds,
        "accuracy before and after": accuracies, "allocation share": share,
        "goals": [goal("allocator and callback / training", share, most=0.01)],
    }  # fmt: skip


def images(folder: Path, part: str, per_class: int) -> tuple[Tensor, Tensor]:
    """``(n, 3, 32, 32)`` images and their labels, so many of a class, from torchvision's archive or class folders."""
    from torchvision.datasets import CIFAR10, ImageFolder

    if (folder / CIFAR10.base_folder).is_dir():
        archive = CIFAR10(str(folder), train=part == "train")
        pixels, labels = archive.data, np.array(archive.targets)
        chosen = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)])
        array, targets = pixels[chosen], labels[chosen]
    else:
        found = ImageFolder(str(folder / part))
        names = [names[:per_class] for names in by_label(found.samples)]
        array = np.stack([np.asarray(found.loader(name)) for some in names for name in some])
        targets = np.repeat(np.arange(len(names)), [len(some) for some in names])
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in PIXELS)
    return (torch.from_numpy(array).permute(0, 3, 1, 2) / 255 - mean) / std, torch.from_numpy(targets).long()


def by_label(samples: list[tuple[str, int]]) -> list[list[str]]:
    return [[name for name, of in samples if of == label] for label in sorted({label for _, label in samples})]


def processes(plan: Plan) -> Iterator[Record]:
    """(g) Two processes on one device, which NCCL refuses: the same gradient as their ranks one after the other."""
    case = replace(SMALL if plan.quick else VIT_MICRO, generator="philox", rounds=1 if plan.quick else 5)
    alone = torch.stack([rank_gradient(case, plan.device, rank)[0] for rank in range(RANKS)]).mean(0)
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.start_processes(
            in_group, (case, str(plan.device), folder), RANKS, join=False, daemon=True, start_method="spawn"
        )
        try:
            while not started.join():
                pass
        finally:
            for process in started.processes:
                process.kill()  # where the time is over
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
        together = torch.load(Path(folder, "gradient.pt"), weights_only=True)
    apart = len({each["bits"] for each in found}) - 1
    difference = float((together - alone).norm() / alone.norm())
    yield {
        "what": f"{RANKS} processes, gloo, {case.model}", "step seconds of each": [each["seconds"] for each in found],
        "relative difference from one process": difference,
        "goals": [
            goal("processes with another gradient than the first", apart, most=0),
            goal("relative difference from one process", difference, most=1e-4),
        ],
    }  # fmt: skip


def rank_gradient(case: Case, device: torch.device, rank: int, group: ProcessGroup | None = None) -> Any:
    """``(p,)`` gradient of a rank's samples, of all ranks' with a ``group``, on the CPU; and how to make it again."""
    network, inputs, targets = case.load(device)
    torch.manual_seed(1 + rank)
    inputs, targets = torch.randn(inputs.shape).to(device), targets.roll(rank)
    strategy: Any = case.make_strategy(network)
    strategy.bind(network, cross_entropy)
    parameters = list(network.module.parameters())
    if group is not None:
        strategy.join(group)
    strategy.rank = rank

    def run() -> None:
        network.module.zero_grad()
        strategy.estimate(strategy.clean_pass(inputs, targets))
        if group is not None:
            reduce_gradients(group, parameters, weight=len(inputs))

    with precision("float32", device):
        run()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).cpu(), run


def in_group(rank: int, case: Case, device: str, folder: str) -> None:
    """One process: a step with the others, and how long such steps take."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo greets on stdout
    warnings.simplefilter("ignore")
    if device == "cpu":
        torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    there = torch.device(device)
    gradient, run = rank_gradient(case, there, rank, ProcessGroup())
    with precision("float32", there):
        seconds = alternate({"step": run}, rounds=case.rounds, synchronize=synchronizer(there)).seconds["step"]
    found = {"seconds": float(np.median(seconds)), "bits": zlib.crc32(gradient.numpy().tobytes())}
    if rank == 0:
        torch.save(gradient, Path(folder, "gradient.pt"))
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
