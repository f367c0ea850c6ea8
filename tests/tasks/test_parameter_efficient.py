"""What each target trains, and that what it adds folds into plain timm weights."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flops_lightning.cli.command import build
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop, LikelihoodRatio
from flops_lightning.tasks import ForwardImageClassifier, OptimizerSettings, TargetSettings
from flops_lightning.tasks.parameter_efficient import PROMPT, VisualPrompt, apply_target, plain_weights
from tests.digits import MODEL
from tests.reference.networks import autograd_gradient, bound, cross_entropy, gradients, shaken, squared_error, tiny_vit
from tests.reference.smoothed import assert_unbiased, estimates, true_gradients

ROOT = Path(__file__).parents[2]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
KINDS = ["bias", "norm", "head", pytest.param("lora", marks=needs_peft), "visual_prompt"]
ADAPTED = ("attn.qkv", "attn.proj")


def made(kind: str, **settings: Any) -> nn.Module:
    """A float64 ViT with a target, every parameter moved from special values such as LoRA's zeros."""
    vit = tiny_vit(**settings.pop("vit", {}))
    apply_target(vit, TargetSettings(kind=kind, **settings))
    return shaken(vit)


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval()(x)


BLOCKS = range(3)
HEAD_PARAMETERS = {"head.weight", "head.bias"}
PER_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
BIASES = {f"blocks.{i}.{name}.bias" for i in BLOCKS for name in PER_BLOCK} | {"patch_embed.proj.bias", "norm.bias"}
NORMS = [
    "norm_pre",
    "norm",
    *(f"blocks.{i}.{n}" for i in BLOCKS for n in ("norm1", "norm2", "attn.q_norm", "attn.k_norm")),
]


def additions(layers: list[str]) -> set[str]:
    return {f"{name}.lora_{part}.default.weight" for name in layers for part in "AB"}


