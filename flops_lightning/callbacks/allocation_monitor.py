"""What an allocation was worth, measured with queries that it was not made from.

The queries of a step show traces that were unknown when its counts were chosen (held back). Every
``log_every_n_steps`` batches this gives:

==================================  ====================================================================================
``J_over_J_equal_seen``             J of the counts used over J of equal counts, both with the traces seen, mean over
                                    the sites: the factor by which the allocator changes the gradient's variance. (The
                                    allocators' own ``J_over_J_equal`` flatters.) Pilots count as queries.
``J_over_J_equal_seen/<site>``      The same at each site, if there are 2 to 8.
``J_over_J_optimal_seen``           J of the counts used over the least possible with as many queries, mean over the
                                    sites: 1 is perfect. Corrected for the noise in the traces.
``seen_share``                      Share of the traces that were seen. A sample without queries at a site shows none:
                                    :func:`held_back_ratios` says what this hides.
``loss_trace_correlation``          Spearman's rank correlation over the batch of clean loss and trace seen, mean over
                                    the sites: how far the loss alone (as in the Gaussian and the Bernoulli allocator)
                                    can tell noisy samples. Noise in the traces lowers this and the next two.
``pilot_trace_correlation``         The same of the pilots' trace and the trace seen, at the sites that have pilots.
``pilot_rank_correlation``          The same of the pilots' traces at two sites, mean over all pairs of sites with
                                    pilots: whether pilots at one site speak for another.
``sharing/<site>``                  Variance of the gradient if all samples shared their directions over that with
                                    directions of their own, at equal queries: ``B |g|^2 / mean_b |g_b|^2``. Below 1
                                    ``directions: shared`` is less noisy. (Strategies that perturb parameters.)
==================================  ====================================================================================

A figure that does not exist for a batch (nothing seen, all traces zero, a constant loss) is not logged. Ratios of one
batch are noisy: look at the smoothed curve. They compare the split over samples at each site, not the split over sites.

TensorBoard also gets, at the trainer's ``global_step``, the histogram of the counts at each site (``counts/<site>``)
and, every tenth time, the images of the batch with the most and the fewest queries over all sites
(``allocation/most_queries``, ``allocation/fewest_queries``), the brightness of each stretched to 0..1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from flops_lightning.allocators.base import one_thread
from flops_lightning.allocators.held_back import held_back_ratios, rank_correlation
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, SampleStatistics, TraceObservation
from flops_lightning.tensorboard import tensorboard_writers

PICTURES_EVERY = 10  # watched steps from one set of pictures to the next
IMAGES = 8  # in a picture
SITES_SHOWN = 8  # largest number of sites with a figure for each
GAP = 2  # pixels between the images of a picture


class AllocationMonitor:
    """Figures and pictures of the allocations, for the logger of a run."""

    def __init__(self) -> None:
        self._watched = 0

    def watch(
        self, trainer: Trainer, statistics: SampleStatistics, allocation: Allocation,
        observation: TraceObservation | None, batch: Any, *, samples: int, sites: Sequence[str],
    ) -> dict[str, float]:  # fmt: skip
        """Show counts and images in TensorBoard, if the trainer logs there, and return :func:`allocation_figures`.

        The statistics are what the allocator knew, the observation what the queries of the step showed. ``samples`` is
        the number of samples of this process; in the tables of the first process they come first.
        """
        for writer in tensorboard_writers(trainer):
            for site, counts in zip(_names(sites, len(allocation.counts)), allocation.counts, strict=True):
                writer.add_histogram(f"counts/{site}", counts, trainer.global_step, bins="auto")
            if self._watched % PICTURES_EVERY == 0:
                for name, picture in count_pictures(allocation.counts[:, :samples], batch).items():
                    writer.add_image(f"allocation/{name}", picture, trainer.global_step)
        self._watched += 1
        return allocation_figures(statistics, allocation, observation, sites)


def _names(sites: Sequence[str], number: int) -> Sequence[str]:
    return sites if len(sites) == number else [str(i) for i in range(number)]


@one_thread()
def allocation_figures(
    statistics: SampleStatistics, allocation: Allocation, observation: TraceObservation | None,
    sites: Sequence[str] = (),
) -> dict[str, float]:  # fmt: skip
    """The figures of one batch, by their names in the module's docstring, without those that do not exist."""
    tables = _tables(statistics, allocation, observation)
    values: dict[str, Tensor] = {}
    pilot = tables.get("pilot")
    if observation is not None:
        seen = TraceObservation(tables["seen"], tables["queries"], observation.unit)
        given = {"pilots": tables.get("pilots"), "pilot_weight": allocation.pilot_weight}
        used = allocation.counts
        if allocation.inclusion is not None and allocation.expected is not None:
            # Those that were drawn speak for the others.
            seen, used = replace(seen, trace=seen.trace / allocation.inclusion), allocation.expected
        ratios = held_back_ratios(seen, used, pilots_reused=statistics.pilots_reused, **given)
        values["J_over_J_equal_seen"] = ratios.over_equal.nanmean()
        if 2 <= len(ratios.over_equal) <= SITES_SHOWN:
            named = zip(_names(sites, len(ratios.over_equal)), ratios.over_equal, strict=True)
            values |= {f"J_over_J_equal_seen/{site}": ratio for site, ratio in named}
        values["J_over_J_optimal_seen"] = ratios.over_optimal.nanmean()
        values["seen_share"] = seen.trace.isfinite().double().mean()
        if observation.sharing is not None and len(observation.sharing) <= SITES_SHOWN:
            named = zip(_names(sites, len(observation.sharing)), observation.sharing.double().cpu(), strict=True)
            values |= {f"sharing/{site}": ratio for site, ratio in named}
        values["loss_trace_correlation"] = rank_correlation(tables["loss"], seen.trace).nanmean()
        if pilot is not None:
            values["pilot_trace_correlation"] = rank_correlation(pilot, seen.trace).nanmean()
    if pilot is not None and len(pilot) > 1:
        pairs = [rank_correlation(pilot[i], pilot[i + 1 :]) for i in range(len(pilot) - 1)]
        values["pilot_rank_correlation"] = torch.cat(pairs).nanmean()
    numbers = torch.stack(list(values.values())).tolist() if values else []
    return {name: number for name, number in zip(values, numbers, strict=True) if not math.isnan(number)}


