"""Images of a prompt: planned sizes, spans, markers in text; pixels stand in test_images_load.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from dsv4c.errors import ArtifactError, UsageError
from dsv4c.runtime.images import (
    END,
    IMAGE,
    NEWLINE,
    START,
    TEXT,
    Expanded,
    ImagePlan,
    ImageRules,
    encode_with_images,
    expand,
    plan,
    split_prompt,
)

GOLDEN = np.load(Path(__file__).parent / "data" / "images" / "v41.npz")
RELEASED = ImageRules(14, 3, 1024, 295936, None, 129264)
SMALL = ImageRules(14, 3, 64, 7056, None, 510)  # of the golden model


def changed(**values: Any) -> ImageRules:
    return ImageRules(**(RELEASED.to_meta() | values))


# ------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("rules", [RELEASED, SMALL, changed(max_wh_ratio=2.5)])
def test_rules_survive_json(rules: ImageRules) -> None:
    assert ImageRules.from_meta(json.loads(json.dumps(rules.to_meta()))) == rules


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("patch_size", 0, "patch_size = 0; allowed: an integer from 1"),
        ("patch_size", 14.0, "patch_size = 14.0; allowed: an integer from 1"),
        ("downsample", True, "downsample = True"),
        ("max_tokens", 3, "max_tokens = 3; allowed: an integer from 4"),
        ("min_pixels", -1, "min_pixels = -1; allowed: an integer from 0"),
        ("placeholder", None, "placeholder = None"),
        ("placeholder", 2**31, "placeholder = 2147483648; allowed: an integer from 0 to 2147483647"),
        ("max_wh_ratio", 0, "max_wh_ratio = 0; allowed: None, or a finite number above 0"),
        ("max_wh_ratio", math.nan, "max_wh_ratio = nan"),
        ("max_wh_ratio", math.inf, "max_wh_ratio = inf"),
        ("max_wh_ratio", "2", "max_wh_ratio = '2'"),
    ],
)
def test_rules_refuse_values_that_make_no_sense(name: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as usage:
        changed(**{name: value})
    assert says in str(usage.value)
    with pytest.raises(ArtifactError) as artifact:
        ImageRules.from_meta(RELEASED.to_meta() | {name: value})
    assert says in str(artifact.value)


@pytest.mark.parametrize("meta", [{}, {**RELEASED.to_meta(), "more": 1}, ["patch_size"]])
def test_rules_refuse_other_names(meta: Any) -> None:
    with pytest.raises(ArtifactError, match=r"the image rules hold .*; allowed: downsample, max_tokens"):
        ImageRules.from_meta(meta)


# ------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("size", "resized", "grid", "span"),
    [  # the vectors of the specification, section 9.1
        ((64, 64), (546, 546), (13, 13), 184),
        ((640, 480), (490, 644), (12, 16), 206),
        ((1024, 1024), (1036, 1036), (25, 25), 652),
        ((1920, 1080), (966, 1708), (23, 41), 968),
        ((4000, 3000), (1134, 1512), (27, 36), 1001),
        ((1, 3000), (21462, 42), (511, 1), 1024),
    ],
)
def test_vectors(size: tuple[int, int], resized: tuple[int, int], grid: tuple[int, int], span: int) -> None:
    found = plan(*size, RELEASED)
    assert ((found.bh, found.bw), (found.gh, found.gw), found.span) == (resized, grid, span)
    assert (found.rows, found.cols) == (resized[0] // 14, resized[1] // 14)
    assert not found.squeezed


def test_the_released_limits_follow_from_the_rules() -> None:
    """One row of tokens, one column: 1021 and 511 of the specification; here also for 64 tokens."""
    assert plan(10**6, 1, RELEASED) == ImagePlan(42, 1021 * 42, 3, 1021 * 3, 1, 1021)
    assert plan(1, 10**6, RELEASED) == ImagePlan(511 * 42, 42, 511 * 3, 3, 511, 1)
    assert plan(10**6, 1, SMALL) == ImagePlan(42, 61 * 42, 3, 61 * 3, 1, 61)
    assert plan(1, 10**6, SMALL) == ImagePlan(31 * 42, 42, 31 * 3, 3, 31, 1)


def test_a_span_of_just_the_limit_is_not_shrunk() -> None:
    exact = plan(2990, 560, RELEASED)
    assert (exact.bh, exact.bw, exact.gh, exact.gw, exact.span) == (560, 2996, 14, 72, 1024)
    assert plan(2990, 560, changed(max_tokens=1023)).bh == 546


def test_enlarged_sides_are_truncated_before_they_are_rounded_up() -> None:
    # sqrt(199) = 14.1: truncated, it is one patch; rounded up at once it would be two.
    found = plan(10, 10, changed(min_pixels=199))
    assert (found.bw, found.bh) == (14, 14) and found.bw * found.bh < 199 < 15 * 15


def test_wide_images_are_squeezed_and_tall_ones_are_not() -> None:
    rules = changed(max_wh_ratio=2.0)
    assert plan(4000, 1000, rules) == ImagePlan(
        **{**vars(plan(2000, 1000, RELEASED)), "squeezed": True}
    )  # fmt: skip
    assert not plan(2000, 1000, rules).squeezed
    assert plan(1000, 4000, rules) == plan(1000, 4000, RELEASED)
    assert plan(1, 3, changed(max_wh_ratio=1e-9)).bw == 42  # no side vanishes


SIDES = st.one_of(st.integers(1, 5000), st.integers(1, 2**31 - 1))
RULES = st.builds(
    ImageRules, st.integers(1, 20), st.integers(1, 4), st.integers(4, 3000), st.integers(0, 10**6),
    st.none() | st.floats(0.001, 100), st.just(7),
)  # fmt: skip


@given(SIDES, SIDES, st.one_of(st.just(RELEASED), RULES))
@example(1, 2**31 - 1, RELEASED)
@example(2**31 - 1, 1, RELEASED)
@example(190, 101, ImageRules(14, 1, 5, 0, None, 7))  # half a patch high, by the rule alone
def test_what_every_plan_keeps(width: int, height: int, rules: ImageRules) -> None:
    found = plan(width, height, rules)
    assert 4 <= found.span == found.gh * (found.gw + 1) + 2 <= rules.max_tokens
    assert (found.bh, found.bw) == (found.rows * rules.patch_size, found.cols * rules.patch_size)
    assert min(found.rows, found.cols) >= 1
    for tokens, patches in ((found.gh, found.rows), (found.gw, found.cols)):
        assert (tokens - 1) * rules.downsample < patches <= tokens * rules.downsample
    unlimited = plan(width, height, ImageRules(**(rules.to_meta() | {"max_tokens": 2**31 - 1})))
    if unlimited == found:
        assert (found.bh + 1) * (found.bw + 1) > rules.min_pixels
    else:
        assert unlimited.span > rules.max_tokens


@given(st.integers(200, 4000), st.integers(200, 4000))
def test_the_ratio_is_kept_within_patches(width: int, height: int) -> None:
    """Sides that are rounded by at most a patch each, up when not limited and down when limited."""
    found = plan(width, height, RELEASED)
    off = abs(found.bw * height - found.bh * width)
    assert off <= 16 * max(width, height)


def test_limited_images_use_the_tokens_they_may() -> None:
    spans = [plan(w, h, RELEASED).span for w in range(2000, 4000, 37) for h in range(2000, 4000, 41)]
    assert (min(spans), max(spans)) == (938, 1022)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (2.5, 5), (True, 5), (2**31, 1)])
def test_plan_refuses_sides(size: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"plan: an image of .* pixels; allowed: sides that are integers"):
        plan(*size, RELEASED)


# ------------------------------------------------------------------------------ spans


def test_expand_spells_a_span() -> None:
    found = expand([5, 9, 6], 9, [ImagePlan(84, 112, 6, 8, 2, 3)])
    types = [TEXT, START, IMAGE, IMAGE, IMAGE, NEWLINE, IMAGE, IMAGE, IMAGE, NEWLINE, END, TEXT]
    assert found.types.tolist() == types
    assert found.tokens.tolist() == [5, *[9] * 10, 6]
    assert found.spans == [(1, 11)]
    assert found.tokens.dtype == found.types.dtype == np.int32
    assert (TEXT, START, IMAGE, NEWLINE, END) == (-1, 0, 1, 2, 3)


def golden() -> Expanded:
    """The prompt of the golden model, from the one with a placeholder."""
    ids = GOLDEN["input_ids"].tolist()
    first = ids.index(510)
    prompt = [*ids[: first + 1], *[i for i in ids[first:] if i != 510]]
    return expand(prompt, 510, [plan(112, 84, SMALL)])


def test_expand_agrees_with_the_golden_model() -> None:
    found = golden()
    assert np.array_equal(found.tokens, GOLDEN["input_ids"])
    assert np.array_equal(found.types, GOLDEN["token_types"])
    assert np.array_equal(found.types >= 0, GOLDEN["image_mask"] != 0)


def test_expand_takes_no_images_and_many() -> None:
    text = expand([1, 2], 9, [])
    assert (text.tokens.tolist(), text.types.tolist(), text.spans) == ([1, 2], [TEXT, TEXT], [])
    assert expand([], 9, []).tokens.shape == (0,)
    one, two = ImagePlan(14, 14, 1, 1, 1, 1), ImagePlan(14, 84, 1, 6, 1, 2)
    many = expand(np.array([9, 9, 3, 9]), 9, [one, two, one])  # type: ignore[arg-type]
    assert many.spans == [(0, 4), (4, 9), (10, 14)]
    assert many.types.tolist() == [0, 1, 2, 3, 0, 1, 1, 2, 3, -1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "images", "says"),
    [
        ([1, 9, 9], 1, "the prompt has room for 2 images, given are 1; allowed: one token 9 per image"),
        ([1], 3, "the prompt has room for 0 images, given are 3"),
        ([1, 9], 0, "the prompt has room for 1 image, given are 0"),
        ([[9]], 1, "tokens are int64[1, 1]; allowed: int32 [T]"),
        ([9.0], 1, "tokens are float64[1]"),
        ([9, 2**40], 1, "tokens are int64[2]"),
    ],
)
def test_expand_refuses(tokens: Any, images: int, says: str) -> None:
    with pytest.raises(UsageError) as error:
        expand(tokens, 9, [ImagePlan(14, 14, 1, 1, 1, 1)] * images)
    assert str(error.value).startswith(f"expand: {says}")


# ------------------------------------------------------------------------------ text

BOS, EOS, PICTURE = 0, 1, 2


def tokenizer(image: str | AddedToken | None = None) -> Tokenizer:
    """One id per byte from 3 on, ids 0 and 1 around a text, and perhaps a token of its own with id 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": BOS, "</s>": EOS, str(image or "<unused>"): PICTURE}
    made = Tokenizer(models.BPE(vocab | {c: i + 3 for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    if image is not None:
        made.add_special_tokens([image])
        assert made.token_to_id(str(getattr(image, "content", image))) == PICTURE
    return made


def raw(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def test_split_prompt() -> None:
    assert split_prompt("<image>a <image>") == ["", "a ", ""]
    assert split_prompt("a <Image> < image>") == ["a <Image> < image>"]


KINDS = [None, "<image>", "<|picture|>"]


@pytest.mark.parametrize("image", KINDS)
def test_markers_become_placeholders(image: str | None) -> None:
    made = tokenizer(image)
    for text in ("see <image> and\n<image>!", "<image><image>", "<image> größe", "no image"):
        pieces = text.split("<image>")
        expected = [BOS, *raw(pieces[0])]
        for piece in pieces[1:]:
            expected += [PICTURE, *raw(piece)]
        found = encode_with_images(made, text, PICTURE, len(pieces) - 1)
        assert found == [*expected, EOS], text
        assert encode_with_images(made, text, PICTURE, len(pieces) - 1, False) == expected[1:]


def test_a_token_that_wants_words_around_it_is_put_in_all_the_same() -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 3}, unk_token="?"))
    made.add_special_tokens(["<s>"])
    made.add_special_tokens([AddedToken("pic", single_word=True)])
    own = made.token_to_id("pic")
    assert own is not None and own not in made.encode("apicb").ids
    assert encode_with_images(made, "a<image>b", own, 1) == [0, own, 1]


def test_the_spelling_of_the_own_token_counts() -> None:
    made = tokenizer("<|picture|>")
    assert encode_with_images(made, "<|picture|>a<image>", PICTURE, 2, False) == [2, *raw("a"), 2]


@pytest.mark.parametrize("image", KINDS)
def test_markers_and_images_must_agree(image: str | None) -> None:
    for text, count in (("a <image>", 2), ("a <image>", 0), ("a", 1), ("<image><image>", 1)):
        found = text.count("<image>")
        says = f"the prompt has {found} <image>, the number of images is {count}; allowed: one per image"
        with pytest.raises(UsageError, match=says) as error:
            encode_with_images(tokenizer(image), text, PICTURE, count)
        assert "hint: write <image> into the prompt where each image belongs" in str(error.value)


def test_a_prompt_goes_from_text_to_rows() -> None:
    ids = encode_with_images(tokenizer(), "a<image>b", PICTURE, 1)
    found = expand(ids, PICTURE, [plan(112, 84, SMALL)])
    assert found.spans == [(2, 12)] and len(found.tokens) == len(ids) + 9
