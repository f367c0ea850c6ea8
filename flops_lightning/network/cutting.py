"""Where any network can be cut into stages: found by running it on two and on three rows, and checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.calls import uncompiled
from flops_lightning.network.example import check_rows, close, coarsest, two_rows
from flops_lightning.network.replay import Boundary, Facts, ReplayedNetwork, RowAxis, result_of
from flops_lightning.network.rows import Key, Rows, has_derivative
from flops_lightning.network.trace import Trace, find_units, trace

WHOLE = RowAxis(0, 1)


def stage_whole(module: nn.Module) -> ReplayedNetwork:
    """Any network as a single stage."""
    return ReplayedNetwork(module, (), (), Facts(users={name: {0} for name, _ in module.named_parameters()}))


def stage_by_replay(module: nn.Module, example: Any) -> ReplayedNetwork:
    """Cut any network into stages by running it on two and three rows of ``example``.

    Its stages are the modules that run once each, as large as possible, but containers of repeated blocks are taken
    apart into blocks, and the head into its layers. Parameters that code outside of these modules uses belong to the
    stage in which they are used. Places at which no query could start (a module is called again later, hands over
    tensors in another way than by returning them, or mixes the rows of a batch) lie within a stage.
    """
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), uncompiled(module):
            pair = two_rows(module, example)
            unfit = check_rows(module, pair)
            turned = pair.index_select(0, torch.tensor([0, 1, 0], device=pair.device))

            def cut(taken_apart: type[nn.Module]) -> tuple[ReplayedNetwork, int]:
                units, repeated = find_units(module, pair.clone(), taken_apart)  # copies: it may write to its inputs
                two, three = (trace(module, units, each.clone(), result_of) for each in (pair, turned))
                obstacles = dict.fromkeys(repeated, "it runs more than once")
                return _faithful(_network(module, units, two, three, unfit, obstacles), turned), len(units)

            network, units = cut(nn.Module)
            if 3 * len(network) < units:  # blocks of several branches were taken apart
                network = max(network, cut(nn.Sequential)[0], key=len)
            return network
    finally:
        for each, training in modes:
            each.training = training


def _network(
    module: nn.Module,
    units: Sequence[str],
    two: Trace,
    three: Trace,
    unfit: Mapping[str, str],
    obstacles: Mapping[str, str],
) -> ReplayedNetwork:
    axes = {key: _axis(two.outputs[key], three.outputs[key]) for key in three.outputs}
    users = _users(module, units, three)
    trained = [each for name, each in users.items() if module.get_parameter(name).requires_grad]
    # Words, masks and lengths: code may look at their values in ways that no trace shows, and they are small.
    counts = frozenset(k for k, t in three.outputs.items() if unit_of(k) < 0 and not has_derivative(t) and t.dim())
    learns = _trained(three, trained)
    boundaries: list[Boundary] = []
    against = dict(obstacles)
    for first in range(1, len(units)):
        needed = frozenset(k for k, last in three.last_read.items() if unit_of(k) < first <= last) | counts
        below = [k for k in needed if unit_of(k) == first - 1]
        main = min((k for k in below if _carries_noise(three.outputs[k], axes[k])), default=None)
        # Noise enters the main tensor alone: no gradient may pass beside it.
        beside = any(unit_of(k) in learns and has_derivative(three.outputs[k]) for k in needed if k != main)
        checks = {
            "it has no parameters": next(module.get_submodule(units[first - 1]).parameters(), None) is None,
            "nothing above it has parameters": all(max(u) < first for u in users.values()),
            "it, or a module below, hands over a tensor in another way than by returning it":
                any(u < first <= v for u, v in three.hidden),
            "a trained weight is used both below its end and above": any(min(u) < first <= max(u) for u in trained),
            "its output has no floats that lie in one row for each sample": main is None,
            "a tensor that depends on trained parameters passes beside its output": beside,
            "a tensor that is needed above it has no axis of rows": any((axes[k] or WHOLE).each != 1 for k in needed),
        }  # fmt: skip
        obstacle = next((why for why, found in checks.items() if found), None)
        if obstacle is not None:
            against[units[first - 1]] = obstacle
        elif main is not None:
            boundaries.append(Boundary(first, needed, main))
    entries = Rows({}, skeletons={"inputs": three.inputs}).entries
    facts = Facts(users, axes, frozenset(three.written), three.overwrites, entries, dict(unfit), against)
    return ReplayedNetwork(module, units, boundaries, facts)


def _trained(seen: Trace, trained: Sequence[set[int]]) -> set[int]:
    """The units whose outputs depend on trainable parameters."""
    found: set[int] = set()
    for unit in sorted({*seen.reads, *(u for users in trained for u in users)}):
        if any(unit in users for users in trained) or any(unit_of(k) in found for k in seen.reads.get(unit, ())):
            found.add(unit)
    return found


def unit_of(key: Key) -> int:
    """The unit that gave a tensor; -1 for inputs."""
    return -1 if key[0] == "inputs" else key[0]


def _axis(two: Tensor, three: Tensor) -> RowAxis | None:
    """Along which axis the rows of a tensor lie that was seen with two and with three; None: all rows share it."""
    if two.dim() != three.dim():
        return RowAxis(0, 0)
    grown = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        return None if torch.equal(two, three) else RowAxis(0, 0)
    (axis, *more), shape = grown, two.shape
    fits = not more and shape[axis] % 2 == 0 and 3 * shape[axis] == 2 * three.shape[axis]
    return RowAxis(axis, shape[axis] // 2 if fits else 0)


def _carries_noise(tensor: Tensor, axis: RowAxis | None) -> bool:
    return tensor.is_floating_point() and axis is not None and axis.each == 1


def _users(module: nn.Module, units: Sequence[str], seen: Trace) -> dict[str, set[int]]:
    """The units that read or own each parameter, by name; one that nobody reads belongs to the last."""
    known = {id(p): name for name, p in module.named_parameters()}
    users = {name: set(seen.parameters.get(name, ())) for name in known.values()}
    for alias, parameter in module.named_parameters(remove_duplicate=False):
        users[known[id(parameter)]] |= {i for i, unit in enumerate(units) if alias.startswith(f"{unit}.")}
    return {name: each or {len(units)} for name, each in users.items()}


def _faithful(network: ReplayedNetwork, rows: Rows) -> ReplayedNetwork:
    """The network without those boundaries from which a stage does not compute what it computes in the clean pass."""
    clean: dict[int, Any] = {}

    def keep(i: int, h: Rows) -> None:
        clean[i] = h.clone()

    while True:
        clean[len(network)] = network.visit(rows, 0, range(1, len(network)), keep)
        wrong = [i for i in range(1, len(network)) if not _agrees(network, i, clean)]
        if not wrong:
            return network
        network = network.without(wrong)


def _agrees(network: ReplayedNetwork, stage: int, clean: Mapping[int, Any]) -> bool:
    turned = torch.tensor([1, 2, 0], device=clean[stage].device)  # queries take the rows of a batch in any order
    try:
        output = network.run(clean[stage].index_select(0, turned), stage, stage + 1)
    except (RuntimeError, TypeError, ValueError, LookupError, SettingError):
        return False
    expected = clean[stage + 1].index_select(0, turned)
    found, expected = ([h] if isinstance(h, Tensor) else h.tensors.values() for h in (output, expected))
    eps = coarsest(network.module)
    return all(close(a, b, eps) for a, b in zip(found, expected, strict=True))
