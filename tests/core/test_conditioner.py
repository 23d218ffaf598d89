import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from moa import Recorder
from moa.conditioner import PromptEncoder, find_words, without_guidance
from tests.core.conftest import IMAGE_DIM, TEXT_DIM, TOKENS

PROMPT = "a man and a woman with a red hat"  # tokens: 0 start, 1 a, 2 man, 3 and, 4 a, 5 woman, …


@pytest.fixture
def conditioner(unet, make_adapter, make_conditioner):
    return make_conditioner(make_adapter(unet))


@pytest.fixture
def prompts(tokenizer, text_encoder):
    return PromptEncoder(tokenizer, text_encoder)


# ── Words to tokens ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "spans", "expected"),
    [
        (PROMPT, [(2, 5)], [2]),
        (PROMPT, [(12, 17), (2, 5)], [5, 2]),
        (PROMPT, [(0, 5)], [2]),
        ("A  Man, and a WOMAN", [(3, 6), (14, 19)], [2, 6]),
        ("a woman's hat", [(2, 7)], [2]),
        ("photo (man)", [(7, 10)], [3]),
        ("naïve man", [(6, 9)], [-1]),
        ("a man zz", [(6, 8)], [4]),
    ],
)
def test_a_span_ends_on_the_token_of_its_last_letters(prompts, tokenizer, prompt, spans, expected):
    indices = prompts.token_indices(prompt, spans)
    ids = tokenizer(prompt)["input_ids"]
    if expected == [-1]:
        expected = [ids.index(tokenizer.convert_tokens_to_ids("man</w>"))]
    assert indices == expected
    for index, (start, end) in zip(indices, spans, strict=True):
        token = tokenizer.convert_ids_to_tokens(ids[index]).removesuffix("</w>")
        assert prompt[start:end].lower().endswith(token)


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        (PROMPT, ["man"], [(2, 5)]),
        (PROMPT, ["woman", "man"], [(12, 17), (2, 5)]),
        ("a man and a man and a man", ["man", "man"], [(2, 5), (12, 15)]),
        ("A MAN", ["man"], [(2, 5)]),
        ("a red hat", ["red hat"], [(2, 9)]),
        ("man-made man", ["Man", "man"], [(0, 3), (9, 12)]),
    ],
)
def test_words_are_found_whole_and_in_turn(prompt, words, expected):
    assert find_words(prompt, words) == expected


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        (PROMPT, ["dog"], "'dog' is not in the prompt 'a man and"),
        ("a woman", ["man"], "'man' is not in"),
        ("two men", ["man"], "'man' is not in"),
        (PROMPT, ["man", "man"], "'man' is only 1 times in"),
        (PROMPT, [""], "'' is not in"),
        (PROMPT, [" "], "' ' is not in"),
    ],
)
def test_words_that_are_not_in_the_prompt_are_errors(conditioner, prompt, words, message):
    with pytest.raises(ValueError, match=message):
        conditioner(prompt, subjects=[torch.zeros(IMAGE_DIM)] * len(words), words=words)


@pytest.mark.parametrize(
    ("prompt", "spans", "message"),
    [
        ("a woman", [(4, 7)], "cuts a word of the prompt 'a woman'"),
        ("a man", [(2, 2)], "empty or outside"),
        ("a man", [(2, 9)], "empty or outside"),
        ("a man", [(-3, 2)], "empty or outside"),
        ("a man  x", [(5, 6)], "no token of its own"),
        ("a man", [(2, 5), (0, 5)], "share a token"),
        (
            "a " * (TOKENS - 2) + "man",
            [(2 * TOKENS - 4, 2 * TOKENS - 1)],
            f"'man' is token {TOKENS - 1}.*{TOKENS}",
        ),
        ("a 🐎 man", [(2, 3)], "does not know '🐎'"),
    ],
)
def test_spans_that_name_no_token_are_errors(prompts, prompt, spans, message):
    with pytest.raises(ValueError, match=message):
        prompts.token_indices(prompt, spans)


