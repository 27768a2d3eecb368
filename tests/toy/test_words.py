"""Words and sentences: what is said is understood, what is not is told, and what training never shows."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError
from hforce.toy.words import LOOKS, SLOTS, complete, held_out, looks, parse, sentence, vocabulary

WORDS = st.fixed_dictionaries({slot: st.sampled_from(choices) for slot, choices in SLOTS.items()})
SOME_WORDS = st.fixed_dictionaries({}, optional={slot: st.sampled_from(words) for slot, words in SLOTS.items()})


@given(WORDS)
def test_sentence_and_parse_are_inverse(words):
    parsed = parse(sentence(words))
    assert parsed.words == words
    assert parsed.unknown == ()


@given(SOME_WORDS)
def test_a_partial_sentence_says_just_what_it_is_given(words):
    parsed = parse(sentence(words))
    assert parsed.words == words
    assert parsed.unknown == ()


def test_the_sentence_reads_like_english():
    words = dict(
        zip(SLOTS, ("slow", "red", "circle", "upper", "bouncing sideways", "second", "green", "striped"), strict=True)
    )
    assert sentence(words) == (
        "a slow red circle in the upper lane, bouncing sideways from the second quarter of its path, "
        "on a dark green striped background"
    )


@given(st.text())
def test_any_text_is_read_without_complaint(text):
    parsed = parse(text)
    assert all(word in SLOTS[slot] for slot, word in parsed.words.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Red BALL rolls left!", {"color": "red", "shape": "circle", "motion": "passing left"}),
        ("the ball's passing", {"shape": "circle", "motion": "passing right"}),
        ("a box moving from left to right", {"shape": "square", "motion": "passing right"}),
        ("a box from the left", {"shape": "square", "motion": "passing right"}),
        ("a ball moves side to side", {"shape": "circle", "motion": "bouncing sideways"}),
        ("left and right goes the ball", {"shape": "circle", "motion": "bouncing sideways"}),
        ("up and down", {"motion": "bouncing up and down"}),
        ("a ball that bounces", {"shape": "circle", "motion": "bouncing sideways"}),
        ("a square orbiting quickly", {"speed": "fast", "shape": "square", "motion": "circling"}),
        ("a circle circles slowly", {"speed": "slow", "shape": "circle", "motion": "circling"}),
        ("pink wedge, grey checkerboard backdrop",
         {"color": "magenta", "shape": "triangle", "ground": "gray", "pattern": "checkered"}),
        ("green background, blue disk at the bottom",
         {"color": "blue", "shape": "circle", "lane": "lower", "ground": "green"}),
        ("background: brown; a cyan disk", {"color": "cyan", "shape": "circle", "ground": "brown"}),
        ("a blue ball on blue", {"color": "blue", "shape": "circle", "ground": "blue"}),
        ("a triangle, golden, over violet stripes, from the last quarter",
         {"color": "yellow", "shape": "triangle", "start": "fourth", "ground": "purple", "pattern": "striped"}),
    ],
)  # fmt: skip
def test_free_form_is_understood(text, words):
    assert parse(text) == parse(sentence(words))


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a furry cat on the beach", ("furry", "cat", "beach")),
        ("a purple ball", ("purple",)),
        ("a ball on a red background", ("red",)),
        ("ein Bällchen, 猫", ("ein", "bällchen", "猫")),
        ("", ()),
    ],
)
def test_what_is_not_understood_is_told(text, unknown):
    assert (parse(text).unknown, parse(text).surplus) == (unknown, ())


def test_a_second_thing_is_one_too_many():
    parsed = parse("a red ball and a furry blue square, a green one")
    assert (parsed.words, parsed.unknown, parsed.surplus) == (
        {"color": "red", "shape": "circle"}, ("furry", "one"), ("blue", "square", "green"),
    )  # fmt: skip


@given(SOME_WORDS, st.text(max_size=20))
def test_complete_keeps_what_is_said_and_fills_the_rest(words, key):
    full = complete(words, key)
    assert list(full) == list(SLOTS)
    assert full == complete(full, "another key") == complete(words, key)
    assert words.items() <= full.items()


def test_complete_depends_on_its_key():
    assert len({tuple(complete({}, str(key)).values()) for key in range(50)}) > 40


def test_vocabulary_names_every_word():
    assert all(word in vocabulary() for words in SLOTS.values() for word in words)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_held_out_takes_its_share_of_every_word_and_of_every_two_words(count):
    """The share of each is as near to one in nine as whole numbers let it be, give or take one combination."""
    for slots in combinations(LOOKS, count):
        seen = Counter(tuple(words[slot] for slot in slots) for words in looks({}))
        gone = Counter(tuple(words[slot] for slot in slots) for words in looks({}, held=True))
        for words, amount in seen.items():
            assert abs(gone[words] - amount / 9) < 1
            assert 0 < gone[words] <= amount / 5


def test_one_combination_in_nine_is_held_out():
    assert len(looks({})) == 270
    assert [held_out(words) for words in looks({}, held=True)] == [True] * 30
    assert [held_out(words) for words in looks({}, held=False)] == [False] * 240


@given(WORDS, SOME_WORDS)
def test_motion_and_place_do_not_decide_what_is_held_out(words, others):
    others = {slot: word for slot, word in others.items() if slot not in LOOKS}
    assert held_out(words) == held_out({**words, **others})


@given(SOME_WORDS)
def test_looks_keep_what_is_given(words):
    asked = {slot: word for slot, word in words.items() if slot in LOOKS}
    assert all(asked.items() <= found.items() for found in looks(words))
    assert len(looks({})) % len(looks(words)) == 0


def test_looks_that_cannot_be_are_refused():
    never = looks({}, held=True)[0]
    with pytest.raises(DataError, match="held out of training"):
        looks(never, held=False)
    with pytest.raises(DataError, match="seen in training"):
        looks(looks({}, held=False)[0], held=True)
