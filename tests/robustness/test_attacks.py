"""FGSM, I-FGSM and MI-FGSM: against torchattacks, by hand, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.robustness import AttackSettings, PixelModel, iterated_fgsm
from flops_lightning.robustness.attacks import loss_slope

EPS = 8 / 255


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 5))
    return PixelModel(network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def oracle(name: str, model: nn.Module) -> Any:
    attacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")
    iterated = {"eps": EPS, "alpha": EPS / 5, "steps": 5}
    made = {
        "fgsm": lambda: attacks.FGSM(model, eps=EPS),
        "i_fgsm": lambda: attacks.BIM(model, **iterated),
        "mi_fgsm": lambda: attacks.MIFGSM(model, decay=1.0, **iterated),
    }
    return made[name]()


@pytest.mark.parametrize("name", ["fgsm", "i_fgsm", "mi_fgsm"])
def test_the_images_are_those_of_torchattacks(name: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    own = AttackSettings(name, eps=EPS).run(model, *batch)
    assert float((own - oracle(name, model)(*batch)).abs().max()) < 1e-7
    assert float((own - batch[0]).abs().max()) > 0.9 * EPS


def test_momentum_by_hand_on_one_pixel() -> None:
    """A loss whose slope turns: without momentum the pixel turns back, with enough of it the pixel goes on."""

    def logits(pixels: Tensor) -> Tensor:  # the loss of class 0 grows up to 0.52, then falls
        other = -((pixels.flatten(1) - 0.52) ** 2)
        return torch.cat([torch.zeros_like(other), other], dim=1)

    start, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    for momentum, end in ((0.0, 0.50), (1.0, 0.53), (1.5, 0.56)):  # up, then the slope is -1: down, nowhere, up
        moved = iterated_fgsm(logits, start, label, eps=0.1, steps=2, step_size=0.03, momentum=momentum)
        assert float(moved) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "i_fgsm", "mi_fgsm"])
def test_images_stay_within_eps_and_the_range_and_the_loss_grows(name, model, batch) -> None:
    pixels, labels = batch[0].round(decimals=1), batch[1]  # some at the ends of the range
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = AttackSettings(name, eps=EPS).run(model, pixels, labels)
    assert float((moved - pixels).abs().max()) <= EPS + 1e-7
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    losses = [nn.functional.cross_entropy(model(x), labels, reduction="none") for x in (pixels, moved)]
    assert bool((losses[1] > losses[0]).all())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_step_of_the_iterated_attacks_is_fgsm(model, batch) -> None:
    once = AttackSettings("fgsm", eps=EPS).run(model, *batch)
    for name in ("i_fgsm", "mi_fgsm"):
        assert torch.equal(AttackSettings(name, eps=EPS, steps=1).run(model, *batch), once)


def test_attacks_may_share_their_first_derivative(model, batch) -> None:
    attack = AttackSettings("mi_fgsm", eps=EPS)
    assert torch.equal(attack.run(model, *batch, slope=loss_slope(model, *batch)), attack.run(model, *batch))


def test_an_image_whose_gradient_is_zero_stays_as_it_is(batch) -> None:
    def constant(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :2] * 0

    assert torch.equal(AttackSettings("mi_fgsm").run(constant, batch[0], batch[1] % 2), batch[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "pgd"}, "name = 'pgd': is not one of the choices. Choose from fgsm, i_fgsm, mi_fgsm."),
        ({"name": "fgsm", "eps": 8}, "eps = 8: is read as a share of .* Write 0.0314 \\(8/255\\)"),
        ({"name": "fgsm", "eps": 300}, "eps = 300: is read .* Write a share of the range"),
        ({"name": "fgsm", "eps": -0.1}, "eps = -0.1: must be a number above 0.*0.0314 \\(8/255\\)"),
        ({"name": "fgsm", "steps": 5}, "steps = 5: fgsm has no such setting. Remove it, or choose i_fgsm"),
        ({"name": "i_fgsm", "momentum": 1.0}, "momentum = 1.0: i_fgsm has no such .* choose mi_fgsm"),
        ({"name": "i_fgsm", "steps": 0}, "steps = 0: must be a whole number, 1 or more"),
        ({"name": "mi_fgsm", "step_size": 0.1}, "step_size = 0.1: is larger than eps = 0.03137"),
        ({"name": "mi_fgsm", "momentum": -1.0}, "momentum = -1.0: must be 0 or more"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        AttackSettings(**settings).check()


def test_normalised_images_are_refused(model, batch) -> None:
    with pytest.raises(SettingError, match=r"^pixels = '-2 to 2': pixels must lie in \[0, 1\]"):
        iterated_fgsm(model, batch[0] * 4 - 2, batch[1], eps=EPS)
    with pytest.raises(SettingError, match=r"torch.uint8.*pixels must be floats"):
        iterated_fgsm(model, batch[0].byte(), batch[1], eps=EPS)
