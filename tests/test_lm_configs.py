"""The configurations of language models, with the stand-in model and few texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from flops_lightning.cli.command import build, main

peft = pytest.importorskip("peft", reason="adapters need the extra llm")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def stories(shared_data: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    return str(shared_data("models/stories260k"))


def written(folder: Path, lines: list[dict[str, Any]]) -> str:
    file = folder / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def run(config: str, folder: Path, file: str, model: str, *extra: str) -> dict[str, Any]:
    given = {"model.init_args.model_name": model, "data.init_args.train_file": file, "trainer.accelerator": "cpu",
             "trainer.default_root_dir": folder, "trainer.enable_progress_bar": "false"}  # fmt: skip
    main(["fit", "--config", config, *(f"--{name}={value}" for name, value in given.items()), *extra])
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text())


def test_lora_by_likelihood_ratios_runs_and_writes_an_adapter(stories: str, tmp_path: Path):
    lines = [{"prompt": f"The dog number {i}", "completion": " ran away."} for i in range(12)]
    limits = ("--data.init_args.val_texts=4", "--data.init_args.batch_size=4", "--trainer.max_epochs=2")
    summary = run("configs/lm/lr_lora.yaml", tmp_path, written(tmp_path, lines), stories, *limits)
    assert (summary["steps"], summary["samples"], summary["lost_queries"]) == (4, 16, 0)
    assert summary["queries_by_site"] == dict.fromkeys(["group1", "group2", "group3"], 20 * 16)
    assert set(summary["validation"]) == {"loss", "perplexity"}
    (adapter,) = tmp_path.rglob("adapter_config.json")
    assert json.loads(adapter.read_text())["r"] == 8
    assert peft.PeftModel.from_pretrained(
        pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(stories), adapter.parent
    )


@pytest.mark.parametrize("target", ["full", "lora"])
def test_mezos_setting_runs_with_choices(target: str, stories: str, tmp_path: Path):
    lines = [{"text": f"It is {word}, said {i}.", "label": i % 2} for i in range(6) for word in ("old", "new")]
    file = written(tmp_path, lines)
    limits = ("--data.init_args.train_texts=8", "--data.init_args.val_texts=4", "--trainer.max_steps=2",
              "--trainer.check_val_every_n_epoch=1", f"--data.init_args.test_file={file}",
              "--data.init_args.batch_size=4")  # fmt: skip
    lora = (f"--model.init_args.target.kind={target}",)
    summary = run("configs/lm/mezo_sst2_opt.yaml", tmp_path, file, stories, *limits, *lora)
    assert summary["queries_by_site"] == {"all": 2 * 8}
    assert set(summary["validation"]) == {"loss", "perplexity", "accuracy"}
    assert 0 <= summary["validation"]["accuracy"] <= 1


def test_mezos_setting_is_the_papers(stories: str, tmp_path: Path):
    file = written(tmp_path, [{"text": "a", "label": 0}] * 2000)
    extra = (f"--model.init_args.model_name={stories}", f"--data.init_args.train_file={file}",
             f"--data.init_args.test_file={file}")  # fmt: skip
    cli = build(["--config", "configs/lm/mezo_sst2_opt.yaml", *extra])
    optimizer, strategy = cli.model.optimizer_settings, cli.model.strategy
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.schedule) == ("sgd", 1e-7, 0.0, "constant")
    assert (strategy.sigma, strategy.queries, strategy.variant) == (1e-3, 2, "antithetic")
    assert (cli.trainer.max_steps, cli.datamodule.batch_size, cli.datamodule.train_texts) == (20000, 16, 1000)


def test_mistakes_in_the_files_are_named_on_the_command_line(stories: str, tmp_path: Path, capsys: Any):
    file = written(tmp_path, [{"prompt": "a", "completion": ""}])
    with pytest.raises(SystemExit) as ended:
        run("configs/lm/lr_lora.yaml", tmp_path, file, stories)
    assert ended.value.code == 2
    assert "error: data.train_file = " in (said := capsys.readouterr().err)
    assert "line 1 has an empty completion" in said


def test_a_plan_counts_texts(stories: str, tmp_path: Path, capsys: Any):
    file = written(tmp_path, [{"prompt": f"The dog number {i}", "completion": " ran away."} for i in range(11)])
    given = {"model.init_args.model_name": stories, "data.init_args.train_file": file, "trainer.accelerator": "cpu",
             "data.init_args.val_texts": 2, "data.init_args.batch_size": 4, "trainer.max_epochs": 1}  # fmt: skip
    main(["plan", "--config", "configs/lm/lr_lora.yaml", *(f"--{name}={value}" for name, value in given.items())])
    said = capsys.readouterr().out
    assert "samples of an epoch   9, in batches of 4" in said
    assert "steps                 3 an epoch, 3 in all" in said
