"""A classifier whose rows a service scores."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.prompts.intrinsic import IntrinsicPrompt
from flops_lightning.queries import row_losses
from flops_lightning.service import HttpScorer, Scorer, ServiceCLIP, ServiceSettings, service_text_start, stage_service
from flops_lightning.service.network import Answer
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.candidate_search import CandidateSearch
from flops_lightning.tasks.classifier import ClassifierModule
from flops_lightning.tasks.forward_module import Batch
from flops_lightning.tasks.prompt_settings import ImagePrompt, Pairing, TextPrompt
from flops_lightning.tasks.served_module import ServedModule


class ServedClassifier(ServedModule, ClassifierModule):
    """A :class:`ClassifierModule` whose network may be a :class:`ServiceCLIP`; without a service like any other."""

    service_settings: ServiceSettings | None

    def __init__(self, *, service: ServiceSettings | None = None, **settings: Any) -> None:
        """Check the settings.

        Args:
            service: A service that scores instead of a local model; see docs/service.md.
            **settings: ``max_queries`` (see :class:`ServedModule`), and those of :class:`ClassifierModule`.
        """
        super().__init__(**settings)
        given = None if service is None else read_settings(ServiceSettings, service, "service")
        self.service_settings = given
        self.save_hyperparameters({"service": given and asdict(given)})

    @property
    def scorer(self) -> Scorer | None:
        """Who scores, if the model is not here."""
        module = self.network.module
        return module.scorer if isinstance(module, ServiceCLIP) else None

    @property
    def of_losses(self) -> bool:
        """Whether the service returns losses alone, which leaves no predictions to count."""
        module = self.network.module
        return isinstance(module, ServiceCLIP) and module.answer == "losses"

    @property
    def tells_right(self) -> bool:
        """Unless the service returns losses alone."""
        return not self.of_losses

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Images and labels; where losses are asked for, the images with their labels."""
        images, labels = super().split(batch)
        return ({"images": images, "labels": labels} if self.of_losses else images), labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :meth:`ClassifierModule.loss`; the service's own losses where it returns them."""
        return outputs[:, 0] if self.of_losses else super().loss(outputs, targets)

    def setup(self, stage: str) -> None:
        """Refuse settings that do not work with a service, or only with one, before a step is paid."""
        super().setup(stage)
        for name, value in (("loss", self.loss_path), ("label_smoothing", self.label_smoothing)):
            if value and self.of_losses:
                raise SettingError(name, value, "has no effect: the service returns its own losses.", "Leave it out.")

    def step_rows(self, strategy: ForwardGradientStrategy, samples: int) -> int:
        """See :meth:`ServedModule.step_rows`."""
        module = cast("ServiceCLIP", self.network.module)
        apart = module.answer == "features"
        image = bool(not apart or module.image_prompt)  # whether images are encoded at all
        text = bool(apart and module.text_prompt)
        clean = samples * image + text
        if isinstance(strategy, CandidateSearch):
            return clean + strategy.search_settings.population * (samples * image + text)
        rows = clean
        for site in strategy.sites:
            draws = int(site.queries_per_sample * (1 if site.per_batch else samples))
            moves_image = not apart or "image_prompt.z" in site.parameters
            rows += draws * (moves_image + (text and "text_prompt.z" in site.parameters))
        return rows

    def validation_rows(self, samples: int) -> int:
        """See :meth:`ServedModule.validation_rows`; none where image features are kept."""
        module = cast("ServiceCLIP", self.network.module)
        apart = module.answer == "features"
        if apart and module.image_prompt is None:
            return 0
        return samples + (apart and module.text_prompt is not None)  # it has moved

    def log_batch(self, estimate: Estimate, targets: Tensor) -> None:
        """See :meth:`ClassifierModule.log_batch`; without predictions there is no accuracy."""
        if not self.of_losses:
            super().log_batch(estimate, targets)
            return
        super(ClassifierModule, self).log_batch(estimate, targets)

    def _evaluate(self, batch: Batch, metrics: MetricCollection, own: int | None = None) -> None:
        if not self.of_losses:
            super()._evaluate(batch, metrics, own)
            return
        inputs, labels = self.split(batch)
        name = "val/loss" if metrics is self.val_metrics else "test/loss"
        self.log(name, row_losses(self.loss, self(inputs), labels).mean(), batch_size=len(labels))


def served_network(
    service: ServiceSettings, names: Sequence[str], templates: Sequence[str], pairing: Pairing | None, *,
    text: TextPrompt | None, image: ImagePrompt | None, doubled_names: bool,
) -> tuple[StagedNetwork, str]:  # fmt: skip
    """The network of a service with prompts, and by what a checkpoint knows the model.

    Raises:
        SettingError: a pairing for which the service's answers are too few, or prompts that it does not take.
    """
    if len(templates) > 1:
        problem = "are several templates, but a service encodes only one."
        raise SettingError("template", tuple(templates[:2]), problem, "Give one, and write ensemble: false.")
    named = {name: value for name, value in vars(service).items() if name != "url"}
    scorer = HttpScorer(service.url, names, templates[0], doubled_names=doubled_names, **named)
    prompts: dict[str, IntrinsicPrompt | None] = {"text_prompt": None, "image_prompt": None}
    if text is not None:
        text.check_for("text_prompt", scorer.info.text_width)
        prompts["text_prompt"] = service_text_start(scorer, text.spec) if text.on else None
    if image is not None:
        width = scorer.info.image_width
        if image.on and not width:
            problem = "takes no image prompt at this service."
            raise SettingError("image_prompt", scorer.info.model, problem, "Write image_prompt: null.")
        image.check_for("image_prompt", width)
        if image.on:
            prompts["image_prompt"] = image.unstarted(width)
    rank_zero_info(f"service: {service.url} is {scorer.info.model}, {', '.join(scorer.info.answers)}")
    answer = _answer(scorer, pairing, both=all(prompts.values()))
    if not any(prompts.values()):
        module = ServiceCLIP(scorer, answer, None, None)
        return StagedNetwork(module, module.stages), f"service {scorer.info.model}"
    return stage_service(scorer, answer=answer, **prompts), f"service {scorer.info.model}"


def _answer(scorer: Scorer, pairing: Pairing | None, *, both: bool) -> Answer:
    """What to ask for: features where prompts are moved apart, else what takes the fewest bytes."""
    given = scorer.info.answers
    if "features" in given and (pairing != "joint" or not both):
        return "features"
    if both and pairing != "joint":
        problem = f"needs separate features of texts and images, but the service returns {', '.join(given)}."
        raise SettingError("pairing", pairing or "split", problem, "Write pairing: joint.")
    in_turn: tuple[Answer, ...] = ("logits", "features", "losses")
    return next(each for each in in_turn if each in given)


def check_source(model_name: str, checkpoint: str, service: ServiceSettings | None) -> None:
    """Raise a :class:`SettingError` unless the model is either here or at a service."""
    if service is None and not model_name:
        remedy = "Give a model of open_clip, or service: {url: ...}."
        raise SettingError("model_name", model_name, "names no model, and there is no service.", remedy)
    for name, value in (("model_name", model_name), ("checkpoint", checkpoint)):
        if service is not None and value:
            raise SettingError(name, value, "has no effect: the model is at the service.", "Leave it out.")
