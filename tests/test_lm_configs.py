"""The configurations of language models, with the stand-in model and few texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flops_lightning.cli.command import build, main
from flops_lightning.datamodules import JsonlTextDataModule
from flops_lightning.tasks import ForwardCausalLM
from tests.language.models import saved_opt

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


MEZO = "configs/lm/mezo_sst2_opt.yaml"
REVIEWS = [{"text": f"It is {word}, said {i}.", "label": i % 2} for i in range(6) for word in ("old", "new")]
OF_TARGET = {
    "full": {},
    "lora": {"target.rank": 8, "target.alpha": 16, "optimizer.lr": 5e-5, "strategy.init_args.sigma": 1e-2},
    "prefix": {"target.tokens": 5, "optimizer.lr": 1e-3, "strategy.init_args.sigma": 1e-1},
}


@pytest.fixture
def opt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    (tmp_path / "opt").mkdir()
    return saved_opt(tmp_path / "opt")


@pytest.mark.parametrize("target", OF_TARGET)
def test_mezos_setting_runs_and_keeps_its_best_weights(target: str, opt: str, tmp_path: Path):
    file = written(tmp_path, REVIEWS)
    limits = ("--data.init_args.train_texts=8", "--data.init_args.val_texts=4", "--trainer.max_steps=6",
              "--trainer.val_check_interval=3", f"--data.init_args.test_file={file}",
              "--data.init_args.batch_size=4")  # fmt: skip
    own = [f"--model.init_args.{name}={value}" for name, value in {"target.kind": target, **OF_TARGET[target]}.items()]
    summary = run(MEZO, tmp_path, file, opt, *limits, *own)
    assert summary["queries_by_site"] == {"all": 2 * 4 * 6}
    assert set(summary["validation"]) == {"loss", "perplexity", "accuracy"}
    assert 0 <= summary["validation"]["accuracy"] <= 1
    names = {path.name for path in tmp_path.rglob("*.ckpt")}
    assert "last.ckpt" in names
    assert names & {"epoch=1-step=3.ckpt", "epoch=2-step=6.ckpt"}


def test_mezos_setting_is_that_of_its_code(opt: str, tmp_path: Path):
    file = written(tmp_path, [{"text": "a", "label": 0}] * 2000)
    extra = (f"--model.init_args.model_name={opt}", f"--data.init_args.train_file={file}",
             f"--data.init_args.test_file={file}")  # fmt: skip
    cli = build(["--config", MEZO, *extra])
    optimizer, strategy = cli.model.optimizer_settings, cli.model.strategy
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.schedule) == ("sgd", 1e-7, 0.0, "constant")
    assert (optimizer.weight_decay, cli.model.causal_lm.dtype) == (0.0, torch.float16)
    assert (strategy.sigma, strategy.queries, strategy.variant) == (1e-3, 2, "antithetic")
    assert (cli.trainer.max_steps, cli.trainer.val_check_interval, cli.trainer.check_val_every_n_epoch) == (
        20000,
        4000,
        None,
    )
    assert (cli.trainer.checkpoint_callback.monitor, cli.trainer.checkpoint_callback.mode) == ("val/loss", "min")
    data = cli.datamodule
    assert (data.batch_size, data.train_texts, data.val_texts) == (16, 1000, 500)
    assert (data.form.template, data.choices) == ("{text} It was", (" terrible", " great"))
    lora = ForwardCausalLM(model_name=opt, target={"kind": "lora"})
    adapted = {name.split(".")[-4] for name, p in lora.model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}


def test_the_loss_of_mezos_setting_is_that_of_its_code(opt: str, tmp_path: Path):
    task = ForwardCausalLM(model_name=opt, objective="choice")
    data = JsonlTextDataModule(
        train_file=written(tmp_path, REVIEWS), template="{text} It was", choices=[" terrible", " great"],
        tokenizer=task.tokenizer,
    )  # fmt: skip
    data.setup("fit")
    inputs, targets = data.collate(data.train_set.texts)
    assert (data.branching, inputs["input_ids"][:, 0].unique().tolist()) == (False, [2])  # OPT's </s>
    losses = []
    for line in REVIEWS:  # each candidate in a row of its own, the mean over its tokens
        means = []
        for word in (" terrible", " great"):
            whole = task.tokenizer(f"{line['text']} It was{word}", return_tensors="pt")["input_ids"]
            before = len(task.tokenizer(f"{line['text']} It was")["input_ids"])
            scores = task.causal_lm(whole).logits[0, :-1].log_softmax(1).gather(1, whole[0, 1:, None])
            means.append(scores[before - 1 :].mean())
        losses.append(torch.nn.functional.cross_entropy(torch.stack(means), torch.tensor(line["label"])))
    torch.testing.assert_close(task.loss(task(inputs), targets), torch.stack(losses))


def test_mezos_setting_has_a_plan(opt: str, tmp_path: Path, capsys: Any):
    file = written(tmp_path, REVIEWS)
    given = {"model.init_args.model_name": opt, "data.init_args.train_file": file, "data.init_args.test_file": file,
             "data.init_args.train_texts": 8, "data.init_args.val_texts": 4, "data.init_args.batch_size": 4,
             "trainer.accelerator": "cpu", "seconds": 0.2}  # fmt: skip
    main(["plan", "--config", MEZO, *(f"--{name}={value}" for name, value in given.items())])
    said = capsys.readouterr().out
    assert "2 an epoch, 20,000 in all" in said
    assert "validations           5, of 1 batches each" in said


@pytest.mark.slow
def test_tune_runs_to_its_end_and_fit_takes_what_it_writes(stories: str, tmp_path: Path):
    lines = [{"prompt": f"The dog number {i}", "completion": " ran away."} for i in range(12)]
    file, found = written(tmp_path, lines), tmp_path / "tuned.yaml"
    given = {"model.init_args.model_name": stories, "data.init_args.train_file": file, "trainer.accelerator": "cpu",
             "data.init_args.val_texts": 4, "data.init_args.batch_size": 4, "output": found, "rates": 3, "steps": 8,
             "widths": 3, "batches": 1}  # fmt: skip
    main(["tune", "--config", "configs/lm/lr_lora.yaml", *(f"--{name}={value}" for name, value in given.items())])
    settings = yaml.safe_load(found.read_text())["model"]["init_args"]
    sites = settings["strategy"]["init_args"]["sites"]
    assert [site["name"] for site in sites] == ["group1", "group2", "group3"]
    limits = ("--data.init_args.val_texts=4", "--data.init_args.batch_size=4", "--trainer.max_epochs=1")
    summary = run("configs/lm/lr_lora.yaml", tmp_path, file, stories, *limits, f"--config={found}")
    assert summary["queries_by_site"] == dict.fromkeys(["group1", "group2", "group3"], 20 * 8)
    (kept,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(kept.read_text())["model"]["init_args"]["optimizer"]["lr"] == settings["optimizer"]["lr"]


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
