"""A picture of a search; matplotlib is an extra."""

from pathlib import Path

from flops_lightning.errors import import_extra
from flops_lightning.tune.search import Tuned


def draw(tuned: Tuned, file: Path) -> None:
    """Cosines against the width at each site, and losses against the learning rate.

    Raises :class:`SettingError` where matplotlib is not installed.
    """
    figures = import_extra("matplotlib.figure", extra="plots", setting="plot", value=file.name)
    panels = bool(tuned.sigmas) + (tuned.rate is not None)
    figure = figures.Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    if tuned.sigmas:
        axis = axes.pop(0)
        for name, search in tuned.sigmas.items():
            (line,) = axis.plot(search.sigmas, search.halves, marker=".", label=name)
            axis.plot(search.sigmas, search.agreement, linestyle=":", color=line.get_color())
            axis.plot(search.found, search.found_halves, marker="o", markersize=9, color=line.get_color())
        axis.set(xscale="log", xlabel="sigma", ylabel="cosine: halves (solid), neighbours (dotted)")
        axis.legend()
    if tuned.rate is not None:
        axis = axes.pop(0)
        for steps in sorted({trial.steps for trial in tuned.rate.trials}):
            own = sorted((t.rate, t.loss) for t in tuned.rate.trials if t.steps == steps)
            axis.plot(*zip(*own, strict=True), marker="o", label=f"{steps} steps")
        axis.axvline(tuned.rate.found, color="grey", linestyle="--", label="found")
        axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss of the last quarter")
        axis.legend()
    figure.savefig(file, dpi=120)