def test_the_last_token_that_the_encoder_reads_may_be_a_subject(prompts):
    prompt = "a " * (TOKENS - 3) + "man"
    assert prompts.token_indices(prompt, find_words(prompt, ["man"])) == [TOKENS - 2]


def test_a_cut_prompt_is_said_aloud(prompts, caplog):
    with caplog.at_level(logging.WARNING):
        prompts.token_indices("man " + "a " * 30, [(0, 3)])
    assert f"cut after {TOKENS} of its 33 tokens" in caplog.text


def test_the_77th_token_of_stable_diffusion_is_the_end(tokenizer, text_encoder):
    """Index 76 is the end token's, so 75 is the last that a subject may have."""
    words, config = copy.deepcopy(tokenizer), copy.deepcopy(text_encoder.config)
    words.model_max_length = config.max_position_embeddings = 77
    prompts = PromptEncoder(words, type(text_encoder)(config).eval())
    assert prompts.encode_text(["a man"]).shape == (1, 77, TEXT_DIM)
    longest = "a " * 74 + "man"
    assert prompts.token_indices(longest, find_words(longest, ["man"])) == [75]
    for more in (1, 30):
        prompt = "a " * (74 + more) + "man"
        with pytest.raises(ValueError, match=rf"'man' is token {75 + more} .*past the 77 .*shorten"):
            prompts.token_indices(prompt, find_words(prompt, ["man"]))
        with pytest.raises(ValueError, match="past the 77"):
            prompts.explicit_tokens(prompt, [75 + more])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([0], "1 … 9"), ([10], "1 … 9"), ([2, 2], "share a token"), ([40], "not in the prompt")],
)
def test_explicit_tokens_are_checked(conditioner, tokens, message):
    features = [torch.zeros(IMAGE_DIM)] * len(tokens)
    assert conditioner(PROMPT, features[:1], tokens=[5]).context.token[-1].tolist() == [5]
    with pytest.raises(ValueError, match=message):
        conditioner(PROMPT, subjects=features, tokens=tokens)


def test_a_tokenizer_without_offsets_is_refused(text_encoder):
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="Slow gives no character offsets"):
        PromptEncoder(Slow(), text_encoder)


def test_text_is_encoded_as_stable_diffusion_does(prompts, base):
    embeds, negative = base.encode_prompt([PROMPT, "man " * 40], "cpu", 1, True)
    assert torch.equal(prompts.encode_text([PROMPT, "man " * 40]), embeds)
    assert torch.equal(prompts.encode_text(["", ""]), negative)


def test_a_textual_inversion_of_several_vectors_is_read_as_diffusers_does(base, tokenizer, text_encoder):
    """Three vectors a word: the prior's text is diffusers', and subjects find their words."""
    words, model = copy.deepcopy(tokenizer), copy.deepcopy(text_encoder)
    base.register_modules(tokenizer=words, text_encoder=model)
    base.load_textual_inversion(torch.randn(3, TEXT_DIM), token="<sty>")
    prompts = PromptEncoder(words, model)
    given = ["a man on a <sty> and a woman", "<sty> man", "a man"]
    assert torch.equal(prompts.encode_text(given), base.encode_prompt(given, "cpu", 1, False)[0])
    ids = words(base.maybe_convert_prompt(given[0], words))["input_ids"]
    found = prompts.token_indices(given[0], find_words(given[0], ["woman", "<sty>", "man"]))
    assert words.convert_ids_to_tokens([ids[i] for i in found]) == ["woman</w>", "<sty>_2", "man</w>"]
    assert prompts.explicit_tokens(given[0], [10]) == [10] == found[:1]
    with pytest.raises(ValueError, match="1 … 10 are"):
        prompts.explicit_tokens(given[0], [11])
    long = "<sty> " * 6 + "man"
    with pytest.raises(ValueError, match=f"'man' is token {TOKENS - 1} .*past the {TOKENS}"):
        prompts.token_indices(long, find_words(long, ["man"]))


# ── Batches ───────────────────────────────────────────────────────────────────────────────────


