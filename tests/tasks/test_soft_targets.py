"""Targets that are probabilities: losses, gradients, trace predictors and accuracy against what is written by hand."""

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.objectives import cross_entropy, most_probable, zero_one_error
from flops_lightning.strategies import Backprop, LikelihoodRatio
from tests.reference.networks import bound, estimated, tiny_vit


def soft(rows: int, classes: int) -> Tensor:
    return torch.rand(rows, classes, dtype=torch.float64).softmax(1)


def expected_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -(((1 - smoothing) * targets + smoothing / logits.shape[1]) * log_p).sum(1)


def test_cross_entropy_is_the_mean_under_the_targets():
    logits, targets = torch.randn(5, 3, dtype=torch.float64), soft(5, 3)
    torch.testing.assert_close(cross_entropy(logits, targets), expected_losses(logits, targets))
    labels = torch.tensor([2, 0, 1, 1, 2])
    one_hot = nn.functional.one_hot(labels, 3).double()
    torch.testing.assert_close(cross_entropy(logits, one_hot), cross_entropy(logits, labels))


def test_the_tasks_loss_smooths_them(make_task):
    logits, targets = torch.randn(5, 10, dtype=torch.float64), soft(5, 10)
    torch.testing.assert_close(
        make_task(label_smoothing=0.2).loss(logits, targets), expected_losses(logits, targets, 0.2)
    )


def test_the_most_probable_class_stands_for_the_target():
    assert most_probable(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]])).tolist() == [1, 0]
    labels = torch.tensor([2, 0])
    assert most_probable(labels) is labels


def test_zero_one_error_refuses_them():
    with pytest.raises(SettingError, match=r"loss = .*zero_one_error.* probabilities\. Write data\.mixup_alpha: 0 and"):
        zero_one_error(torch.randn(4, 3), soft(4, 3))


def test_the_exact_head_and_the_predictors_are_those_of_p_minus_y(images):
    vit, x, targets = tiny_vit(), images[0], soft(4, 5)
    sites = [{"stages": ["embed", "blocks.2"]}, {"stages": ["pool", "head"], "name": "head"}]
    strategy: LikelihoodRatio = bound(vit, cross_entropy, sites, exact_head=True)
    clean = strategy.clean_pass(x, targets)
    error = clean.output.softmax(1) - targets
    predicted = strategy.sample_statistics(clean, frozenset({"predictors.output_gradient"})).predictors
    torch.testing.assert_close(predicted["output_gradient"], error.square().sum(1))
    _, gradients = estimated(strategy, x, targets)
    features = []
    handle = vit.head.register_forward_hook(lambda _, args, __: features.append(args[0]))
    with torch.no_grad():
        vit(x)
    handle.remove()
    torch.testing.assert_close(gradients["head.weight"], error.T @ features[0] / 4)
    torch.testing.assert_close(gradients["head.bias"], error.mean(0))


@pytest.mark.parametrize("strategy", [Backprop(), None])
def test_training_on_mixed_images_logs_the_loss_and_the_accuracy_of_the_larger_share(strategy, make_task, make_trainer):
    settings = {} if strategy is None else {"strategy": strategy}
    task, trainer = make_task(**settings), make_trainer(limit_train_batches=1, limit_val_batches=0)
    data = DigitsDataModule(batch_size=128, mixup_alpha=0.5)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = task.eval()(images)
    task.train()
    trainer.fit(task, datamodule=data)
    accuracy = (logits.argmax(1) == targets.argmax(1)).float().mean().item()
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    loss = expected_losses(logits.double(), targets.double()).mean().item()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss, rel=1e-5)
