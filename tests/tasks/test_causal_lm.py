import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from flops_lightning import LikelihoodRatio, MeZO
from flops_lightning.datamodules import JsonlTextDataModule
from flops_lightning.errors import SettingError
from flops_lightning.language import EncodedText, pack
from flops_lightning.resume.run_settings import describe_data
from flops_lightning.settings import constructor_parameters
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardCausalLM
from tests.language.models import tiny, transformers

peft = pytest.importorskip("peft", reason="adapters need the extra llm")
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
TEXTS = [
    EncodedText([1, 5, 9], [[7, 8, 9], [7, 4]], 1), EncodedText([1, 6], [[3, 3], [4, 5, 6, 7]], 1),
    EncodedText([1, 2, 3, 4, 5], [[9, 9], [9, 11]], 0),
]  # fmt: skip
KINDS = {"full": 0, "lora": 1344, "prompt": 128, "prefix": 384, "norm": 112, "head": 800}
"""Kinds of targets and the numbers that they train in the tiny model; all of it has more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny(tie_word_embeddings=False).save_pretrained(path)
    return str(path)


def labelled(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * 9).reshape(rows, 9) * 7 % 50
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    labels[0, 7:] = -100
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(*batches: Any) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)


def made(folder: str, kind: str = "full", strategy: Any = None, **settings: Any) -> ForwardCausalLM:
    torch.manual_seed(0)
    optimizer = {"name": "sgd", "lr": 1e-2}
    return ForwardCausalLM(
        model_name=folder, **{"target": {"kind": kind}, "strategy": strategy, "optimizer": optimizer, **settings}
    )


@pytest.mark.parametrize("strategy", [MeZO, LikelihoodRatio, Backprop])
@pytest.mark.parametrize("kind", KINDS)
def test_every_target_learns_by_every_kind_of_strategy_and_nothing_else_moves(kind, strategy, folder):
    task = made(folder, kind, strategy() if strategy is Backprop else strategy(seed=0))
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    if KINDS[kind]:
        assert sum(task.get_parameter(name).numel() for name in trained) == KINDS[kind]
    before = {name: p.clone() for name, p in task.named_parameters()}
    Trainer(max_steps=2, **QUIET).fit(task, loader(labelled(), labelled()))
    moved = {name for name, p in task.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained
    unmoved = {name for name in trained - moved if "lora_A" not in name}  # its gradient is 0 where B is
    assert not unmoved


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_backprop_is_that_of_each_texts_own_mean(kind, folder):
    task, batch = made(folder, kind, Backprop()), labelled()
    inputs, targets = task.split(batch)
    task.strategy.estimate(task.strategy.clean_pass(inputs, targets))
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    own = [
        task.model(input_ids=batch["input_ids"][i : i + 1], labels=batch["labels"][i : i + 1]).loss for i in range(4)
    ]
    torch.stack(own).mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, task.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "site"), [("lora", ["model.layers.0", "model.layers.2"]), ("prompt", ["prompt"]), ("head", ["lm_head"])]
)
def test_queries_at_the_adapter_point_along_the_exact_gradient(kind, site, folder):
    task = made(folder, kind, LikelihoodRatio(sites=[{"stages": site, "sigma": 1e-3, "queries_per_sample": 3000}]))
    inputs, targets = task.split(labelled())
    task.strategy.estimate(task.strategy.clean_pass(inputs, targets))
    own = [p for site in task.strategy.sites for p in site.parameters.values()]
    found = torch.cat([p.grad.flatten() for p in own])
    exact = torch.autograd.grad(task.loss(task(inputs), targets).mean(), own)
    exact = torch.cat([g.flatten() for g in exact])
    dimension = {"lora": 9 * 16, "prompt": 8 * 16, "head": 9 * 50}[kind]
    of_a_sample = (3000 / (3000 + dimension)) ** 0.5
    assert float(torch.cosine_similarity(found, exact, dim=0)) > of_a_sample - 0.04
    slope = float(found @ exact / (exact @ exact))
    assert slope == pytest.approx(1, abs=4 / 3000**0.5)


@torch.no_grad()
def test_a_prompt_of_each_text_is_pefts_prompt_and_serves_candidates_too(folder):
    task = made(folder, "prompt")
    ids = labelled()["input_ids"]
    torch.testing.assert_close(task({"input_ids": ids}), task.model(input_ids=ids).logits[:, 8:])
    task._stage_for(branching=True)
    inputs, targets = pack(TEXTS[:1], branching=True)
    likelihood = task.predict_step((inputs, targets), 0)["probability"]
    alone = []
    for candidate in TEXTS[0].candidates:
        one, other = pack([EncodedText(TEXTS[0].prompt, [candidate])], branching=False)
        logits = task.model(**one).logits[:, 8:].log_softmax(2)
        alone.append(sum(float(logits[0, p, t]) for p, t in zip(other["positions"][0, 0], candidate, strict=True)))
    torch.testing.assert_close(likelihood, torch.tensor([alone]).softmax(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("strategy", [MeZO, LikelihoodRatio], ids=["MeZO", "LR"])
def test_choices_learn_with_their_branches_in_one_row(strategy, kind, folder):
    task = made(folder, kind, strategy(seed=0), objective="choice")
    task._stage_for(branching=True)
    assert len(task.network) == (6 if kind == "lora" else 7)
    batch = pack(TEXTS, branching=True)
    trainer = Trainer(max_steps=1, **QUIET)
    task.setup = lambda stage: None  # type: ignore[method-assign]
    trainer.fit(task, loader(batch))
    assert trainer.callback_metrics["queries/lost"] == 0


@pytest.mark.parametrize("strategy", [LikelihoodRatio, MeZO])
def test_dropout_of_the_model_and_of_its_adapter_is_off_in_estimates(strategy, tmp_path: Path):
    """In train mode, in which a trainer leaves them; neither rate is zero."""
    tiny(tie_word_embeddings=False, attention_dropout=0.5).save_pretrained(tmp_path)
    found = []
    for training in (False, True):
        task = made(str(tmp_path), "lora", strategy(seed=0)).train(training)
        for layer in task.causal_lm.model.layers:
            layer.self_attn.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.5).train(training)
            torch.nn.init.normal_(layer.self_attn.q_proj.lora_B["default"].weight)
        estimate = task.strategy.estimate(task.strategy.clean_pass(*task.split(labelled())))
        found.append([estimate.loss, *(p.grad for p in task.parameters() if p.grad is not None)])
        assert task.causal_lm.model.layers[0].self_attn.q_proj.lora_dropout["default"].training is training
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_validation_and_test_report_loss_perplexity_and_accuracy(folder):
    task = made(folder, objective="choice")
    task._stage_for(branching=True)
    task.setup = lambda stage: None  # type: ignore[method-assign]
    batches = [pack(TEXTS[:2], branching=True), pack(TEXTS[2:], branching=True)]
    trainer = Trainer(**QUIET)
    (found,) = trainer.test(task, loader(*batches), verbose=False)
    likelihoods, losses, tokens, nll = [], [], 0, 0.0
    with torch.no_grad():
        for text in TEXTS:
            own = []
            for candidate in text.candidates:
                ids = torch.tensor([text.prompt + candidate])
                log = task.model(ids).logits.log_softmax(2)[0, len(text.prompt) - 1 : -1]
                own.append(log.gather(1, torch.tensor(candidate)[:, None]).sum())
            likelihoods.append(torch.stack(own))
            losses.append(torch.nn.functional.cross_entropy(likelihoods[-1][None], torch.tensor([text.label])))
            tokens += len(text.candidates[text.label])
            nll -= float(own[text.label])
    right = [int(own.argmax()) == text.label for own, text in zip(likelihoods, TEXTS, strict=True)]
    assert found["test/loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert found["test/perplexity"] == pytest.approx(float(torch.tensor(nll / tokens).exp()), rel=1e-4)
    assert found["test/accuracy"] == pytest.approx(sum(right) / 3)
    (plain,) = trainer.validate(made(folder), loader(labelled()), verbose=False)
    assert set(plain) == {"val/loss", "val/perplexity"}
    with pytest.raises(SettingError, match=r"data\.choices = None: each text has one completion.*generate"):
        made(folder).predict_step(labelled(), 0)


def test_a_checkpoint_holds_what_learned_and_refuses_other_weights(folder, tmp_path: Path):
    task = made(folder, "lora", MeZO(seed=0))
    trainer = Trainer(max_steps=2, **{**QUIET, "default_root_dir": tmp_path})
    trainer.fit(task, loader(labelled(), labelled()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all("lora_" in name for name in saved["state_dict"])
    again = ForwardCausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    ids = labelled()["input_ids"]
    assert torch.equal(again({"input_ids": ids}), task({"input_ids": ids}))
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(tiny(tie_word_embeddings=False).config)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(SettingError, match="belongs to other weights"):
        ForwardCausalLM.load_from_checkpoint(
            tmp_path / "a.ckpt", weights_only=True, model_name=str(tmp_path / "other")
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "full"])
def test_what_was_trained_is_saved_as_transformers_and_peft_save_it(kind, folder, tmp_path: Path):
    task = made(folder, kind, MeZO(seed=0))
    Trainer(max_steps=1, **QUIET).fit(task, loader(labelled()))
    task._tokenizer = Saves()
    task.export_weights(str(tmp_path / "out"))
    ids = labelled()["input_ids"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapter = kind != "full"
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "out") if adapter else load(tmp_path / "out")
    logits = again.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits[:, -ids.shape[1] :], task({"input_ids": ids}))
    assert (tmp_path / "out/adapter_config.json").exists() == adapter
    assert again.config.use_cache  # to generate with


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Llama", {}), ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16, "num_key_value_heads": 2})],
)
def test_a_prefix_starts_as_what_the_model_makes_of_random_tokens(family, settings, tmp_path: Path, monkeypatch):
    tiny(family, **settings).save_pretrained(tmp_path)
    words, text = torch.tensor([[9, 1, 30, 7, 7]]), torch.tensor([[4, 8, 15]])
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: {(50, (1, 5)): words}[high, size])
    task = made(str(tmp_path), "prefix", target={"kind": "prefix", "tokens": 5})
    whole = task.causal_lm(input_ids=torch.cat([words, text], dim=1)).logits[:, 5:]
    torch.testing.assert_close(task({"input_ids": text}), whole)


class Saves:
    def save_pretrained(self, path: str) -> None:
        assert Path(path).is_dir()


def test_low_rank_additions_may_be_to_the_embedding(folder):
    task = made(folder, target={"kind": "lora", "modules": ["embed_tokens"]})
    assert (task.vocabulary, sum(p.numel() for p in task.parameters() if p.requires_grad)) == (50, 8 * (50 + 16))


def test_a_shared_weight_is_kept_apart_from_its_copy_only_where_that_is_asked_for(tmp_path: Path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=r"target\.untie.*no query can start between them.*untie: true"):
        made(str(tmp_path), strategy=LikelihoodRatio())
    with pytest.raises(SettingError, match=r"target\.kind = 'head'.*untie: true"):
        made(str(tmp_path), "head")
    task = made(str(tmp_path), strategy=LikelihoodRatio(), target={"untie": True})
    model = task.causal_lm
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert len(made(str(tmp_path), strategy=MeZO()).network) == 1  # it needs no cut


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "nowhere/at all"}, r"model_name = 'nowhere/at all': cannot be loaded"),
        ({"model_name": ""}, "is not the name of a causal language model"),
        ({"model_kwargs": {"dtypo": "x"}}, r"unexpected keyword argument 'dtypo'\. Correct the arguments of from_pret"),
        ({"target": {"kind": "bias"}}, "LlamaForCausalLM has no such parameters"),
        ({"target": {"kind": "lora", "tokens": 3}}, r"target\.tokens = 3: has no effect with kind: lora"),
        ({"target": {"kind": "lora", "modules": ["no_such"]}}, r"target\.modules = .* peft refuses LlamaForCausalLM"),
        ({"target": {"kind": "full", "untie": True}}, r"target\.untie = True: has no effect"),
        ({"freeze": ["*"]}, "leaves nothing to train"),
        ({"freeze": ["layers.*"]}, "matches no parameter"),
        ({"objective": "chocie"}, r"objective = 'chocie'.*Write completion, choice, or the dotted path"),
    ],
)
def test_a_mistake_is_named(settings, message, folder):
    with pytest.raises(SettingError, match=message):
        made(folder, **settings) if "model_name" not in settings else ForwardCausalLM(**settings)


def test_a_quantised_model_says_what_is_trainable_there(folder, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "is_quantized", True, raising=False)
    with pytest.raises(SettingError, match=r"quantised .* Train lora, prompt, prefix, norm or bias there"):
        made(folder)
    assert made(folder, "norm").target_settings.kind == "norm"


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_package_that_is_missing_is_named_with_its_extra(package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=rf'needs the package {package}.*-e "\.\[llm\]"'):
        made(folder, "lora")


def test_batches_that_cannot_be_used_are_refused(folder):
    task = made(folder)
    batch = labelled()
    with pytest.raises(SettingError, match="needs input_ids and labels"):
        task.split({"input_ids": batch["input_ids"]})
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(SettingError, match="padded at the left"):
        task.split(batch)
    del batch["attention_mask"]
    for labels in (batch["labels"].index_fill(0, torch.tensor([2]), -100), batch["labels"][:, :1]):
        with pytest.raises(SettingError, match="a text has nothing to predict: no label after its first token"):
            task.split({**batch, "labels": labels})
    prefixed = made(folder, "prefix")
    with pytest.raises(SettingError, match=r"target\.kind = 'prefix'.*one token"):
        prefixed._stage_for(branching=True)


def wrong_share(logits: torch.Tensor, targets: Any) -> torch.Tensor:
    """An objective without a derivative."""
    first = logits.gather(1, targets["positions"][:, 0, :1, None].expand(-1, -1, logits.shape[2]))
    return (first[:, 0].argmax(1) != targets["tokens"][:, 0, 0]).float()


def test_an_objective_is_a_function_by_its_dotted_path(folder):
    task = made(folder, objective=f"{__name__}.wrong_share")
    inputs, targets = task.split(labelled())
    assert set(task.loss(task(inputs), targets).tolist()) <= {0.0, 1.0}
    assert task.hparams["objective"] == f"{__name__}.wrong_share"


def test_padding_has_no_gradient_at_all(folder):
    task = made(folder)
    below = LikelihoodRatio(sites=[{"stages": ["model.embed_tokens"]}, {"stages": ["model.layers.0", "lm_head"]}])
    inputs, targets = pack([EncodedText([1, 5], [[7, 8, 9, 6]]), EncodedText([1], [[3, 4]])], branching=False)
    inputs["input_ids"][1, 2:] = 49  # padding, by a token that no text has
    below.bind(task.network, task.loss)
    below.estimate(below.clean_pass(inputs, targets))
    gradient = task.model.model.embed_tokens.weight.grad
    assert not gradient[49].any()
    assert gradient[[1, 5, 7, 8, 3]].abs().sum(1).min() > 0
    task.network.live = None
    task.zero_grad()
    below.estimate(below.clean_pass(inputs, targets))
    assert task.model.model.embed_tokens.weight.grad[49].any()  # noise alone


def of_all_logits(logits: torch.Tensor, targets: Any) -> torch.Tensor:
    """An objective that reads more than the candidates."""
    return logits.square().mean((1, 2))


@pytest.mark.parametrize(("objective", "tokens"), [("choice", 1), (f"{__name__}.of_all_logits", 4)])
def test_above_the_last_attention_only_tokens_that_predict_a_candidate_count(folder, objective, tokens):
    task = made(folder, objective=objective)
    names = [stage.name for stage in task.network.stages]
    lines = LikelihoodRatio(sites=[{"stages": [names[0], names[3]]}, {"stages": names[4:]}], seed=0)
    _, targets = pack([EncodedText([1, 5, 8, 7], [[3], [4]])], branching=False)
    inputs = {"input_ids": torch.tensor([[1, 5, 8, 7, 0, 0]])}  # padded
    lines.bind(task.network, task.loss)
    lines.estimate(lines.clean_pass(inputs, targets))
    # A sum of outer products, one for each token: of what enters a layer and what is estimated at its output.
    assert torch.linalg.matrix_rank(task.network.module.lm_head.weight.grad) == tokens
    reached = [task.network.live(targets, 6, start).sum().item() for start in range(len(names) + 1)]
    assert reached == [4, 4, 4, 4, *[tokens] * 3]


@pytest.fixture
def run(folder, tmp_path: Path):
    """Train on three batches of texts, and go on from a checkpoint."""
    lines = [{"prompt": "a" * (i % 3 + 1), "completion": "bc" * (i % 4 + 1)} for i in range(12)]
    for name, given in (("texts", lines), ("moved", lines), ("others", [*lines[:-1], lines[0]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))

    def run(steps: int, ckpt: str | None = None, *, texts: str = "texts.jsonl", **task: Any) -> Any:
        seed_everything(1, verbose=False)
        task = made(folder, "lora", LikelihoodRatio(seed=0), optimizer={"name": "adam", "lr": 1e-2}, **task)
        task._tokenizer = lambda text, add_special_tokens: {"input_ids": [1, *(ord(c) - 90 for c in text)]}
        data = JsonlTextDataModule(train_file=str(tmp_path / texts), batch_size=4)
        trainer = Trainer(max_steps=steps, **{**QUIET, "default_root_dir": tmp_path})
        trainer.fit(task, datamodule=data, ckpt_path=ckpt)
        return task, trainer

    return run


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(run, tmp_path: Path):
    whole, _ = run(5)
    _, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(5, str(tmp_path / "half.ckpt"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_a_resumed_run_says_or_refuses_what_it_learns_otherwise(run, tmp_path: Path, caplog):
    for steps in (2, 3):
        _, trainer = run(steps)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    with pytest.raises(SettingError, match=r"data.content = '12 texts, \w+': the checkpoint's run has .*middle of"):
        run(4, str(tmp_path / "2.ckpt"), texts="others.jsonl")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run(4, str(tmp_path / "2.ckpt"), texts="moved.jsonl")
        run(4, str(tmp_path / "3.ckpt"), texts="others.jsonl", objective=f"{__name__}.wrong_share")
    moved, line = [r.getMessage() for r in caplog.records if "settings that differ" in r.getMessage()]
    assert "moved.jsonl" in moved
    assert "data.content" not in moved
    assert f"data.train_file '{tmp_path}/texts.jsonl' -> '{tmp_path}/others.jsonl'" in line
    assert "data.content '12 texts, " in line
    assert f"objective 'completion' -> '{__name__}.wrong_share'" in line


def test_a_checkpoint_knows_all_settings_of_the_data():
    form = {"template": "{text} It was", "choices": ["bad", "good"]}
    data = JsonlTextDataModule(train_file="a.jsonl", test_file="b.jsonl", **form)
    known = describe_data(SimpleNamespace(datamodule=data))
    assert {f"data.{name}" for name in constructor_parameters(JsonlTextDataModule)} | {"data"} == set(known)
    assert (known["data.test_file"], known["data.template"]) == ("b.jsonl", form["template"])