def test_a_batch_is_laid_out_as_diffusers_lays_it_out(conditioner):
    one, two, three = torch.eye(IMAGE_DIM)[:3]
    out = conditioner(
        ["a man", PROMPT, "a horse"],
        subjects=[[one], [two, three], []],
        words=[["man"], ["woman", "man"], []],
        num_images_per_prompt=2,
        negative_prompts="red",
        prior_only=[False, False, True],
    )
    context = out.context
    assert out.prompt_embeds.shape == out.negative_prompt_embeds.shape == (6, TOKENS, TEXT_DIM)
    assert torch.equal(out.prompt_embeds[0], out.prompt_embeds[1])
    assert torch.equal(context.text, torch.cat([out.negative_prompt_embeds, out.prompt_embeds]))
    assert torch.equal(out.negative_prompt_embeds, conditioner.encode_text(["red"]).expand(6, -1, -1))
    nobody = [[False, False]] * 6
    assert context.present.tolist() == [
        *nobody,
        *[[True, False]] * 2,
        *[[True, True]] * 2,
        *[[False] * 2] * 2,
    ]
    assert context.token[6:].tolist() == [[2, 0], [2, 0], [5, 2], [5, 2], [0, 0], [0, 0]]
    assert torch.equal(context.features[9], torch.stack([two, three]))
    assert torch.equal(context.features[6, 0], one)
    assert context.prior_only.tolist() == [False, False, False, False, True, True] * 2


def test_without_guidance_there_is_no_unconditional_half(conditioner):
    out = conditioner(["a man"], [[torch.zeros(IMAGE_DIM)]], words=[["man"]], guidance=False)
    assert out.negative_prompt_embeds is None
    assert "negative_prompt_embeds" not in dict(out)
    assert out.context.text.shape[0] == 1


def test_the_conditional_half_is_the_context_without_guidance(conditioner):
    call = dict(subjects=[[torch.ones(IMAGE_DIM)], []], words=[["man"], []], num_images_per_prompt=2)
    both = conditioner(["a man", "a horse"], **call).context
    half = conditioner(["a man", "a horse"], **call, guidance=False).context
    found = vars(without_guidance(both))
    assert found.keys() == vars(half).keys()
    for name, value in vars(half).items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_null_branch_and_cut_are_settings_of_the_conditioner_and_of_a_call(
    unet, make_adapter, make_conditioner
):
    conditioner = make_conditioner(make_adapter(unet), null_branch="prior", personalize_below=800)
    assert conditioner("a man").context.prior_only.tolist() == [True, False]
    assert conditioner("a man").context.personalize_below == 800
    assert conditioner("a man", null_branch="expert").context.prior_only.tolist() == [False, False]
    with pytest.raises(ValueError, match="null_branch: 'none'"):
        conditioner("a man", null_branch="none")


def test_what_else_goes_to_the_u_net_rides_along(conditioner):
    for guidance in (True, False):
        out = conditioner("a man", guidance=guidance, cross_attention_kwargs={"scale": 0.5})
        assert out.cross_attention_kwargs == {"scale": 0.5, "moa": out.context}
    with pytest.raises(ValueError, match="sparse_threshold: 2"):
        conditioner("a man", sparse_threshold=2)


def test_the_cut_is_the_adapters_unless_one_is_given(unet, make_adapter, make_conditioner):
    adapter = make_adapter(unet, personalize_below=650)
    assert make_conditioner(adapter)("a man").context.personalize_below == 650
    assert make_conditioner(adapter, personalize_below=1000)("a man").context.personalize_below == 1000


