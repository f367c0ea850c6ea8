import torch
from torch import Tensor, nn

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop
from tests.reference.networks import Loss, autograd_gradient, cross_entropy, freeze, gradients, squared_error


def bound_backprop(module: nn.Module, loss: Loss) -> Backprop:
    strategy = Backprop()
    strategy.bind(stage_network(module), loss)
    return strategy


def test_it_is_autograd_s_gradient(vit: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    freeze(vit, "cls_token", "blocks.1.norm1.weight")
    strategy = bound_backprop(vit, cross_entropy)
    estimate = strategy.estimate(strategy.clean_pass(*images), sites=strategy.update_groups[0])
    found = gradients(vit)
    expected = autograd_gradient(vit, cross_entropy, *images)
    assert {name for name, gradient in found.items() if gradient is not None} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    torch.testing.assert_close(estimate.loss, cross_entropy(vit(images[0]), images[1]).detach())
    assert (estimate.queries, estimate.lost, estimate.lost_batch, estimate.loss.requires_grad) == (0, 0, False, False)


def test_dropout_is_off_and_modes_come_back(tokens_net: nn.Sequential, tokens: tuple[Tensor, Tensor]) -> None:
    expected = autograd_gradient(tokens_net, squared_error, *tokens)
    tokens_net[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    tokens_net.train()
    tokens_net[3].eval()
    strategy = bound_backprop(tokens_net, squared_error)
    with torch.no_grad():  # as a callback may call it
        clean = strategy.clean_pass(*tokens)
    strategy.estimate(clean)
    assert [child.training for child in tokens_net] == [True, True, True, False, True]
    for name, gradient in gradients(tokens_net).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_parameter_that_does_not_matter_gets_zeros(tokens: tuple[Tensor, Tensor]) -> None:
    class Idle(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(Idle(3, 3), nn.Flatten(), nn.Linear(9, 2)).double()
    strategy = bound_backprop(net, squared_error)
    strategy.estimate(strategy.clean_pass(*tokens))
    assert not net[0].weight.grad.any()


def test_what_it_pays(tokens_net: nn.Sequential, tokens: tuple[Tensor, Tensor]) -> None:
    """One forward pass of each sample and a backward pass that costs two."""
    strategy = bound_backprop(tokens_net, squared_error)
    for _ in range(3):
        strategy.estimate(strategy.clean_pass(*tokens))
    total = strategy.meter.total()
    assert (total.queries, total.clean_passes, total.forward_equivalents) == (0, 12, 36.0)
    state = strategy.state_dict()
    other = Backprop()
    other.load_state_dict(state)
    assert (other.draw, other.meter.total()) == (3, total)
