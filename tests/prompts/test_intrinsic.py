import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.prompts import IntrinsicPrompt, PromptSpec


@pytest.mark.parametrize(("coordinates", "shape"), [("flat", (6,)), ("by_token", (3, 6))])
def test_a_prompt_starts_at_p0_and_moves_along_w_row_by_row_too(coordinates, shape):
    start = torch.randn(3, 8)
    prompt = IntrinsicPrompt(start, PromptSpec(tokens=3, dim=6, coordinates=coordinates), std=0.5)
    assert torch.equal(prompt(), start)
    assert prompt.z.shape == shape
    rows = torch.randn(5, *shape)
    found = torch.func.functional_call(prompt, {"z": rows})
    assert found.shape == (5, 3, 8)
    for z, of_row in zip(rows, found, strict=True):
        torch.testing.assert_close(of_row, start + (z @ prompt.directions).view(3, 8))


def test_standard_normal_coordinates_move_tokens_as_far_as_they_are_apart():
    prompt = IntrinsicPrompt(torch.zeros(10, 64), PromptSpec(tokens=10, dim=500), std=0.02)
    moved = torch.func.functional_call(prompt, {"z": torch.randn(400, 500)})
    assert float(moved.std()) == pytest.approx(0.02, rel=0.02)


def test_w_is_frozen_in_the_checkpoint_and_made_from_the_seed():
    first, second, other = (IntrinsicPrompt(torch.zeros(2, 4), PromptSpec(2, 8, seed=s), std=1.0) for s in (0, 0, 1))
    assert torch.equal(first.directions, second.directions)
    assert not torch.equal(first.directions, other.directions)
    assert sorted(first.state_dict()) == ["directions", "start", "z"]
    assert [name for name, _ in first.named_parameters()] == ["z"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"tokens": 2, "dim": 9}, "prompt.dim = 9: is more than the 8 numbers of 2 tokens of width 4"),
        ({"tokens": 2, "dim": 5, "coordinates": "by_token"}, "prompt.dim = 5: is more than the 4 numbers of a token"),
        ({"tokens": 3, "dim": 5}, "prompt.tokens = 3: but the start has 2 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(SettingError, match=message):
        IntrinsicPrompt(torch.zeros(2, 4), PromptSpec(**spec), std=1.0)


def test_settings_are_checked():
    seeds = ({"seed": -1}, {"seed": 0.5}, {"seed": 2**31})
    for settings in ({"tokens": 0}, {"dim": 0}, {"coordinates": "both"}, {"init": "ones"}, *seeds):
        with pytest.raises(SettingError, match=f"prompt.{next(iter(settings))}"):
            PromptSpec(**settings)
    with pytest.raises(SettingError, match=r"prompt\.std"):
        IntrinsicPrompt(torch.zeros(2, 4), PromptSpec(2, 4), std=0.0)
