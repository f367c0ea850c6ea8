"""A classifier whose rows a service scores: what it pays, where it stops, and what it goes on from."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection

from flops_lightning.distributed import gather_plain, present_communicator
from flops_lightning.errors import LostQueriesError, SettingError, SpentQueriesError, check_whole
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.prompts.intrinsic import IntrinsicPrompt
from flops_lightning.queries import row_losses
from flops_lightning.resume.signals import save_last
from flops_lightning.service import HttpScorer, Scorer, ServiceCLIP, ServiceSettings, service_text_start, stage_service
from flops_lightning.service.network import Answer
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.candidate_search import CandidateSearch
from flops_lightning.tasks.classifier import ClassifierModule
from flops_lightning.tasks.forward_module import Batch
from flops_lightning.tasks.prompt_settings import ImagePrompt, Pairing, TextPrompt

KEY = "service"
"""Where a checkpoint keeps what the run has asked for."""


class ServedClassifier(ClassifierModule):
    """A :class:`ClassifierModule` whose network may be a :class:`ServiceCLIP`; as any other one without.

    Logs ``service/calls``, ``service/rows`` and so on (see :class:`Usage`), in all of the run's parts together.
    """

    service_settings: ServiceSettings | None

    def __init__(self, *, service: ServiceSettings | None = None, max_queries: int = 0, **settings: Any) -> None:
        """Check the settings.

        Args:
            service: A service that scores in the place of a model here; see docs/service.md.
            max_queries: Rows of the service, those of validation and of all processes included, before which the run
                stops with a checkpoint to go on from; 0: no limit.
            **settings: See :class:`ClassifierModule`.
        """
        super().__init__(**settings)
        check_whole("max_queries", max_queries, 0, "Write 0 for no limit.")
        given = None if service is None else read_settings(ServiceSettings, service, "service")
        self.service_settings = given
        self.save_hyperparameters({"service": given and asdict(given), "max_queries": max_queries})
        self.max_queries, self._last, self._most = max_queries, 0, 0
        self._given_up: LostQueriesError | None = None

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

    def asked(self) -> dict[str, Any]:
        """What all processes have asked for together, by the names of :class:`Usage`; every process must call this."""
        own = {} if self.scorer is None else self.scorer.usage.state_dict()
        of_each = gather_plain(present_communicator(), own, device=self.device)
        return {name: sum(each[name] for each in of_each) for name in own}

    @property
    def tells_right(self) -> bool:
        """Unless the service returns losses alone."""
        return not self.of_losses

    def report(self) -> dict[str, Any]:
        """See :meth:`ForwardModule.report`; with a service ``service``, what was asked of it."""
        return {**super().report(), **({"service": asked} if (asked := self.asked()) else {})}

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
        if self.scorer is None:
            if self.max_queries:
                problem = "counts rows of a service, and there is none."
                raise SettingError("max_queries", self.max_queries, problem, "Write spend: {queries: ...}.")
            return
        for name, value in (("loss", self.loss_path), ("label_smoothing", self.label_smoothing)):
            if value and self.of_losses:
                raise SettingError(name, value, "has no effect: the service returns its own losses.", "Leave it out.")
        if stage == "fit" and self.max_queries and self.strategy is not None:
            samples = int(getattr(self.trainer.datamodule, "batch_size", 0) or 1)  # type: ignore[attr-defined]
            ranks = self.trainer.world_size
            rows = self.step_rows(self.strategy, max(1, samples // ranks)) * ranks
            if rows > self.max_queries:
                problem = f"is below one step, which takes {rows}."
                raise SettingError("max_queries", self.max_queries, problem, f"Write {rows} or more.")

    def step_rows(self, strategy: ForwardGradientStrategy, samples: int) -> int:
        """Rows that a step with so many samples asks for, where every sample has its equal share of the budget."""
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """See :meth:`ForwardModule.training_step`; where too many steps in a row were lost, it ends with this one."""
        scorer = self.scorer
        if scorer is None:
            return super().training_step(batch, batch_idx)
        # One of several processes would stop by itself, and the others wait for it: they agree after the step.
        before, scorer.max_queries = scorer.usage.rows, self.max_queries if self.trainer.world_size == 1 else 0
        try:
            loss = super().training_step(batch, batch_idx)
        except LostQueriesError as error:
            self._given_up, loss = error, torch.tensor(torch.nan)
        finally:
            scorer.max_queries = 0
        self._last = scorer.usage.rows - before
        named = {f"service/{name}": float(value) for name, value in scorer.usage.state_dict().items()}
        self.log_dict(named, sync_dist=self.trainer.world_size > 1, reduce_fx="sum")
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and leave if the service has answered nothing for too long, or the next step would ask for too much."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        scorer, strategy = self.scorer, self.strategy
        if scorer is None or strategy is None:
            return
        if self._given_up is not None:
            given_up, self._given_up = self._given_up, None
            path = save_last(self.trainer)
            raise LostQueriesError(f"{given_up} Saved {path}: --ckpt_path {path} goes on when the service answers.")
        if self.max_queries and not self._finished():
            usual = self.step_rows(strategy, len(batch[1]))
            spent, last, usual = self._sums(scorer.usage.rows, self._last, usual)
            self._most = max(self._most, last)
            self._stop_before(spent, max(self._most, usual))

    def on_validation_start(self) -> None:
        """Do not begin a validation that would ask for too much; the run that goes on makes it up."""
        super().on_validation_start()
        scorer, trainer = self.scorer, cast("Any", self.trainer)
        module = self.network.module
        if scorer is None or not self.max_queries or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if module.answer != "features" or module.image_prompt is not None:
            loaders = trainer.val_dataloaders
            text = module.answer == "features" and module.text_prompt is not None  # it has moved
            images = -(-len(getattr(loaders, "dataset", ())) // trainer.world_size)
            self._stop_before(*self._sums(scorer.usage.rows, images + text))

    def _sums(self, *numbers: int) -> list[int]:
        """Over all processes, each of which must call this."""
        found: list[int] = present_communicator().sum(torch.tensor(numbers, device=self.device)).tolist()
        return found

    def _stop_before(self, spent: int, rows: int) -> None:
        if spent + rows > self.max_queries:
            raise SpentQueriesError(spent, rows, self.max_queries, save_last(self.trainer))

    def _finished(self) -> bool:
        """Whether the step that ends was the run's last."""
        trainer = cast("Any", self.trainer)
        steps, epochs = trainer.max_steps, trainer.max_epochs
        last = trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
        return bool(trainer.should_stop or last or 0 <= steps <= trainer.global_step)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what all processes have asked of the service."""
        super().on_save_checkpoint(checkpoint)
        if self.scorer is not None:
            checkpoint[KEY] = self.asked()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from there, where training is resumed."""
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer
        first = present_communicator().rank == 0  # of several processes one goes on with the count of all
        if self.scorer is not None and trainer is not None and trainer.state.fn == "fit" and first:
            self.scorer.usage.add(**checkpoint.get(KEY, {}))  # beside the calls of this process, such as /info


def served_network(
    service: ServiceSettings, names: Sequence[str], templates: Sequence[str], pairing: Pairing | None, *,
    text: TextPrompt | None, image: ImagePrompt | None, doubled_names: bool,
) -> tuple[StagedNetwork, str]:  # fmt: skip
    """The network of a service with prompts, and by what a checkpoint knows the model.

    Raises:
        SettingError: a pairing for which the service's answers are too few, or prompts that it does not take.
    """
    if len(templates) > 1:
        problem = "are several, and a service encodes one."
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
        problem = f"needs the features of texts and images apart, and the service gives {', '.join(given)}."
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
