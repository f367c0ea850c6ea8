"""A frozen language model learns to see: an adapter from image features to its embeddings (FLOPS, section 5.3)."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from flops_lightning.datamodules import CaptionDataModule
from flops_lightning.distributed import mean_over_ranks
from flops_lightning.errors import SettingError, check_at_least, check_choice, check_flag, check_whole
from flops_lightning.language import CaptionScorer, RemoteCaptionLoss, as_written
from flops_lightning.queries import CleanPass, row_losses
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.tasks import alignment_models as models
from flops_lightning.tasks.adapters import AdapterKind, Start, make_adapter, start_adapter
from flops_lightning.tasks.caption_answers import greedy_captions, likeliest
from flops_lightning.tasks.evaluation import Perplexity, first_seen, mean_loss
from flops_lightning.tasks.forward_module import Batch
from flops_lightning.tasks.served_module import ServedModule
from flops_lightning.tasks.vision_encoder import Feature, VisionEncoder

Prompt = Literal["plain", "instruction"]


class AdapterAlignment(ServedModule):
    """An adapter between a frozen image encoder and a frozen language model, trained by the losses of captions.

    A caption's loss is the mean negative log-likelihood of its tokens after the adapter's vectors. Queries add their
    noise to these vectors, so nothing behind the adapter is differentiated. Encoder and language model are not
    submodules of the task: they are in no ``state_dict``, checkpoint or optimiser, are not sent between processes, and
    ``.to()`` does not move them; a run moves them to its device. A checkpoint of other models is refused.

    Batches are those of :class:`~flops_lightning.datamodules.CaptionDataModule`, whose photos are encoded once, before
    training. Or they are pairs of features ``(b, f)`` or images ``(b, 3, h, w)`` and captions as
    :class:`~flops_lightning.suffix_loss.PaddedTargets` of tokens.

    Attributes:
        loss: Scores captions.
        tokenizer: Tokenises captions; None if ``llm`` is a scorer, until it is set.
        encoder: Computes features of images; None: the data has features.
        adapter: The trained part.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flops_lightning.language import CaptionLoss
        >>> from flops_lightning.strategies import LikelihoodRatio
        >>> from flops_lightning.suffix_loss import PaddedTargets
        >>> from flops_lightning.tasks import AdapterAlignment
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> scorer = CaptionLoss(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), visual_tokens=2)
        >>> task = AdapterAlignment(llm=scorer, feature_width=8, visual_tokens=2, strategy=LikelihoodRatio(seed=0))
        >>> captions = PaddedTargets.of([torch.tensor([5, 6, 7]), torch.tensor([8])])
        >>> task.sample_statistics((torch.randn(2, 8), captions)).loss.shape
        torch.Size([2])
    """

    weights_name: ClassVar[str] = "adapter.safetensors"
    loss: Any = None  # a SuffixLoss in the place of the method
    tokenizer: Any = None
    sigma: float | None = None

    def __init__(
        self, *, llm: str | CaptionScorer, llm_kwargs: Mapping[str, Any] | None = None, encoder: str = "",
        encoder_kwargs: Mapping[str, Any] | None = None, feature: Feature = "cls_pre_norm", feature_width: int = 0,
        adapter: AdapterKind = "linear", visual_tokens: int = 1, bos: bool = False, eos: bool = False,
        prompt: Prompt = "plain", normalize_features: bool = True, init: Start = "embedding",
        relative_sigma: float = 0.0, **settings: Any,
    ) -> None:  # fmt: skip
        """Load the frozen models, make the adapter and bind the strategy.

        Args:
            llm: A causal language model of transformers, by name or folder; or a scorer of captions instead.
            llm_kwargs: Further arguments of ``from_pretrained``: ``dtype``, ``attn_implementation``,
                ``quantization_config``; for a scorer only ``tokenizer``, the name or folder of one.
            encoder: A vision transformer of timm or open_clip; empty: the data has features, or a cache of them.
            encoder_kwargs: ``checkpoint`` (a file; the tag of open_clip weights; ``pretrained``: timm's; without it
                random ones, to plan a run), and further arguments of ``timm.create_model``.
            feature: Which output of the encoder; see :class:`VisionEncoder`. ``patches``: each becomes one vector.
            feature_width: Width of the features, needed only without an encoder.
            adapter: ``linear``, or ``mlp2x_gelu`` as in LLaVA-1.5.
            visual_tokens: Number of vectors per feature; with ``patches`` and no encoder, the number of patches.
            bos: Put the model's begin-of-sequence token before the vectors, as LLaVA does, but not the paper.
            eos: Put the end-of-sequence token after each caption.
            prompt: ``plain``: the caption follows the vectors, as in the paper. ``instruction``: the question of the
                data stands between them, and is not scored.
            normalize_features: Divide features by their norm. With norms of 10 or more, a step of Adam moves the
                vectors by as much more, and hardly any learning rate works.
            init: ``embedding``: the vectors start at the mean embedding of all tokens, whatever the image. ``default``:
                PyTorch's initialisation.
            relative_sigma: Replaces the site's sigma, as a multiple of the root mean square of the first batch's
                vectors; fixed from then on. 0: the site's sigma.
            **settings: ``max_queries`` of a service, and :class:`ForwardModule`'s. The default site is ``adapter``.

        Raises:
            SettingError: a model that cannot be loaded, or a setting that does not work or has no effect.
        """
        super().__init__(**settings)
        check_choice("prompt", prompt, get_args(Prompt))
        check_at_least("relative_sigma", relative_sigma, 0.0, "Write, for example, 0.1, or 0.")
        check_whole("visual_tokens", visual_tokens, 1, "Write 1, or 4 for example.")
        for name, flag in {"bos": bos, "eos": eos, "normalize_features": normalize_features}.items():
            check_flag(name, flag)
        made, extra = dict(encoder_kwargs or {}), dict(llm_kwargs or {})
        checkpoint = str(made.pop("checkpoint", ""))
        self.encoder = VisionEncoder(encoder, checkpoint, made, feature) if encoder else None
        self._encoder_name = self.encoder.name if self.encoder else ""
        visual_tokens = models.check_features(self.encoder, encoder_kwargs, feature_width, visual_tokens)
        self.feature_width = self.encoder.width if self.encoder else feature_width
        self.save_hyperparameters(
            {
                "llm": llm if isinstance(llm, str) else type(llm).__name__, "llm_kwargs": as_written(extra),
                "encoder": encoder, "encoder_kwargs": dict(encoder_kwargs or {}), "feature": feature,
                "feature_width": feature_width, "adapter": adapter, "visual_tokens": visual_tokens, "bos": bos,
                "eos": eos, "prompt": prompt, "normalize_features": normalize_features, "init": init,
                "relative_sigma": relative_sigma,
            }
        )  # fmt: skip
        self.loss, self.tokenizer = models.load_scorer(llm, extra, visual_tokens=visual_tokens, bos=bos, eos=eos)
        patches = feature == "patches"
        sizes = (self.feature_width, self.loss.width)
        self.adapter = make_adapter(adapter, *sizes, visual_tokens=visual_tokens, patches=patches)
        start_adapter(self.adapter, init, models.mean_embedding(self.loss))
        models.take_site(self.strategy, relative_sigma)
        self.stage(self.adapter, torch.zeros(1, *([visual_tokens] if patches else []), self.feature_width))
        kinds = {"loss": mean_loss, "perplexity": Perplexity, "accuracy": mean_loss}
        self.metrics = nn.ModuleDict({f"{part}_{n}": kind() for part in ("val", "test") for n, kind in kinds.items()})
        self._class_captions: list[list[int]] = []
        self._longest = 0

    @property
    def scorer(self) -> RemoteCaptionLoss | None:
        """The service, if the language model is at one."""
        return self.loss if isinstance(self.loss, RemoteCaptionLoss) else None

    def step_rows(self, strategy: ForwardGradientStrategy, samples: int) -> int:
        """See :meth:`ServedModule.step_rows`."""
        return samples + sum(int(site.queries_per_sample * samples) for site in strategy.sites)

    def validation_rows(self, samples: int) -> int:
        """See :meth:`ServedModule.validation_rows`; each photo is scored with the captions of all classes, too."""
        return samples * (1 + len(self._class_captions))

    @property
    def caption_context(self) -> int:
        """Tokens of a caption, with its question, that the language model has room for; 0: it is not known."""
        taken = self.loss.positions(0) + (self.loss.eos is not None)
        return max(0, self.loss.context - taken) if self.loss.context else 0

    @property
    def reads_instructions(self) -> bool:
        """Whether the data's questions are wanted."""
        return bool(self.hparams["prompt"] == "instruction")

    def caption_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokens of each caption, without those of beginning and end.

        Raises:
            SettingError: there is no tokenizer, or it is one of another model.
        """
        if self.tokenizer is None:
            problem = "is a scorer, which does not tokenise captions."
            raise SettingError("llm", self.hparams["llm"], problem, "Set the task's tokenizer, or data.tokenizer.")
        alone = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = self.tokenizer(list(captions), **alone)["input_ids"] if captions else []
        vocabulary = getattr(self.loss, "vocabulary", 0)
        largest = max((max(each) for each in ids if each), default=0)
        if vocabulary and largest >= vocabulary:
            problem = f"gives the id {largest}, and the language model's embedding has {vocabulary}."
            raise SettingError("tokenizer", type(self.tokenizer).__name__, problem, "Use the one of this model.")
        return ids

    def setup(self, stage: str) -> None:
        """Move what is frozen to the run's device, and put features in the place of the data's photos."""
        super().setup(stage)
        trainer: Any = self.trainer
        self.place(trainer.strategy.root_device)
        data = trainer.datamodule
        if isinstance(data, CaptionDataModule):
            encode = None if self.encoder is None else lambda images: self.features_of(images).cpu()
            found = data.keep_features(stage, encode, encoder=self._encoder_name, feature=self.hparams["feature"])
            self._encoder_name = found or self._encoder_name
            numbers = [torch.tensor([number]) for number in range(len(data.class_captions))]  # they come first
            self._class_captions = [data.tokens.targets(number).trimmed()[0].tolist() for number in numbers]
            self._longest = int(data.tokens.lengths.max(initial=0))

    def place(self, device: torch.device) -> None:
        """Move encoder and language model to a device; one that is spread over devices stays."""
        if self.encoder is not None:
            self.encoder.to(device)
        llm = getattr(self.loss, "llm", None)
        if llm is not None and not hasattr(llm, "hf_device_map"):
            llm.to(device)

    @property
    def backbone(self) -> Any:
        """Size, mean and standard deviation of the encoder's images; any serve where there is no encoder."""
        unread = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 1, 1)}
        return SimpleNamespace(pretrained_cfg=unread) if self.encoder is None else self.encoder.backbone

    def features_of(self, images: Tensor) -> Tensor:
        """``(b, f)`` or ``(b, p, f)`` features of images, as the encoder gives them."""
        if self.encoder is None:
            problem = "is needed to compute features of images."
            raise SettingError("encoder", "", problem, "Write one, or give features (b, feature_width).")
        return self.encoder(images)

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Features, of norm 1 if that is asked for, and captions; images are encoded here."""
        inputs, captions = super().split(batch)
        if isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = self.features_of(inputs)
        self.check_inputs(inputs)
        inputs = inputs.to(self.device)
        if self.hparams["normalize_features"]:
            inputs = nn.functional.normalize(inputs, dim=-1)
        return inputs, captions

    def check_inputs(self, inputs: Any) -> None:
        """Refuse features of another width than the adapter's."""
        places = [self.loss.visual_tokens] if self.hparams["feature"] == "patches" else []
        if not isinstance(inputs, Tensor) or [*inputs.shape[1:]] != [*places, self.feature_width]:
            given = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else type(inputs).__name__
            problem = f"the adapter takes features {(*places, self.feature_width)} of a sample."
            raise SettingError("data", given, problem, "Correct them, or feature_width, visual_tokens or encoder.")

    def _clean_pass(self, batch: Batch) -> CleanPass:
        if self.sigma is None and self.hparams["relative_sigma"]:
            inputs, _ = self.split(batch)
            with torch.no_grad():
                square = self(inputs).square().mean()
            ranks = self._training_strategy().communicator
            root = float(mean_over_ranks(ranks, square, len(inputs)).sqrt())
            self._set_sigma(self.hparams["relative_sigma"] * root)
            rank_zero_info(f"relative_sigma: sigma is {self.sigma:.4g}, the vectors' root mean square {root:.4g}")
        return super()._clean_pass(batch)

    def _set_sigma(self, sigma: float) -> None:
        strategy = self._training_strategy()
        self.sigma = sigma
        strategy.set_sigmas({site.name: sigma for site in strategy.sites})

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss`` and ``val/perplexity``; of class captions ``val/accuracy``: the likeliest is the own."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same as ``test/...``, every caption once whatever the number of processes."""
        self._evaluate(batch, "test", first_seen(self.trainer.test_dataloaders, batch_idx, len(batch[1])))

    def _evaluate(self, batch: Batch, part: str, own: int | None = None) -> None:
        inputs, captions = self.split(batch)
        vectors, metrics = self(inputs), cast("Any", self.metrics)
        losses = row_losses(self.loss, vectors, captions)
        tokens = torch.from_numpy(self.loss.scored_tokens(captions)).to(losses.device)
        found: dict[str, tuple[Tensor, ...]] = {"loss": (losses,), "perplexity": (losses * tokens, tokens)}
        if self._class_captions:
            found["accuracy"] = (likeliest(self.loss, vectors, captions, self._class_captions),)
        for name, values in found.items():
            if own != 0:
                metrics[f"{part}_{name}"].update(*(each[:own] for each in values))
            bar = name != "perplexity"
            self.log(f"{part}/{name}", metrics[f"{part}_{name}"], prog_bar=bar, batch_size=len(captions))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[str]]:
        """``caption``: of each image what the language model writes, taking the likeliest token each time."""
        inputs, captions = self.split(batch)
        given = captions.trimmed() if captions.given is not None else None
        written = greedy_captions(self.loss, self.tokenizer, self(inputs), given, captions.given, self._longest)
        return {"caption": written}

    @property
    def identity(self) -> dict[str, Any]:
        """What the adapter belongs to, as plain values."""
        names = ("feature", "adapter", "visual_tokens", "bos", "eos", "prompt", "normalize_features")
        llm = models.described(self.loss, self.hparams["llm"])
        return {**llm, "encoder": self._encoder_name, **{n: self.hparams[n] for n in names}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the adapter belongs to, and the width that was found."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[models.KEY] = {**self.identity, "sigma": self.sigma}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter of other models."""
        saved = models.check_same_models(checkpoint.get(models.KEY), self.identity)
        now, then = (own["relative_sigma"] for own in (self.hparams, checkpoint["hyper_parameters"]))
        if saved["sigma"] is not None and now and self.strategy is not None:
            self._set_sigma(saved["sigma"] * (now / then))
        super().on_load_checkpoint(checkpoint)

    @rank_zero_only
    def export_weights(self, path: str) -> None:
        """Write the adapter's weights as safetensors, with what they belong to as metadata."""
        from safetensors.torch import save_file

        about = {name: str(value) for name, value in self.identity.items()}
        save_file({n: v.detach().cpu().contiguous() for n, v in self.adapter.state_dict().items()}, path, about)
