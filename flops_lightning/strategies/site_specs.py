"""Settings of sites as a user writes them, and the layout that the paper uses where none is written."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork

SiteKind = Literal["linear", "block", "group"]
Directions = Literal["", "shared", "own"]


@dataclass
class SiteSpec:
    """Setting: a range of stages, or of modules, and how its parameters are trained.

    Attributes:
        stages: ``[first, last]`` stage of the range, both included, or ``[only]``.
        kind: ``group``: one site at the output of the range, local VJP through the range. ``block``: one such site for
            each stage of the range. ``linear``: noise at the output of linear, convolution and layer-norm modules,
            closed form, no autograd anywhere.
        sigma: Standard deviation of the noise.
        queries_per_sample: Average queries per sample at each site of this range. A float such as 0.5 or 2.5 needs an
            allocator: below 1 it draws the samples that get a query.
        name: Name of the site (or the prefix of the names, if the range makes several sites).
        modules: ``linear``: shell patterns for the full names of the layers to perturb, by default all, within
            ``stages`` or, without these, within the whole network. ``block`` and ``group``: modules instead of
            ``stages``, each of one or several stages. Plain names are a range, ``[first, last]``, both included, or
            ``[only]``. If any name has a ``*``, ``?`` or ``[``, all are patterns for names of stages or, if one matches
            none, for names of other modules.
        together: ``linear`` only: perturb all modules in one query (the paper's group) instead of one at a time.
        directions: For strategies that perturb parameters. ``shared``: all samples use the same directions. ``own``:
            every row has its own. Empty: the strategy's ``layout`` decides; but stages whose parameters can differ by
            row (prompts) have their own, except if all samples share most of the work.
        active_tokens: Add noise only at the tokens that the rest of the network reads, if the staging knows them.

    Example:
        >>> import torch
        >>> from flops_lightning import LikelihoodRatio, SiteSpec, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> sites = [SiteSpec(stages=["0", "1"], name="body"), SiteSpec(stages=["2"], kind="linear", sigma=0.1)]
        >>> strategy = LikelihoodRatio(sites=sites)
        >>> strategy.bind(stage_network(network), torch.nn.CrossEntropyLoss(reduction="none"))
        >>> [(site.name, sorted(site.parameters)) for site in strategy.sites]
        [('body', ['0.bias', '0.weight']), ('2', ['2.bias', '2.weight'])]
    """

    stages: list[str] = field(default_factory=list)
    kind: SiteKind = "group"
    sigma: float = 0.01
    queries_per_sample: int | float = 20
    name: str = ""
    modules: list[str] = field(default_factory=list)
    together: bool = False
    active_tokens: bool = True
    directions: Directions = ""

    @property
    def layers(self) -> list[str]:
        """Patterns of the layers of a ``linear`` site."""
        return self.modules or ["*"]

    @property
    def by(self) -> str:
        """The setting that says where the site is."""
        return "stages" if self.stages else "modules"

    @property
    def named(self) -> list[str]:
        """Its value."""
        return self.stages or self.modules


def default_specs(network: StagedNetwork, groups: int = 3, *, in_parameters: bool = False) -> list[SiteSpec]:
    """The paper's layout (appendix C.1): the body in ``groups`` groups of equal depth from bottom to top, and the head.

    The head takes with it the stages before it that have no attention or linear layers of their own (final norm,
    pooling). A network of one stage has one site for all its parameters, if noise enters these (``in_parameters``).
    """
    names = [stage.name for stage in network.stages]
    if in_parameters and len(names) == 1:
        return [SiteSpec(stages=names, name="all")]
    trained = [i for i in range(len(names)) if network.parameters_of(i, i)]
    head = network.head if network.head < len(names) - 1 else trained[-1] if trained else 0
    if not trained:
        problem, remedy = (
            "all parameters are frozen, there is nothing to train.",
            "Freeze fewer (`freeze`, requires_grad).",
        )
        raise SettingError("network", type(network.module).__name__, problem, remedy)
    if len(names) < 2 or head == 0:
        raise SettingError(
            "sites", [], "a network of one stage, or with all its parameters in one, has no default sites.",
            f"{network.uncut} Otherwise name the sites, or use MeZO, which needs none.".strip(),
        )  # fmt: skip
    groups = min(groups, head)
    cuts = [round(i * head / groups) for i in range(groups + 1)]
    if names[0] == "embed":  # the embedding rides with the first group: only blocks count as depth
        cuts = [0, *(1 + round(i * (head - 1) / groups) for i in range(1, groups + 1))]
    specs = [SiteSpec(stages=[names[a], names[b - 1]], name=f"group{i + 1}") for i, (a, b) in enumerate(pairwise(cuts))]
    specs.append(SiteSpec(stages=[names[head], names[-1]], name="head"))
    # Frozen stages need no site.
    return [s for s in specs if network.parameters_of(network.index[s.stages[0]], network.index[s.stages[1]])]
