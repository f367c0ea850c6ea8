import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.prompts import ClassTexts, class_features
from flops_lightning.prompts.class_texts import template_features
from tests.reference.clip import NAMES, open_clip, padded_features, tiny_clip

WORDS = 4  # "a photo of a"
TEMPLATE = "a photo of a {}."


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("prompts", [1, 5])
@torch.no_grad()
def test_the_tree_equals_one_padded_sequence_for_each_of_all_imagenet_classes(kind, prompts):
    clip, names = tiny_clip(kind), open_clip.IMAGENET_CLASSNAMES
    texts = ClassTexts(clip, names, TEMPLATE, doubled_names=True)
    drawn = torch.randn(prompts, 6, 16)
    found = texts.encode(drawn)
    assert found.shape == (prompts, 1000, 8)
    some = slice(None, None, 7)
    for prompt, of_prompt in zip(drawn, found, strict=True):
        expected = padded_features(clip, [TEMPLATE.replace("{}", n) for n in names[some]], prompt, WORDS)
        torch.testing.assert_close(of_prompt[some], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_words_in_the_place_of_a_prompt_give_the_models_own_features():
    clip = tiny_clip()
    texts = ClassTexts(clip, NAMES, TEMPLATE)
    found = texts.encode(texts.words(WORDS)[None])[0]
    ids = open_clip.tokenize([TEMPLATE.replace("{}", name) for name in NAMES], context_length=32)
    torch.testing.assert_close(found, clip.encode_text(ids, normalize=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(class_features(clip, NAMES), found, atol=1e-6, rtol=0)


@torch.no_grad()
def test_words_are_repeated_until_they_fill_the_prompt_and_end_before_the_name():
    texts = ClassTexts(tiny_clip(), NAMES, "tiny photo of {}.")
    words = texts.words(3)
    assert torch.equal(texts.words(5), torch.cat([words[1:], words]))
    assert torch.equal(texts.words(2), words[1:])


@torch.no_grad()
def test_an_ending_sees_neither_other_endings_nor_what_comes_after_it():
    clip, prompt = tiny_clip(), torch.randn(1, 4, 16)
    among = ClassTexts(clip, NAMES, TEMPLATE).encode(prompt)[0]
    alone = torch.cat([ClassTexts(clip, [name], TEMPLATE).encode(prompt)[0] for name in NAMES])
    torch.testing.assert_close(among, alone, atol=1e-6, rtol=0)


def test_features_have_the_gradient_of_the_padded_pass():
    clip = tiny_clip().double()
    texts, prompt = ClassTexts(clip, NAMES, TEMPLATE), torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    expected = padded_features(clip, [TEMPLATE.replace("{}", n) for n in NAMES], prompt, WORDS)
    weights = torch.randn_like(expected)
    (of_tree,) = torch.autograd.grad((texts.encode(prompt[None])[0] * weights).sum(), prompt)
    (of_padded,) = torch.autograd.grad((expected * weights).sum(), prompt)
    torch.testing.assert_close(of_tree, of_padded)


@torch.no_grad()
def test_many_prompts_are_encoded_a_few_at_a_time(monkeypatch):
    texts, lengths = ClassTexts(tiny_clip(), NAMES, TEMPLATE), []
    texts.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[0]))
    drawn = torch.randn(7, 4, 16)
    at_once = texts.encode(drawn)
    monkeypatch.setattr("flops_lightning.prompts.class_texts.TOKENS_AT_ONCE", 3 * (5 + sum(texts.lengths)))
    torch.testing.assert_close(texts.encode(drawn), at_once)
    assert lengths == [7, 3, 3, 1]


@torch.no_grad()
def test_ensembled_templates_give_the_mean_of_unit_features():
    clip, templates = tiny_clip(), ("a photo of a {}.", "art of the {}.")
    mean = sum(class_features(clip, NAMES, [template]) for template in templates)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(class_features(clip, NAMES, templates), expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names no class"),
        (["dog", " "], "is empty"),
        (["dog", "7"], r"is a number.*order of the classes\.$"),
        (["dog", "n01440764"], "is a WordNet id"),
        (["dog", "Dog"], "is the name of two classes.*or doubled_names=True"),
    ],
)
def test_names_that_tell_clip_nothing_are_refused(names, message):
    with pytest.raises(SettingError, match=f"class_names = .*{message}"):
        ClassTexts(tiny_clip(), names)


def test_a_prompt_too_long_for_the_context_is_refused_with_the_room_there_is():
    texts = ClassTexts(tiny_clip(), NAMES, TEMPLATE)
    room = 32 - 1 - texts.lengths[-1]
    texts.check(room)
    with pytest.raises(SettingError, match=f"'black-and-white colobus monkey'.*Write {room} or less"):
        texts.encode(torch.zeros(1, room + 1, 16))
    with pytest.raises(SettingError, match=r"class_names = 'dog .* takes 43 tokens .* context has 32. Shorten the"):
        ClassTexts(tiny_clip(), ["dog " * 40], TEMPLATE)


@pytest.mark.parametrize("features", [class_features, template_features])
def test_captions_without_a_prompt_are_not_cut_without_a_word(features):
    fits = ["dog", "cat " * (32 - 7)]  # start, a photo of a, the full stop, end
    features(tiny_clip(), fits, ["a photo of a {}."])
    with pytest.raises(SettingError, match=r"class_names = 'cat .* tokens in its caption.*Shorten the name or"):
        features(tiny_clip(), [fits[0], fits[1] + "cat"], ["a photo of a {}."])


def test_a_template_needs_one_place_for_the_name_apart_from_its_words():
    with pytest.raises(SettingError, match="template = 'a photo'"):
        ClassTexts(tiny_clip(), NAMES, "a photo")
    with pytest.raises(SettingError, match="cut into other tokens before the name 'dog'"):
        ClassTexts(tiny_clip(), NAMES, "hot{}")
    with pytest.raises(SettingError, match="no words before the name"):
        ClassTexts(tiny_clip(), NAMES, "{}.").words(3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ({"no_causal_mask": True}, "not causal"),
        ({"pool_type": "last"}, "pools otherwise .'last'."),
        ({"embed_cls": True}, "pools otherwise"),
    ],
)
def test_towers_that_are_no_trees_are_refused_and_still_give_features(text, problem):
    clip = tiny_clip(open_clip.CustomTextCLIP, text)
    with pytest.raises(SettingError, match=f"{problem}.*class_features"):
        ClassTexts(clip, NAMES)
    assert class_features(clip, NAMES).shape == (len(NAMES), 8)