def _tables(
    statistics: SampleStatistics, allocation: Allocation, observation: TraceObservation | None
) -> dict[str, Tensor]:
    """The tables behind the figures, ``(s, b)`` or ``(1, b)`` each, in float64 on the CPU, by one transfer."""
    given = {"loss": statistics.loss, "pilot": statistics.trace, "pilots": statistics.trace_queries}
    if observation is not None:
        given |= {"seen": observation.trace, "queries": observation.queries}
    device = statistics.loss.device
    tables = {n: torch.atleast_2d(table.detach()).to(device) for n, table in given.items() if table is not None}
    sites = len(tables["seen"]) if observation is not None else len(allocation.counts)
    for name, table in (*tables.items(), ("counts", allocation.counts)):
        if len(table) not in (1, sites) or table.shape[1] != len(statistics.loss):
            problem = f"does not fit {name} of the shape {tuple(table.shape)}."
            remedy = "Return (s, b): one row for each site, one entry for each sample."
            raise SettingError("trace_observation", (sites, len(statistics.loss)), problem, remedy)
    flat = torch.cat(list(tables.values())).cpu().double()
    return dict(zip(tables, flat.split([len(table) for table in tables.values()]), strict=True))


def count_pictures(counts: Tensor, batch: Any) -> dict[str, Tensor]:
    """Pictures of the images that got the most and the fewest queries, in the order of their counts.

    ``counts`` is ``(s, b)``, ``batch`` ``(images (b, c, h, w), ...)`` with one or three channels; other batches give no
    picture, nor do equal counts. Returns ``most_queries`` and ``fewest_queries``, ``(c, h, w')`` on the CPU in 0..1, of
    up to eight images each, none in common.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else None
    total = counts.sum(dim=0)
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        return {}
    if len(images) != len(total) or int(total.min()) == int(total.max()):
        return {}
    order = total.argsort(descending=True, stable=True)
    number = min(IMAGES, len(total) // 2)
    chosen = {"most_queries": order[:number], "fewest_queries": order.flip(0)[:number]}
    return {name: image_row(images[some.to(images.device)].detach().cpu()) for name, some in chosen.items()}


def image_row(images: Tensor) -> Tensor:
    """``(c, h, w')`` row of ``(n, c, h, w)`` images, each stretched to 0..1 over its channels, with black gaps."""
    images = images.float().nan_to_num()
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    stretched = torch.where(high > low, (images - low) / (high - low), 0.0)
    return torch.cat(list(F.pad(stretched, (0, GAP))), dim=2)[:, :, :-GAP]
