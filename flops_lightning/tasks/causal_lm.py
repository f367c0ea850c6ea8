"""Any causal language model, or an adapter of it, trained from forward passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.language import candidates
from flops_lightning.language.candidates import IGNORED, candidate_log_likelihoods, targets_of_labels
from flops_lightning.language.models import as_written, load_tokenizer
from flops_lightning.language.prompted import PromptedText
from flops_lightning.language.targets import LanguageTarget, apply_target, tied
from flops_lightning.network.tokens import tokenwise_from
from flops_lightning.objectives import Objective, dotted_path, find_objective, naming_the_loss
from flops_lightning.queries import row_losses
from flops_lightning.settings import read_settings
from flops_lightning.tasks.backbone import freeze as freeze_parameters
from flops_lightning.tasks.evaluation import Perplexity, first_seen, mean_loss
from flops_lightning.tasks.forward_module import ForwardModule
from flops_lightning.tasks.language_model import check_derivatives, example_inputs, fingerprint, load

KEY = "language_model"
OBJECTIVES = {"completion": candidates.completion, "choice": candidates.choice}


class ForwardCausalLM(ForwardModule):
    """A causal language model of transformers, trained by a ``ForwardGradientStrategy``.

    Batches are those of :class:`~flops_lightning.datamodules.JsonlTextDataModule`, or mappings ``{"input_ids": (b, t),
    "labels": (b, t)}`` padded on the right, as transformers' collators make them. Weights that are not trained are not
    in checkpoints, which identify the model instead.

    Attributes:
        model: The model, or peft's model around it.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flops_lightning.strategies import MeZO
        >>> from flops_lightning.tasks import ForwardCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        >>> folder = mkdtemp()
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(folder)
        >>> task = ForwardCausalLM(model_name=folder, target={"kind": "lora", "rank": 2}, strategy=MeZO(seed=0))
        >>> task({"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([1, 3, 20])
        >>> sum(p.numel() for p in task.parameters() if p.requires_grad)  # two layers, q_proj and v_proj
        256
    """

    weights_name: ClassVar[str] = "model"

    def __init__(
        self, *, model_name: str, model_kwargs: Mapping[str, Any] | None = None, tokenizer: str = "",
        target: LanguageTarget | None = None, freeze: Sequence[str] = (), objective: str | Objective = "completion",
        **settings: Any,
    ) -> None:  # fmt: skip
        """Load the model, add what the target adds, find its stages by replay, and bind the strategy.

        Args:
            model_name: A folder, or a name on the Hugging Face hub.
            model_kwargs: Further arguments of ``AutoModelForCausalLM.from_pretrained`` (``dtype``,
                ``attn_implementation``, ``quantization_config``, ...).
            tokenizer: Folder or name of the tokenizer; empty: the model's.
            target: Which parameters are trained.
            freeze: Shell patterns of parameters that are not trained, for example ``["model.embed_tokens.*"]``.
            objective: What is minimised. ``completion``: mean negative log-probability of the tokens of one completion.
                ``choice``: cross-entropy over the log-likelihoods of all candidates. Or a function
                ``(logits (r, t, v), targets) -> (r,)`` or its dotted path, with the targets of
                :mod:`flops_lightning.language.candidates`; it need not be differentiable.
            **settings: Those of :class:`ForwardModule`: ``strategy``, ``optimizer``, ``clip``, ``max_skipped_steps``,
                ``spend``.

        Raises:
            SettingError: a setting that does not work, or has no effect in this combination.
        """
        super().__init__(**settings)
        self.target_settings = read_settings(LanguageTarget, target, "target")
        self.objective = OBJECTIVES.get(objective) if isinstance(objective, str) else objective
        if self.objective is None:
            self.objective = _find(str(objective))
        named = objective if isinstance(objective, str) else dotted_path(objective)
        self.loss_path = "" if named in OBJECTIVES else named
        patterns = [freeze] if isinstance(freeze, str) else list(freeze)
        self.save_hyperparameters(
            {
                "model_name": model_name, "model_kwargs": as_written(model_kwargs or {}), "tokenizer": tokenizer,
                "target": asdict(self.target_settings), "freeze": patterns, "objective": named,
            }
        )  # fmt: skip
        model = load(model_name, model_kwargs or {})
        self.model = apply_target(model, self.target_settings)
        freeze_parameters(model, patterns)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise SettingError("freeze", patterns, "leaves nothing to train.", "Write freeze: [].")
        check_derivatives(model, self.strategy, self.target_settings.kind)
        self._stage_for(branching=False)
        self.metrics = nn.ModuleDict({part: _metrics() for part in ("validate", "test")})
        self._tokenizer: Any = None

    @property
    def causal_lm(self) -> Any:
        """The model of transformers itself, adapters of its layers included."""
        model: Any = self.model
        return model.get_base_model() if self.target_settings.kind in ("lora", "prompt", "prefix") else model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first used."""
        if self._tokenizer is None:
            own = "tokenizer" if self.hparams["tokenizer"] else "model_name"
            self._tokenizer = load_tokenizer(self.hparams[own], setting=own)
        return self._tokenizer

    @property
    def context(self) -> int:
        """Most tokens of a text; 0: the model's config does not tell."""
        most = getattr(self.causal_lm.config, "max_position_embeddings", None) or 0
        own = self.target_settings.tokens if self.target_settings.kind in ("prompt", "prefix") else 0
        return max(0, int(most) - own)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model has an embedding of."""
        return len(self.causal_lm.get_input_embeddings().weight)

    def _stage_for(self, *, branching: bool) -> None:
        kind = self.target_settings.kind
        if branching and kind == "prefix":
            problem = "peft's model does not accept the mask that separates candidates of several tokens."
            remedy = "Choose words of one token, or another kind of target."
            raise SettingError("target.kind", kind, problem, remedy)
        self._branching = branching
        network: Any = self.model if kind == "prefix" else self.causal_lm
        if "network" in vars(self):  # the one that the strategy serves already
            network = self.network.module
        elif kind == "prompt":
            network = PromptedText(self.model)
        example = example_inputs(self.causal_lm, branching=branching)
        try:
            self.stage(network, example)
        except SettingError as error:
            shared = tied(self.causal_lm) and self.causal_lm.get_input_embeddings().weight.requires_grad
            if not (shared and len(self.network) == 1):
                raise
            problem = f"the output layer's weight is the embedding's, so no query can start between them ({error})"
            remedy = 'Write untie: true, or freeze: ["model.embed_tokens.*"], or take MeZO.'
            raise SettingError("target.untie", False, problem, remedy) from error
        if kind not in ("prompt", "prefix"):  # these shift the places of the text
            known = self.objective in OBJECTIVES.values()  # another may read logits that predict no candidate
            self.network.live = _live(tokenwise_from(self.network, example) if known else len(self.network) + 1)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """``(r,)`` losses of ``(r, t, v)`` logits."""
        objective: Any = self.objective
        losses: Tensor = objective(outputs, targets)
        return losses

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets of a batch; of a mapping with ``labels`` the mask is dropped, which causality replaces."""
        if isinstance(batch, Mapping):
            return _of_labels(batch)
        inputs, targets = super().split(batch)
        dtype = self.causal_lm.dtype
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}, targets

    def setup(self, stage: str) -> None:
        """Compare the data with the model, and stage it for batches with branches where the data has them."""
        super().setup(stage)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        choices = getattr(data, "choices", None)
        if data is not None and self.objective is candidates.choice and not choices:
            problem = "has nothing to choose from: the data has no choices."
            raise SettingError("objective", "choice", problem, "Write data.choices, or objective: completion.")
        branching = bool(getattr(data, "branching", self._branching))
        if branching != self._branching:
            self._stage_for(branching=branching)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss``, ``val/perplexity`` and, where there are choices, ``val/accuracy``."""
        self._evaluate(batch, "validate", "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test/loss``, ``test/perplexity`` and ``test/accuracy``, every text once."""
        inputs, _ = self.split(batch)
        own = first_seen(self.trainer.test_dataloaders, batch_idx, len(inputs["input_ids"]))
        self._evaluate(batch, "test", "test", own)

    def _evaluate(self, batch: Any, part: str, prefix: str, own: int | None = None) -> None:
        inputs, targets = self.split(batch)
        logits = self(inputs)
        with naming_the_loss(self.loss_path):
            losses = row_losses(self.loss, logits, targets)
        likelihoods = candidate_log_likelihoods(logits, targets)
        label = targets["label"]
        right = likelihoods.gather(1, label[:, None])[:, 0]
        lengths = (targets["tokens"] != IGNORED).sum(2).gather(1, label[:, None])[:, 0]
        metrics: Any = self.metrics[part]
        chosen = {"accuracy": likelihoods.argmax(1) == label} if likelihoods.shape[1] > 1 else {}
        if own != 0:
            metrics["loss"].update(losses[:own])
            metrics["perplexity"].update(-right[:own], lengths[:own])
            for name, value in chosen.items():
                metrics[name].update(value.float()[:own])
        for name in ("loss", "perplexity", *chosen):
            self.log(f"{prefix}/{name}", metrics[name], prog_bar=name != "perplexity", batch_size=len(label))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``label`` ``(b,)`` of the likeliest candidate and ``probability`` ``(b, c)`` among the candidates."""
        inputs, targets = self.split(batch)
        if targets["tokens"].shape[1] == 1:
            problem = "each text has one completion, so there is nothing to predict."
            raise SettingError("data.choices", None, problem, "Write choices; task.model.generate(...) writes texts.")
        likelihoods = candidate_log_likelihoods(self(inputs), targets)
        return {"label": likelihoods.argmax(1), "probability": likelihoods.softmax(1)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what does not learn, and say which model it belongs to."""
        super().on_save_checkpoint(checkpoint)
        frozen = self._frozen()
        checkpoint[KEY] = {"model_name": self.hparams["model_name"], "weights": fingerprint(self.causal_lm, frozen)}
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what was trained in another model; take what does not learn as it is."""
        frozen, saved = self._frozen(), checkpoint.get(KEY)
        if saved is not None and saved["weights"] != fingerprint(self.causal_lm, frozen):
            problem = f"belongs to other weights ({saved['model_name']}) or to another target."
            remedy = "Give the model_name and the target of that run."
            raise SettingError("ckpt_path", self.hparams["model_name"], problem, remedy)
        checkpoint["state_dict"] = {**{n: p.detach() for n, p in frozen.items()}, **checkpoint["state_dict"]}
        super().on_load_checkpoint(checkpoint)

    def _frozen(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not parameter.requires_grad}

    @rank_zero_only
    def export_weights(self, path: str | Path) -> None:
        """Write a folder by ``save_pretrained``: the adapter alone, or else the whole model; and the tokenizer.

        Of several processes the first writes it.
        """
        model, config = self.model, self.causal_lm.config
        config.use_cache = True  # who loads it wants to generate
        model.save_pretrained(str(path))
        config.use_cache = False
        self.tokenizer.save_pretrained(str(path))


def _find(path: str) -> Objective:
    try:
        return find_objective(path)
    except SettingError as error:
        remedy = "Write completion, choice, or the dotted path of a function (logits (r, t, v), targets) -> (r,)."
        raise SettingError("objective", path, error.problem, remedy) from error


def _live(tokenwise: int) -> Callable[[Any, int, int], Tensor]:
    """See :attr:`StagedNetwork.live`; from the stage ``tokenwise`` on no token reads another."""

    def live(targets: Any, tokens: int, start: int) -> Tensor:
        reach = candidates.predicting_tokens if start >= tokenwise else candidates.live_tokens
        return reach(targets, tokens)

    return live


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict({"loss": mean_loss(), "perplexity": Perplexity(), "accuracy": mean_loss()})


def _of_labels(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if "input_ids" not in batch or "labels" not in batch:
        problem = "a batch that is a mapping needs input_ids and labels."
        raise SettingError("data", sorted(batch), problem, "Return both, or a pair (inputs, targets).")
    mask, labels = batch.get("attention_mask"), batch["labels"]
    empty = (labels[:, 1:] == IGNORED).all(1).any()
    left = empty.new_zeros(()) if mask is None else (mask[:, 1:] > mask[:, :-1]).any()
    if bool(empty | left):  # the device is waited for once
        if left:
            raise SettingError("data", "attention_mask", "texts are padded at the left.", "Pad them at the right.")
        problem = "a text has nothing to predict: no label after its first token."
        raise SettingError("data", "labels", problem, "Leave such texts out.")
    return {"input_ids": batch["input_ids"]}, targets_of_labels(batch["labels"])
