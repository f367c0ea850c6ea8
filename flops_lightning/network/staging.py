"""A network as a list of stages, so that a prefix runs once and each query pays only for its suffix.

Stages reference the modules of the network they were made from: nothing is copied and no ``state_dict`` key changes.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the common base of BatchNorm1d/2d/3d and SyncBatchNorm

from flops_lightning.errors import SettingError, check_choice


@dataclass(frozen=True, eq=False)
class StageContext:
    """What a stage computes from its parameters alone, once for all rows: ``run(x)`` is ``apply(x, compute())``.

    Attributes:
        compute: The context. With ``(m, ...)`` in place of a parameter, a line for each of the ``m``.
        apply: The rest of the stage.
    """

    compute: Callable[[], Tensor]
    apply: Callable[[Any, Tensor], Any]


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the forward pass: a tensor (or :class:`~flops_lightning.network.rows.Rows`) in and out.

    Attributes:
        name: How settings refer to it.
        run: The computation.
        members: Dotted names (of modules or parameters of the network) that it owns.
        reads: Tokens ``t`` of its input ``(r, t, d)`` on which its output depends; None means all of them.
        narrows: It may be called with only the tokens in ``reads`` and returns the same.
        tokenwise: Submodules whose output at a token affects the stage's output only at this token (if ``reads`` is
            set: whose output affects it only at these tokens).

        by_row: Its parameters may differ between the rows of its input, ``(r, ...)``.
        context: What it computes from its parameters alone, if that is most of its work.
        flops: Floating-point operations of a row and of the context, if they run elsewhere and cannot be counted here.

    Example:
        >>> stage = Stage("double", lambda x: 2 * x, members=("scale",))
        >>> stage.run(3), stage.owns("scale.weight"), stage.owns("scales")
        (6, True, False)
    """

    name: str
    run: Callable[[Any], Any]
    members: tuple[str, ...]
    reads: slice | None = None
    narrows: bool = False
    tokenwise: tuple[str, ...] = ()
    by_row: bool = False
    context: StageContext | None = None
    flops: tuple[float, float] | None = None

    def owns(self, name: str) -> bool:
        """Whether the dotted ``name`` of a parameter or module belongs to this stage."""
        return any(name == member or name.startswith(member + ".") for member in self.members)


