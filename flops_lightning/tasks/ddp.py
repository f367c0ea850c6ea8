"""Lightning's data-parallel strategy without torch's reducer, which forward-only training never triggers."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from flops_lightning.distributed import broadcast_state


class ForwardDDPStrategy(DDPStrategy):
    """A replica of the network in each process, from rank 0's start; the task reduces gradients itself.

    ``DistributedDataParallel`` reduces in hooks of ``backward``, which is not called, and its reducer would hold a
    second copy of the gradients. Processes are started as under ``strategy: ddp``, ``torchrun`` and SLURM included.
    """

    def configure_ddp(self) -> None:
        """Give every rank the state of rank 0, and leave the module as it is."""
        if self.lightning_module is not None:
            broadcast_state(self.lightning_module)


def drop_reducer(strategy: object) -> None:
    """Turn the strategy that ``strategy: auto`` and ``ddp`` mean into :class:`ForwardDDPStrategy`.

    Lightning builds it from words before any module can have a say; the class changes how it is set up and adds no
    state. A subclass of DDPStrategy is left as its author wants it.
    """
    if type(strategy) is DDPStrategy:
        strategy.__class__ = ForwardDDPStrategy
