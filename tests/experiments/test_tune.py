import pytest

from experiments import tune
from experiments.tables import read_csv

TINY = "{img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2, mlp_ratio: 2.0}"
SITES = '[{"stages": ["embed", "blocks.1"], "name": "body", "queries_per_sample": 4}, {"stages": ["pool", "head"]}]'


def test_what_is_found_is_compared_with_the_best_of_the_grid_seed_by_seed():
    sigma = [
        {"seed": "0", "site": "top", "kind": kind, "sigma": width, "cosine": cosine}
        for kind, width, cosine in (("grid", "0.1", "0.2"), ("found", "0.001", "0.38"), ("grid", "1e-5", "0.4"),
                                    ("configuration", "0.03", "0.3"))
    ]  # fmt: skip
    rate = [
        {"seed": "0", "kind": kind, "rate": rate, "repeat": str(repeat), "loss": loss, "seconds": "61.2"}
        for kind, rate, *losses in (("configuration", "0.01", "3.0", "3.0"), ("found", "0.004", "1.0", "1.1"),
                                    ("grid", "0.003", "0.9", "1.1"), ("grid", "0.01", "0.8", "2.0"),
                                    ("grid", "0.1", "0.7", "inf"))
        for repeat, loss in enumerate(losses)
    ]  # fmt: skip
    widths, rates = tune.report(sigma, rate).split("\n\n")
    assert [cell.strip() for cell in widths.splitlines()[2].split("|")[1:-1]] == [
        "top", "0", "0.03", "0.750", "0.001", "0.950", "0.400",
    ]  # fmt: skip
    assert [cell.strip() for cell in rates.splitlines()[2].split("|")[1:-1]] == [
        "0", "0.004", "1.05", "0.003", "1", "1.05 ± 0.05", "3", "61",
    ]  # fmt: skip


@pytest.mark.study
def test_the_study_compares_eight_rates_and_every_width_and_goes_on_with_the_next_seed(tmp_path):
    given = ["--output", str(tmp_path), "--steps", "4", "--tuning_steps", "8", "--repeats", "2"]
    extra = ["--model.init_args.checkpoint", "", "--model.init_args.model_kwargs", TINY,
             "--model.init_args.strategy.init_args.sites", SITES, "--data.init_args.batch_size", "16",
             "--model.init_args.strategy.init_args.pilots", "{sites: body, queries: 2}"]  # fmt: skip
    for seeds in (1, 2):
        tune.main([*given, "--seeds", str(seeds), "--", *extra])
    rows = read_csv(tmp_path / "rate.csv")
    for seed in ("0", "1"):
        kinds = [row["kind"] for row in rows if row["seed"] == seed]
        assert (kinds.count("grid"), kinds.count("found"), kinds.count("configuration")) == (16, 2, 2)
    assert len({row["loss"] for row in rows if row["kind"] == "found"}) == 4
    widths = [row["kind"] for row in read_csv(tmp_path / "sigma.csv") if row["seed"] == "0" and row["site"] == "body"]
    assert len(widths) == 11
    assert widths.count("found") == widths.count("configuration") == 1