def test_a_single_prompt_takes_flat_lists_or_one_thing(conditioner, photo):
    feature = conditioner.encode_photos([photo()])[0]
    calls = [
        {"subjects": [photo()], "words": ["man"]},
        {"subjects": photo(), "words": "man"},
        {"subjects": feature, "tokens": 2},
        {"subjects": [feature], "spans": [(2, 5)]},
        {"subjects": [np.asarray(photo())], "spans": ((2, 5),)},
    ]
    contexts = [conditioner(PROMPT, **call).context for call in calls]
    for context in contexts:
        assert context.token.tolist() == [[0], [2]]
        torch.testing.assert_close(context.features, contexts[0].features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": "a man", "subjects": ["f"]}, "without a place"),
        (
            {"prompts": "a man", "subjects": ["f"], "words": ["man"], "tokens": [2]},
            "in one way, not by words and tokens",
        ),
        ({"prompts": "a man", "subjects": ["f", "f"], "words": ["man"]}, "2 subjects but 1 words.*'a man'"),
        ({"prompts": "a man", "words": ["man"]}, "0 subjects but 1 words"),
        (
            {"prompts": ["a man", "a horse"], "subjects": [["f"]], "words": [["man"]]},
            "subjects: 2 prompts take 2",
        ),
        (
            {"prompts": ["a man", "a man"], "subjects": [["f"], []], "words": ["man", ""]},
            "words: 2 prompts take",
        ),
        ({"prompts": ["a man"], "subjects": ["f"], "words": [["man"]]}, "subjects: 1 prompts take"),
        ({"prompts": ["a man", "a man"], "prior_only": [True]}, "1 entries for 2 prompts"),
        ({"prompts": ["a man"], "negative_prompts": ["a", "b"]}, "2 negative prompts for 1"),
    ],
)
def test_counts_that_do_not_fit_are_errors(conditioner, call, message):
    def fill(value):
        if value == "f":
            return torch.zeros(IMAGE_DIM)
        return [fill(item) for item in value] if isinstance(value, list) else value

    if "subjects" in call:
        call = call | {"subjects": fill(call["subjects"])}
    with pytest.raises(ValueError, match=message):
        conditioner(**call)


def test_a_recorder_rides_along(conditioner):
    recorder = Recorder()
    assert conditioner("a man", recorder=recorder).context.recorder is recorder
    assert conditioner("a man", recorder=recorder, guidance=False).context.recorder is recorder


# ── Images ────────────────────────────────────────────────────────────────────────────────────


def test_photos_are_encoded_whole_with_the_image_encoder(conditioner, image_encoder, image_processor, photo):
    wide = photo(size=(60, 30))
    square = Image.new("RGB", (60, 60))
    square.paste(wide, (0, 15))
    pixels = image_processor(images=[square], return_tensors="pt").pixel_values
    torch.testing.assert_close(conditioner.encode_photos([wide]), image_encoder(pixels).image_embeds)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_a_photo_of_any_mode_is_the_same_subject(conditioner, photo, mode):
    grey = photo().convert("L")
    given = grey.convert("RGB").convert(mode) if mode != "I;16" else sixteen_bit(grey)
    assert given.mode == mode
    found, expected = conditioner.encode_photos([given, grey.convert("RGB")])
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    assert (found - conditioner.encode_photos([photo(5)])[0]).abs().max() > 5e-2


def sixteen_bit(grey):
    return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Image.new("RGB", (1, 1)), "1 × 1 pixels; it needs at least 16"),
        (np.full((20, 20, 3), np.nan, np.float32), "NaN or infinite pixels"),
        (torch.full((3, 20, 20), float("nan")), "NaN or infinite pixels"),
        (torch.zeros(1, 3, 20, 20), r"shape \(1, 3, 20, 20\)"),
    ],
)
def test_a_photo_that_shows_nothing_is_an_error(conditioner, photo, broken, message):
    """Also as the second of two, and in a batch."""
    with pytest.raises(ValueError, match=message):
        conditioner(PROMPT, subjects=[photo(), broken], words=["man", "woman"])
    with pytest.raises(ValueError, match=message):
        conditioner(["a man", "a man"], subjects=[[photo()], [broken]], words=[["man"], ["man"]])


@pytest.mark.parametrize("broken", ["photo.png", None])
def test_what_is_no_photo_is_a_type_error(conditioner, broken):
    with pytest.raises(TypeError, match=f"not a {type(broken).__name__}"):
        conditioner("a man", subjects=[broken], words=["man"])