class StagedNetwork:
    """A network cut into stages that run one after the other.

    ``run(x, 0)`` equals ``module(x)``. An activation with index ``i`` is the input of stage ``i``; the one with index
    ``len(stages)`` is the network's output.

    Attributes:
        unfit: What is wrong with layers whose output does not have one entry per row, by name; None: not known.
        live: ``(targets, t, start) -> (b, t)``: the tokens of the activations ``(b, t, d)`` entering the stage
            ``start`` on which the losses depend; None: all. Estimates leave out the others, whose derivative is zero.

    Example:
        >>> import torch
        >>> network = stage_network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        >>> x = torch.ones(5, 3)
        >>> torch.equal(network.run(network.run(x, stop=2), start=2), network.module(x))
        True
        >>> list(network.parameters_of(0, 1))
        ['0.weight', '0.bias']
    """

    unfit: Mapping[str, str] | None = None
    live: Callable[[Any, int, int], Tensor] | None = None

    def __init__(self, module: nn.Module, stages: tuple[Stage, ...]) -> None:
        self.module, self.stages = module, stages
        self.index = {stage.name: i for i, stage in enumerate(stages)}
        owners: dict[int, set[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            owner = [stage.name for stage in stages if stage.owns(name)]
            if len(owner) != 1:
                raise SettingError(
                    "network", type(module).__name__, f"parameter {name!r} belongs to the stages {owner}, not to one.",
                    "Build the StagedNetwork by hand with stages whose `members` cover every parameter once.",
                )  # fmt: skip
            owners.setdefault(id(parameter), set()).add(owner[0])
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and len(owners[id(parameter)]) > 1:
                raise SettingError(
                    "network", type(module).__name__, f"{name!r} is tied across {sorted(owners[id(parameter)])}.",
                    "Freeze or untie the weights, or put the modules that share them into one stage.",
                )  # fmt: skip

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def head(self) -> int:
        """Index of the first of the trailing stages that are the head: the final norm and pooling belong to it."""
        names = [stage.name for stage in self.stages]
        return len(names) - 2 if names[-2:] == ["pool", "head"] else len(names) - 1

    @property
    def uncut(self) -> str:
        """What to do about a network that is a single stage and could have more."""
        return ""

    def obstacle(self, name: str) -> str:
        """Why the module of this name, a part of a stage, is no stage of its own; empty if it is not known."""
        del name
        return ""

    def with_all_tokens(self) -> "StagedNetwork":
        """The same network, where every stage computes all tokens of its output, whether they are read or not."""
        return StagedNetwork(self.module, tuple(replace(s, run=getattr(s.run, "whole", s.run)) for s in self.stages))

    def run(self, x: Any, start: int = 0, stop: int | None = None) -> Any:
        """Run stages ``start`` to ``stop`` (exclusive; to the end by default) on ``x``."""
        for stage in self.stages[start:stop]:
            x = stage.run(x)
        return x

    def visit(self, x: Any, start: int, keep: Collection[int], visit: Callable[[int, Any], None]) -> Tensor:
        """Run from stage ``start`` to the end; show the activations in ``keep`` to ``visit(index, activation)``.

        ``x`` stays as it is.
        """
        x = x.clone()
        for i, stage in enumerate(self.stages[start:], start):
            if i in keep:
                visit(i, x)  # before the stage runs: it may work in place
            x = stage.run(x)
        return x

    def run_suffix(self, x: Any, start: int) -> Any:
        """The same from ``start`` to the end, for queries: their chunks have one shape, which a compiler can use.

        ``x`` is used up.
        """
        for stage in self.stages[start:]:  # not `run`: a name here would hold `x` while the stages run
            x = stage.run(x)
        return x

    def parameters_of(self, first: int, last: int) -> dict[str, nn.Parameter]:
        """Trainable parameters owned by stages ``first`` to ``last`` (inclusive), by name."""
        stages = self.stages[first : last + 1]
        return {name: p for name, p in self.trainable().items() if any(stage.owns(name) for stage in stages)}

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters that require a gradient, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that require no gradient."""
        return tuple(name for name, p in self.module.named_parameters() if not p.requires_grad)

    def modules_of(self, stage: int) -> Iterator[tuple[str, nn.Module]]:
        """Named submodules owned by one stage."""
        owner = self.stages[stage]
        return ((name, module) for name, module in self.module.named_modules() if name and owner.owns(name))

    @contextmanager
    def frozen_parameters(self) -> Iterator[None]:
        """No parameter requires a gradient for the duration: derivatives are those in activations alone."""
        trainable = list(self.trainable().values())
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode (no dropout, no drop-path) for the duration, then every module's own mode again.

        A query differs from the clean pass by its noise alone: dropout would drown the difference of their losses.
        """
        training = [module for module in self.module.modules() if module.training]
        if training:  # not inside another such context
            self.module.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def rows_of(self, key: Any) -> AbstractContextManager[Any]:
        """Tell a module whose rows run elsewhere to which :class:`NoiseKey` they belong while the context lasts.

        Those of the site ``clean`` are unperturbed.
        """
        told = getattr(self.module, "rows_of", None)
        return nullcontext() if told is None else told(key)

    def unpaid(self) -> AbstractContextManager[Any]:
        """A module whose rows run elsewhere returns zeros instead while the context lasts, for a look at shapes."""
        unpaid = getattr(self.module, "unpaid", None)
        return nullcontext() if unpaid is None else unpaid()


BatchNormSetting = Literal["refuse", "frozen"]


def stage_network(
    module: nn.Module | StagedNetwork, example: Any = None, *, batch_norm: BatchNormSetting = "refuse"
) -> StagedNetwork:
    """Cut a network into stages; a network that is already cut is returned unchanged.

    A timm ``VisionTransformer`` becomes ``embed``, ``blocks.0`` ... ``blocks.N``, ``pool`` (final norm and pooling) and
    ``head``; an ``nn.Sequential`` becomes its children under their own names. Every other network is run on a few rows
    of ``example`` to find its stages (see :func:`~flops_lightning.network.cutting.stage_by_replay`).

    Args:
        module: The network.
        example: Inputs of a batch, as the network takes them: a tensor, a tuple of positional or a mapping of keyword
            arguments. Without it, a network that is neither of the two above is a single stage, which suffices for
            strategies that perturb all parameters at once (``MeZO``).
        batch_norm: ``refuse`` batch normalisation, since the statistics of a batch are not a function of a single row;
            or, with ``frozen``, use its running statistics as constants and train its weight and bias.

    Raises:
        SettingError: the network has something that cannot be staged; the message says what to do.

    Example:
        >>> [stage.name for stage in stage_network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).stages]
        ['0', '1', '2']
        >>> import torch
        >>> transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
        >>> [stage.name for stage in stage_network(transformer, torch.randn(2, 5, 8)).stages]
        ['layers.0', 'layers.1', 'layers.2']
    """
    check_choice("batch_norm", batch_norm, get_args(BatchNormSetting))
    if isinstance(module, StagedNetwork):
        if batch_norm == "refuse":
            _refuse_batch_norm(module.module)
        return module
    if not isinstance(module, nn.Module):
        raise SettingError("network", module, "is not a torch.nn.Module.", "Pass a module, for example nn.Tanh().")
    module = getattr(module, "_orig_mod", module)  # a compiled module: queries run its parts
    if batch_norm == "refuse":
        _refuse_batch_norm(module)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _refuse_lazy(module)
        # Unlike `named_children`, this lists a module twice that runs twice.
        children = [item for item in module.named_modules(remove_duplicate=False) if item[0] and "." not in item[0]]
        return StagedNetwork(module, tuple(Stage(name, child, (name,)) for name, child in children))
    if "timm" in sys.modules:
        from flops_lightning.network.vit import VisionTransformer, is_plain, stage_vit

        if isinstance(module, VisionTransformer) and is_plain(module):
            return stage_vit(module)
    from flops_lightning.network.cutting import stage_by_replay, stage_whole

    return stage_whole(module) if example is None else stage_by_replay(module, example)


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, BatchNorm):
            raise SettingError(
                "network", f"{name}: {type(child).__name__}",
                "batch normalisation ties the loss of a sample to the other rows of its chunk in train mode, and its "
                "statistics never adapt in eval mode, in which queries run.",
                "Write batch_norm: frozen to take pretrained statistics as constants, or use GroupNorm or LayerNorm.",
            )  # fmt: skip


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise SettingError(
                "network", name, "is a lazy parameter without a shape.", "Run one forward pass before staging it."
            )
