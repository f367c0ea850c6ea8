from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import sigma_and_head
from experiments.sigma_and_head import BASE, accuracy_table, compared, site_variances, spread_queries, variance_table
from experiments.tables import read_csv
from flops_lightning.errors import SettingError
from flops_lightning.strategies import SiteSpec
from tests.experiments.fakes import entries
from tests.reference.networks import bound, estimated, squared_error

SITES = [{"stages": ["0", "1"]}, {"stages": ["2", "3"]}, {"stages": ["4"], "queries_per_sample": 7}]


def test_the_heads_queries_are_given_to_the_others_so_that_the_settings_compared_have_equal_queries(
    tokens_net: nn.Sequential,
) -> None:
    specs = [SiteSpec([str(i)], queries_per_sample=20) for i in range(4)]
    assert [spec.queries_per_sample for spec in spread_queries(specs)] == [27, 27, 26, 20]
    totals = {}
    for name, settings in compared(bound(tokens_net, squared_error, SITES)).items():
        strategy = bound(tokens_net, squared_error, **{"sites": SITES, **settings})
        totals[name] = sum(strategy.budget.queries_per_sample)
    assert totals.pop("exact head") == 40
    assert set(totals.values()) == {47}
    assert BASE in totals


def test_sites_that_one_entry_makes_several_of_are_refused(tokens_net: nn.Sequential) -> None:
    with pytest.raises(SettingError, match=r"strategy.sites = .*does not have one entry for each site"):
        compared(bound(tokens_net, squared_error, [{"stages": ["0", "4"], "kind": "block"}]))


def test_variances_are_those_of_the_estimates(tokens_net: nn.Sequential, tokens: tuple[Tensor, Tensor]) -> None:
    found = site_variances(bound(tokens_net, squared_error, SITES, exact_head=True), tokens, draws=6)
    again = bound(tokens_net, squared_error, SITES, exact_head=True)
    gradients = [estimated(again, *tokens)[1] for _ in range(6)]
    for site in (*again.sites, *again.exact_sites):
        by_draw = torch.stack([torch.cat([g[name].flatten() for name in site.parameters]) for g in gradients])
        assert found[site.name] == pytest.approx(float(by_draw.var(0).sum()), rel=1e-9, abs=1e-12)
    assert found["4"] == pytest.approx(0.0, abs=1e-12)
    assert all(parameter.grad is None for parameter in tokens_net.parameters())


def test_variances_are_compared_batch_by_batch() -> None:
    rows = [
        {"checkpoint": "0", "setting": setting, "batch": str(batch), "site": site, "variance": str(value * 4.0**batch)}
        for setting, body, head in ((BASE, 6.0, 2.0), ("token sigma", 3.0, 1.0), ("exact head", 6.0, 0.0))
        for batch in range(2)
        for site, value in (("body", body), ("head", head))
    ]
    assert entries(variance_table(rows))[1:] == [
        ["0", "token sigma", *["2.00 (2.00 - 2.00)"] * 3],
        ["0", "exact head", "1.33 (1.33 - 1.33)", "1.00 (1.00 - 1.00)", "exact"],
    ]


@pytest.mark.parametrize("seeds", [2, 17])
def test_accuracies_are_compared_seed_by_seed(seeds: int) -> None:
    row = {"queries_per_sample": 80.0, "late_loss": 0.5, "test_accuracy": 0.9}
    better = {**row, "setting": "token sigma", "late_loss": 0.25, "test_accuracy": 0.95}
    assert entries(accuracy_table([{**row, "setting": BASE}, better] * seeds))[1:] == [
        [BASE, "80", "90.0% (90.0% - 90.0%)", "", "0.500", ""],
        ["token sigma", "80", "95.0% (95.0% - 95.0%)", "+5.0 (+5.0 to +5.0)", "0.250", "0.50 (0.50 - 0.50)"],
    ]


@pytest.mark.study
@pytest.mark.usefixtures("forked_runs")
def test_a_short_study(tmp_path: Path) -> None:
    short = ["--", "--data.init_args.batch_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    few = ["--seeds", "1", "--checkpoints", "1", "--batches", "2", "--draws", "3", "--threads", "1"]
    sigma_and_head.main(["--output", str(tmp_path), *few, *short])
    rows = {row["setting"]: row for row in read_csv(tmp_path / "accuracy.csv")}
    assert {name: float(row["queries_per_sample"]) for name, row in rows.items()} == {
        BASE: 80, "token sigma": 80, "exact head": 60, "exact head, its queries given": 80, "both, queries given": 80,
    }  # fmt: skip
    variances = read_csv(tmp_path / "variance.csv")
    assert len(variances) == 5 * 2 * 4
    heads = [float(row["variance"]) for row in variances if row["site"] == "head" and "exact" in row["setting"]]
    assert max(heads) == pytest.approx(0.0, abs=1e-9)
    before = (tmp_path / "accuracy.csv").read_text()
    sigma_and_head.main(["--output", str(tmp_path), *few, *short])  # what is done is not done again
    assert (tmp_path / "accuracy.csv").read_text() == before
    with pytest.raises(SystemExit):  # nor another study mixed with it
        sigma_and_head.main(["--output", str(tmp_path), *few, "--draws", "4", *short])
    assert "| both, queries given " in (tmp_path / "sigma_and_head.md").read_text()