def test_features_of_many_subjects_go_where_they_belong(conditioner, photo):
    """Photos and ready features mixed, prompts with different numbers of them."""
    known = conditioner.encode_photos([photo(1)])[0]
    out = conditioner(
        ["a man and a woman", "a man", "a horse and a man"],
        subjects=[[photo(0), known], [], [photo(2), photo(1)]],
        words=[["man", "woman"], [], ["horse", "man"]],
        guidance=False,
    )
    features = out.context.features
    torch.testing.assert_close(features[0, 1], features[2, 1])
    expected = torch.cat([conditioner.encode_photos([photo(i)]) for i in (0, 2)])
    torch.testing.assert_close(torch.stack([features[0, 0], features[2, 0]]), expected)


@pytest.mark.parametrize(
    ("feature", "message"),
    [(torch.zeros(IMAGE_DIM + 1), "shape"), (torch.full((IMAGE_DIM,), float("nan")), "not finite")],
)
def test_features_of_another_width_or_not_finite_are_errors(conditioner, feature, message):
    with pytest.raises(ValueError, match=message):
        conditioner("a man", subjects=[feature], words=["man"])


def test_photos_without_an_image_encoder_are_an_error(unet, make_adapter, tokenizer, text_encoder, photo):
    from moa import SubjectConditioner

    conditioner = SubjectConditioner(tokenizer, text_encoder, None, None, make_adapter(unet))
    conditioner("a man", subjects=[torch.zeros(IMAGE_DIM)], words=["man"])
    with pytest.raises(ValueError, match="image_encoder"):
        conditioner("a man", subjects=[photo()], words=["man"])
    with pytest.raises(ValueError, match="image_encoder"):
        conditioner.encode_images(torch.zeros(1, 3, 32, 32))


def test_trained_encoder_layers_are_the_adapters(unet, make_adapter, make_conditioner, image_encoder, photo):
    before = {name: value.clone() for name, value in image_encoder.state_dict().items()}
    new = make_conditioner(
        make_adapter(unet, trained=False, image_feature_dim=None, image_encoder=image_encoder, image_layers=2)
    )
    plain = image_encoder(new.pixel_values([photo()])).image_embeds
    torch.testing.assert_close(new.encode_photos([photo()]), plain)
    names = list(new.adapter.config["image_encoder_shapes"])
    assert {name.split("layers.")[1][0] for name in names} == {"1", "2"}
    new.encode_images(new.pixel_values([photo()])).sum().backward()
    trained = new.adapter.image_encoder_layers
    assert all(p.grad is not None for name, p in trained.items() if "k_proj-bias" not in name)
    assert all(p.grad is None for p in image_encoder.parameters())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    assert (new.encode_photos([photo()]) - plain).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in image_encoder.state_dict().items())


def test_more_encoder_layers_than_there_are_is_an_error(unet, make_adapter, image_encoder):
    with pytest.raises(ValueError, match=r"image_layers: 4.*3 layers"):
        make_adapter(unet, image_encoder=image_encoder, image_layers=4)


def test_another_image_encoder_is_refused(unet, make_adapter, make_conditioner, image_encoder):
    """One of fewer or of other layers would fail in the middle of its forward, or not at all."""
    sources = {"image_encoder": {"id": "some/clip"}}
    adapter = make_adapter(
        unet, image_feature_dim=None, image_encoder=image_encoder, image_layers=2, sources=sources
    )
    made = make_conditioner(adapter)
    for change, message in (
        ({"num_hidden_layers": 2}, r"layers\.2\..*is not there: load.*made for, some/clip"),
        ({"intermediate_size": 64}, r"fc1\.weight, \[48, 32\]; in this one it is \[64, 32\]"),
    ):
        other = type(image_encoder)(type(image_encoder.config)(**(image_encoder.config.to_dict() | change)))
        with pytest.raises(ValueError, match=message):
            type(made)(made.tokenizer, made.text_encoder, other, made.image_processor, adapter)