class TestWhatLearns:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"kind": "all"}, {name for name, _ in tiny_vit().named_parameters()}),
            ({"kind": "all", "head": False}, {name for name, _ in tiny_vit().named_parameters()} - HEAD_PARAMETERS),
            ({"kind": "bias"}, BIASES | HEAD_PARAMETERS),
            ({"kind": "bias", "head": False}, BIASES),
            (
                {"kind": "norm", "vit": {"pre_norm": True, "qk_norm": True}},
                {f"{name}.{leaf}" for name in NORMS for leaf in ("weight", "bias")} | HEAD_PARAMETERS,
            ),
            ({"kind": "head"}, HEAD_PARAMETERS),
            ({"kind": "visual_prompt", "tokens": 3}, {PROMPT} | HEAD_PARAMETERS),
            pytest.param(
                {"kind": "lora", "rank": 2},
                additions([f"blocks.{i}.{name}" for i in BLOCKS for name in ADAPTED]) | HEAD_PARAMETERS,
                marks=needs_peft,
            ),
            pytest.param(
                {"kind": "lora", "modules": ["blocks.2.mlp.*", "patch_embed.*"], "head": False},
                additions(["patch_embed.proj", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2"]),
                marks=needs_peft,
            ),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
    )
    def test_these_parameters_and_no_others(self, settings, expected):
        assert trained(made(**settings)) == expected


class TestStart:
    @needs_peft
    def test_low_rank_additions_have_the_rank_and_start_as_nothing(self, images):
        vit = tiny_vit()
        before = outputs(vit, images[0])
        apply_target(vit, TargetSettings(kind="lora", rank=2))
        assert torch.equal(outputs(vit, images[0]), before)
        assert vit.get_parameter("blocks.1.attn.qkv.lora_A.default.weight").shape == (2, 16)
        assert vit.get_parameter("blocks.1.attn.qkv.lora_B.default.weight").shape == (48, 2)

    def test_prompts_stand_between_class_token_and_patches(self):
        module = VisualPrompt(nn.Identity(), tokens=2, prefix=1, width=3, std=1.0)
        x = torch.randn(4, 6, 3)
        out = module(x)
        assert torch.equal(out[:, :1], x[:, :1])
        assert torch.equal(out[:, 3:], x[:, 1:])
        assert all(torch.equal(each, module.tokens[0]) for each in out[:, 1:3])

    def test_prompts_have_the_width_of_glorot_s_rule(self):
        vit = tiny_vit(embed_dim=64)
        apply_target(vit, TargetSettings(kind="visual_prompt", tokens=200))
        expected = (2 / (16 + 64)) ** 0.5
        error = expected / (2 * 200 * 64) ** 0.5
        assert float(vit.get_parameter(PROMPT).detach().std()) == pytest.approx(expected, abs=4 * error)


POOLINGS = [
    {},
    {"global_pool": "avg"},
    {"global_pool": "max", "pre_norm": True},
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "map", "reg_tokens": 2},
    {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
    {"pos_embed": "none", "pre_norm": True, "reg_tokens": 1},
]


class TestPlainWeights:
    @pytest.mark.parametrize("settings", POOLINGS, ids=str)
    def test_prompts_are_timm_s_register_tokens(self, settings, images):
        vit = made("visual_prompt", tokens=3, vit=settings)
        plain = tiny_vit(**{**settings, "reg_tokens": settings.get("reg_tokens", 0) + 3})
        plain.load_state_dict(plain_weights(vit))
        torch.testing.assert_close(outputs(plain, images[0]), outputs(vit, images[0]))
        # The stages agree with the network, and so do the tokens that the pooling is said to read.
        staged = stage_network(vit)
        torch.testing.assert_close(staged.run(images[0]), outputs(vit, images[0]))
        assert staged.stages[-2].reads == stage_network(plain).stages[-2].reads

    @needs_peft
    def test_low_rank_additions_merge(self, images):
        vit = made("lora", modules=["patch_embed.proj", "blocks.*.attn.*", "blocks.*.mlp.*"], alpha=3.0)
        before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        plain = tiny_vit()
        untouched = outputs(plain, images[0])
        plain.load_state_dict(plain_weights(vit))
        torch.testing.assert_close(outputs(plain, images[0]), outputs(vit, images[0]))
        assert not torch.allclose(outputs(plain, images[0]), untouched)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


LAYOUTS = {"group": [{"stages": ["2", "3"]}], "linear": [{"stages": ["2"], "kind": "linear"}]}


class TestLearning:
    @staticmethod
    def check(
        module: nn.Module, sites: list[dict[str, Any]], tokens: tuple[Tensor, Tensor], *, draws: int = 150
    ) -> set[str]:
        """Compare the estimates of all sites with autograd; the names of the parameters that they own."""
        strategy = bound(module, squared_error, [{**site, "sigma": 0.2} for site in sites], chunk_rows=1000)
        problem = tokens[0], tokens[1] + 6  # far from what the network says, so that the gradient is steep
        truth = true_gradients(strategy, *problem)
        for site, estimate in estimates(strategy, *problem, torch.tensor([500, 900, 500, 300]), draws=draws).items():
            assert_unbiased(estimate, truth[site])
        return {name for site in strategy.sites for name in site.parameters}

    @pytest.mark.slow
    @needs_peft
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_both_kinds_of_site_train_low_rank_additions(self, layout, tokens_net, tokens):
        apply_target(tokens_net, TargetSettings(kind="lora", rank=2, modules=["2"]))
        shaken(tokens_net, scale=0.5)
        owned = self.check(tokens_net, LAYOUTS[layout], tokens)
        assert owned == {"2.lora_A.default.weight", "2.lora_B.default.weight"}

    @pytest.mark.slow
    def test_a_block_site_trains_prompts(self, tokens_net, tokens):
        prompt = VisualPrompt(nn.Identity(), tokens=2, prefix=1, width=3, std=1.0)
        net = shaken(nn.Sequential(prompt, *tokens_net))
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name == "0.tokens")
        assert self.check(net, [{"stages": ["0"]}], tokens) == {"0.tokens"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_backprop_gives_gradients_to_what_learns(self, kind, images):
        vit = made(kind)
        strategy = Backprop()
        strategy.bind(stage_network(vit), cross_entropy)
        strategy.estimate(strategy.clean_pass(*images))
        found, expected = gradients(vit), autograd_gradient(vit, cross_entropy, *images)
        assert {name for name, gradient in found.items() if gradient is not None} == trained(vit)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def parameters(task: ForwardImageClassifier) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task.backbone.named_parameters()}


