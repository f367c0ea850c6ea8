"""Prompt tuning of a frozen CLIP by forward passes alone (FLOPS, ICLR 2025, section 5.2)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from flops_lightning.datamodules import ImageDataModule
from flops_lightning.errors import LostQueriesError, SettingError, check_flag
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.objectives import Objective
from flops_lightning.optim.optimizers import ClipSettings, OptimizerSettings
from flops_lightning.prompts.class_texts import ClassTexts, Tokenizer, check_class_names, template_features
from flops_lightning.prompts.intrinsic import IntrinsicPrompt
from flops_lightning.prompts.stages import PromptedCLIP, stage_clip, text_start, token_tower
from flops_lightning.search import SearchSettings
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.candidate_search import CandidateSearch
from flops_lightning.tasks.clip_model import check_clip_images, check_image_data, coloured, load_clip, weights_hash
from flops_lightning.tasks.image_prompt_start import StartsAtImages
from flops_lightning.tasks.kept_features import keep_features
from flops_lightning.tasks.prompt_files import KEY, check_same_prompts, of_clip, write_prompts
from flops_lightning.tasks.prompt_search import STEP, check_search, search_in_place_of
from flops_lightning.tasks.prompt_settings import ImagePrompt, Pairing, TextPrompt, described, take_sites
from flops_lightning.tasks.served import check_source, served_network


class ClipPromptTuner(StartsAtImages):
    """A text prompt, an image prompt or both for a frozen open_clip model, learned from losses.

    A checkpoint holds the prompts with their matrices ``W``, the class names, the template and a hash of CLIP's
    weights, but not these weights: it is small, and works only with the same model. Without an image prompt, each
    image of one of this package's data modules is encoded once per run, unless it is augmented.

    Example:
        >>> from flops_lightning.strategies import EvolutionStrategies
        >>> from flops_lightning.tasks import ClipPromptTuner
        >>> task = ClipPromptTuner(
        ...     model_name="local-dir:data/assets/clip_tiny_digits", class_names=["zero", "one"],
        ...     template='a photo of the number: "{}".', text_prompt={"tokens": 4, "dim": 20},
        ...     strategy=EvolutionStrategies(seed=0),
        ... )
        >>> task(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 2])
    """

    weights_name: ClassVar[str] = "prompts.safetensors"

    def __init__(
        self, *, model_name: str = "", class_names: Sequence[str] | None = None, checkpoint: str = "",
        template: str | Sequence[str] | None = None, ensemble: bool = False, doubled_names: bool = False,
        text_prompt: TextPrompt | None = None, image_prompt: ImagePrompt | None = None,
        strategy: ForwardGradientStrategy | None = None, pairing: Pairing | None = None,
        search: SearchSettings | None = None, loss: str | Objective | None = None, label_smoothing: float = 0.0,
        optimizer: OptimizerSettings | None = None, clip: ClipSettings | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Load the model, put the prompts into it, and bind the strategy.

        Args:
            model_name: An open_clip model, or ``local-dir:FOLDER`` with its ``open_clip_config.json`` and weights.
            class_names: Names of the classes in the order of the labels (the CLI takes those of the data).
            checkpoint: A tag of open_clip weights, such as ``openai``, or a file; empty: random ones, to plan a run.
            template: A caption with ``{}`` for the class name (the CLI takes the data's).
            ensemble: Average the features of several templates, without a text prompt.
            doubled_names: Accept a name that stands for two classes, as two of CLIP's names for ImageNet do.
            text_prompt: The prompt before the class names; None: the template's words.
            image_prompt: The prompt after the image's patches; None: none.
            strategy: The gradient estimator. If it names no sites, they follow from the prompts.
            pairing: ``split``: each prompt is perturbed against the other's clean features. ``crossed``: every query of
                one with every query of the other, for losses that are rounded. ``joint``: one query perturbs both, as a
                service that returns only losses requires. None: ``split``, or as the strategy says.
            search: CMA-ES instead of a strategy: a training step is a generation, whose fitness is the mean loss of the
                batch (``batch_size: 0``: of all training images).
            loss: As in :class:`ForwardImageClassifier`.
            label_smoothing: As in :class:`ForwardImageClassifier`.
            optimizer: Optimiser and schedule; not with ``search``.
            clip: Gradient clipping; not with ``search``.
            **settings: Those of :class:`ServedClassifier` (a ``service`` instead of ``model_name``) and others of
                :class:`ForwardModule`.

        Raises:
            SettingError: a setting that does not work, or has no effect in this combination.
        """
        if search is not None:
            search = read_settings(SearchSettings, search, "search")
            strategy, optimizer = search_in_place_of(search, strategy, optimizer, clip), STEP
        super().__init__(
            loss=loss, label_smoothing=label_smoothing, strategy=strategy, optimizer=optimizer, clip=clip, **settings
        )
        names = tuple(class_names or ())
        check_class_names(names, doubled=doubled_names)
        templates = (template,) if isinstance(template, str) else tuple(template or ("a photo of a {}.",))
        self.text_settings = None if text_prompt is None else read_settings(TextPrompt, text_prompt, "text_prompt")
        self.image_settings = None if image_prompt is None else read_settings(ImagePrompt, image_prompt, "image_prompt")
        check_flag("ensemble", ensemble)
        if len(templates) > 1 and not ensemble:
            problem = "are several templates, but only one is used."
            raise SettingError("template", templates[:2], problem, "Give one, or write ensemble: true.")
        if ensemble and self.text_settings is not None and self.text_settings.on:
            problem = "averages the features of whole texts, whose words a text prompt replaces."
            raise SettingError("ensemble", True, problem, "Write ensemble: false, or text_prompt: null.")
        check_source(model_name, checkpoint, self.service_settings)
        self.save_hyperparameters(
            {
                "model_name": model_name, "class_names": list(names), "checkpoint": checkpoint,
                "template": list(templates), "ensemble": ensemble, "doubled_names": doubled_names,
                "text_prompt": self.text_settings and asdict(self.text_settings),
                "image_prompt": self.image_settings and asdict(self.image_settings),
                "pairing": pairing, "search": search and asdict(search),
            }
        )  # fmt: skip
        file = Path(checkpoint) if checkpoint and Path(checkpoint).is_file() else None
        self.start_weights = {"checkpoint": file.name, "checkpoint.folder": str(file.parent)} if file else {}
        network, self.weights = self._loaded(model_name, checkpoint, names, templates, pairing)
        self.clip = cast("PromptedCLIP", network.module)
        prompts = {name: given for name, given in self._prompts().items() if given is not None}
        if self.strategy is not None:
            if not prompts:
                problem = "has nothing to train: there is no text_prompt and no image_prompt."
                raise SettingError("strategy", type(self.strategy).__name__, problem, "Give one, or strategy: null.")
            take_sites(self.strategy, prompts, pairing, stages=[stage.name for stage in network.stages])
        self.stage(network, batch_norm="frozen")  # as all of the model
        self.count_classes(len(names))
        self.train()  # as any task that is new; estimates run in eval mode anyway

    def _prompts(self) -> dict[str, TextPrompt | None]:
        both = {"image_prompt": self.image_settings, "text_prompt": self.text_settings}
        return {name: prompt if prompt is not None and prompt.on else None for name, prompt in both.items()}

    def _loaded(
        self, model_name: str, checkpoint: str, names: Sequence[str], templates: Sequence[str], pairing: Pairing | None
    ) -> tuple[StagedNetwork, str]:
        """The network with its prompts, and by what a checkpoint knows the model."""
        if self.service_settings is None:
            model, tokenizer = load_clip(model_name, checkpoint)
            weights = weights_hash(model)
            return self._staged(model, tokenizer, names, templates), weights
        doubled: bool = self.hparams["doubled_names"]
        return served_network(
            self.service_settings, names, templates, pairing, text=self.text_settings, image=self.image_settings,
            doubled_names=doubled,
        )  # fmt: skip

    def _staged(
        self, model: Any, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]
    ) -> StagedNetwork:
        by = {"tokenizer": tokenizer, "doubled_names": self.hparams["doubled_names"]}
        text, image = self.text_settings, self.image_settings
        texts: ClassTexts | Tensor
        prompts: dict[str, IntrinsicPrompt | None] = {"text_prompt": None, "image_prompt": None}
        if text is not None and self._prompts()["text_prompt"]:
            texts = ClassTexts(model, names, templates[0], **by)
            text.check_for("text_prompt", texts.width)
            prompts["text_prompt"] = text_start(texts, text.spec)
        else:
            texts = template_features(model, names, templates, **by)
        if image is not None:
            width = int(token_tower(model).conv1.out_channels) if image.on else 0
            image.check_for("image_prompt", width)
            if image.on:
                prompts["image_prompt"] = image.unstarted(width)
        if text is not None and not text.on:
            text.check_for("text_prompt", 0)
        if any(prompts.values()):
            return stage_clip(model, texts, **prompts)
        model.requires_grad_(False)
        module = PromptedCLIP(model, texts, None, None)
        return StagedNetwork(module, module.stages)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Images, grey ones as three equal channels, or features that were kept; and labels."""
        images, labels = super().split(batch)
        return coloured(images), labels

    def forward(self, inputs: Tensor) -> Tensor:
        """``(b, c)`` logits of images, grey or in colour."""
        self.check_inputs(inputs)
        logits: Tensor = self.clip(coloured(inputs))
        return logits

    def check_inputs(self, inputs: Any) -> None:
        """Refuse images of another size, and what are no images."""
        inputs = inputs["images"] if isinstance(inputs, dict) else inputs
        if not (self.clip.image_prompt is None and isinstance(inputs, Tensor) and inputs.dim() == 2):  # kept features
            check_clip_images(self.clip, inputs)

    def setup(self, stage: str) -> None:
        """Compare the data with the model, and refuse what training cannot use, before anything is computed."""
        super().setup(stage)
        trainer: Any = self.trainer
        data = trainer.datamodule
        classes = getattr(data, "num_classes", None)
        if isinstance(classes, int) and classes != self.num_classes:
            problem = f"and the data has {classes} classes."
            remedy = "Give a name for each class, in the order of the labels."
            raise SettingError("class_names", f"{self.num_classes} names", problem, remedy)
        if data is not None:
            check_image_data(self.clip, data)
        if stage == "fit" and self.strategy is None:
            remedy = "Write a strategy, for example EvolutionStrategies(), or search (CMA-ES)."
            raise SettingError("strategy", None, "is missing: training needs a strategy or a search.", remedy)
        if stage == "fit" and isinstance(self.strategy, CandidateSearch):
            check_search(trainer.callbacks, data)

    def configure_optimizers(self) -> Any:
        """Keep image features where no prompt moves them: the loaders are made next, and the device is known."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.keeps_features and isinstance(data, ImageDataModule):
            with self.trainer.precision_plugin.forward_context():
                keep_features(data, self.features_of)
        return super().configure_optimizers()

    @property
    def keeps_features(self) -> bool:
        """Whether an image has the same features at every step, and they are known here."""
        return self.clip.image_prompt is None and (self.scorer is None or self.clip.answer == "features")

    @torch.no_grad()
    def features_of(self, images: Tensor) -> Tensor:
        """``(b, e)`` unit features of images, for a task without an image prompt."""
        self.check_inputs(images)
        with self.network.evaluating():
            features: Tensor = self.network.run(coloured(images.to(self.device)), stop=len(self.network) - 1)
        if not bool(torch.isfinite(features).all()):
            raise LostQueriesError("The service gave no features of some images, which serve the whole run.")
        return features.cpu()

    @property
    def identity(self) -> dict[str, Any]:
        """What the prompts belong to, as plain values."""
        own = {name: self.hparams[name] for name in ("class_names", "template", "ensemble", "model_name")}
        return {**own, "weights": self.weights, **{name: described(p) for name, p in self._prompts().items()}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave CLIP's own weights out, and say which they are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = self.identity
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if not of_clip(n)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse prompts of other classes, texts or weights; take CLIP's weights as they are."""
        check_same_prompts(checkpoint.get(KEY), self.identity)
        kept = {name: value for name, value in self.state_dict().items() if of_clip(name)}
        checkpoint["state_dict"] = {**kept, **checkpoint["state_dict"]}
        super().on_load_checkpoint(checkpoint)

    @rank_zero_only
    def export_prompt(self, path: str | Path) -> None:
        """Write the tokens, class names and template as one safetensors file; docs/prompts.md shows how to read it.

        Tensors ``text_prompt`` ``(n, w)`` and ``image_prompt`` ``(n, w)``, each if it was trained; metadata
        ``class_names`` (JSON), ``template``, ``model_name`` and ``checkpoint``.
        """
        both = {"text_prompt": self.clip.text_prompt, "image_prompt": self.clip.image_prompt}
        about = {**{n: self.hparams[n] for n in ("class_names", "model_name", "checkpoint")}}
        about["template"] = self.hparams["template"][0]
        write_prompts(path, {name: prompt() for name, prompt in both.items() if prompt is not None}, about)

    def export_weights(self, path: str) -> None:
        """See :meth:`export_prompt`."""
        self.export_prompt(path)
