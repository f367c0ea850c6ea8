"""``python -m benchmarks.replay``: queries through replayed networks, beside whole passes and the stages of a ViT.

A query at a site replays what lies below it. Each network's sites are the default layout: three groups and the head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from benchmarks.cases import vit
from benchmarks.harness import Record, alternate, command, finish, synchronizer, table
from flops_lightning.network.cutting import stage_by_replay
from flops_lightning.network.rows import as_rows
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies.costs import SiteCosts, site_costs
from flops_lightning.strategies.sites import resolve_sites


def convnext() -> nn.Module:
    return vit("convnext_atto")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))


def photos(rows: int) -> Any:
    return torch.randn(rows, 3, 224, 224)


def words(rows: int) -> Any:
    ids = torch.randint(512, (rows, 64))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "ViT-Tiny/16, 224 px": (vit, photos),
    "ConvNeXt-Atto, 224 px": (convnext, photos),
    "Llama, 8 layers of 256, 64 words": (llama, words),
}


@torch.no_grad()
def measure(name: str, *, rows: int, rounds: int, device: torch.device) -> Record:
    """Time of one chunk of queries at every site: replayed, from the start, and (a ViT) from its own stages."""
    torch.manual_seed(0)
    build, make = NETWORKS[name]
    module, inputs = build().eval().to(device), move_data_to_device(make(rows), device)
    network = stage_by_replay(module, inputs)
    inputs, sites = as_rows(inputs), resolve_sites(network, ())
    starts = [site.start for site in sites if site.start < len(network)]
    kept = {i: network.run(inputs.clone(), 0, i) for i in starts}
    runs: dict[str, Callable[[], object]] = {
        "replayed": lambda: [network.run(kept[i].clone(), i) for i in starts],
        "whole": lambda: [network.run(inputs.clone()) for _ in starts],
    }
    if name.startswith("ViT"):
        staged = stage_network(module).with_all_tokens()  # replay does not know which tokens are read
        places = {i: staged.index[network.stages[i - 1].name] + 1 for i in starts}
        own = {place: staged.run(inputs.clone(), 0, place) for place in places.values()}
        runs["staged"] = lambda: [staged.run(own[place].clone(), place) for place in places.values()]
    timed = alternate(runs, rounds=rounds, synchronize=synchronizer(device))
    costs: SiteCosts = site_costs(network, sites, inputs)
    counted = len(starts) / sum(costs.from_stage[i] for i in starts)
    found = timed.ratio("whole", "replayed")
    return {
        "model": name, "rows": rows, "sites": len(starts), "speed_up": found, "counted": counted,
        "of_counted": found.median / counted, "staged": timed.ratio("staged", "replayed") if "staged" in runs else None,
    }  # fmt: skip


COLUMNS = {
    "network": "{model}", "speed-up over whole passes": "{speed_up:.2f}", "by FLOPs": "{counted:.2f}",
    "of what FLOPs say": "{of_counted:.2f}", "the ViT's own stages over replay": "{staged:.3f}",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = command("benchmarks.replay", __doc__, device=True, rounds=9, rows=16).parse_args(argv)
    size = {"rows": options.rows, "rounds": options.rounds, "device": options.device}
    records = [measure(name, **size) for name in NETWORKS]
    print(table(COLUMNS, records))
    finish(options, records)


if __name__ == "__main__":
    main()