class TestTask:
    @pytest.mark.parametrize("kind", KINDS)
    def test_only_the_target_moves_and_the_checkpoint_comes_back(self, make_task, make_trainer, digits, tmp_path, kind):
        settings = {"target": TargetSettings(kind=kind), "optimizer": OptimizerSettings(lr=0.01)}
        task = make_task(strategy=LikelihoodRatio(seed=0), **settings)
        before, learns = parameters(task), trained(task.backbone)
        trainer = make_trainer()
        trainer.fit(task, digits)
        assert {name for name, p in parameters(task).items() if not torch.equal(p, before[name])} == learns
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        loaded = ForwardImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert loaded.target_settings == task.target_settings
        assert trained(loaded.backbone) == learns
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(outputs(loaded, x), outputs(task, x))

    @pytest.mark.parametrize("kind", KINDS)
    def test_start_weights_in_and_plain_weights_out(self, make_task, tmp_path, kind):
        plain = make_task(strategy=None)
        plain.export_weights(str(tmp_path / "start.safetensors"))
        start = {"checkpoint": str(tmp_path / "start.safetensors"), "strategy": None}
        task = make_task(**start, target={"kind": kind})
        kept = {name: task.backbone.get_parameter(name) for name in ("cls_token", "head.weight", "norm.weight")}
        assert all(torch.equal(p, plain.backbone.get_parameter(name)) for name, p in kept.items())
        for parameter in task.network.trainable().values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        file = tmp_path / "end.safetensors"
        task.export_weights(str(file))
        more = {"reg_tokens": 8} if kind == "visual_prompt" else {}
        timm_model = timm.create_model(MODEL["model_name"], num_classes=10, **MODEL["model_kwargs"], **more)
        timm_model.load_state_dict(load_file(file))
        again = make_task(strategy=None, checkpoint=str(file), model_kwargs={**MODEL["model_kwargs"], **more})
        x = torch.randn(3, 1, 8, 8)
        expected = outputs(task, x)
        torch.testing.assert_close(outputs(timm_model, x), expected)
        torch.testing.assert_close(outputs(again, x), expected)

    def test_freeze_takes_away(self, make_task):
        task = make_task(target=TargetSettings(kind="bias"), freeze=["blocks.*", "head.*"], strategy=None)
        assert trained(task.backbone) == {"patch_embed.proj.bias", "norm.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_overlay_trains_as_many_parameters_as_it_says(kind, monkeypatch):
    monkeypatch.chdir(ROOT)
    overlay = Path("configs/targets") / f"{kind}.yaml"
    task = build(["--config", "configs/vit_tiny_digits.yaml", "--config", str(overlay)]).model
    (said,) = re.findall(r"expect: +([\d,]+) .*parameters are trained", overlay.read_text())
    assert sum(p.numel() for p in task.network.trainable().values()) == int(said.replace(",", ""))
    assert {name for site in task.strategy.sites for name in site.parameters} == trained(task.backbone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "adapter"}, "target.kind = 'adapter': is not one of the choices. Choose from all, bias,"),
        ({"kind": "head", "head": False}, "target.head = False: leaves nothing to train"),
        ({"kind": "bias", "rank": 2}, "target.rank = 2: has no effect with kind: bias. Remove it"),
        ({"kind": "visual_prompt", "alpha": 2.0}, "target.alpha = 2.0: has no effect with kind: visual_prompt"),
        ({"kind": "norm", "modules": ["*"]}, r"target.modules = \['\*'\]: has no effect with kind: norm"),
        ({"kind": "lora", "tokens": 3}, "target.tokens = 3: has no effect with kind: lora"),
        ({"kind": "lora", "rank": 0}, "target.rank = 0: must be a positive integer. Write, for example, 4"),
        ({"kind": "lora", "alpha": 0.0}, "target.alpha = 0.0: must be a number above 0"),
        ({"kind": "lora", "modules": []}, "target.modules = .*: must be a list of patterns"),
        ({"kind": "lora", "modules": "blocks.*"}, "target.modules = .*: must be a list of patterns"),
        ({"kind": "visual_prompt", "tokens": 0}, "target.tokens = 0: must be a positive integer"),
        ({"kinds": "bias"}, "target = .*has no setting 'kinds'.*Choose from kind"),
        *(
            pytest.param({"kind": "lora", **settings}, message, marks=needs_peft)
            for settings, message in [
                ({"modules": ["blocks.9.*"]}, r"target.modules = 'blocks.9.\*': matches no linear .*patch_embed.proj"),
                ({"modules": ["head"]}, "target.modules = 'head': matches no linear or convolution module outside"),
                ({"rank": 17}, "target.rank = 17: blocks.0.attn.qkv has no more than rank 16. Write 16 or less"),
            ]
        ),
    ],
)
def test_bad_settings_name_themselves_and_the_remedy(settings, message):
    with pytest.raises(SettingError, match=message):
        ForwardImageClassifier(**MODEL, target=settings)


def test_what_leaves_nothing_to_train_or_cannot_be_added_is_refused(make_task, monkeypatch):
    with pytest.raises(SettingError, match=r"freeze = .*leaves nothing of target.kind = 'visual_prompt'.*freeze: \[\]"):
        make_task(target=TargetSettings(kind="visual_prompt"), freeze=["norm_pre.*"], strategy=None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingError, match=r'target.kind = .lora.: needs the package peft .* -e "\.\[peft\]"'):
        ForwardImageClassifier(**MODEL, target=TargetSettings(kind="lora"))
    with pytest.raises(SettingError, match=r"target.kind = 'visual_prompt': .*dynamic_img_size out"):
        apply_target(tiny_vit(dynamic_img_size=True), TargetSettings(kind="visual_prompt"))
    vit = tiny_vit(qkv_bias=False, norm_layer=nn.Identity)
    with pytest.raises(SettingError, match=r"target.kind = 'norm': VisionTransformer has no such parameters"):
        apply_target(vit, TargetSettings(kind="norm"))
    with pytest.raises(SettingError, match=r"target.kind = 'visual_prompt': ResNet is not a ViT"):
        apply_target(timm.create_model("resnet18"), TargetSettings(kind="visual_prompt"))


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=needs_peft), "visual_prompt"])
def test_a_run_with_additions_is_no_start_for_a_plain_network(make_task, tmp_path, kind):
    task = make_task(target=TargetSettings(kind=kind), strategy=None)
    torch.save({"state_dict": task.state_dict()}, tmp_path / "run.ckpt")
    with pytest.raises(SettingError, match=r"checkpoint = .*stores them separately.*Give that run's model.safetensors"):
        make_task(checkpoint=str(tmp_path / "run.ckpt"), strategy=None)
