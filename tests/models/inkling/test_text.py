import numpy as np
import pytest

from varl.models.inkling.text import (
    ALPHABET,
    PLACES,
    Region,
    first_column,
    is_held_out,
    layout,
    make_prompt,
    parse_prompt,
    random_regions,
)


def regions_of(count: int, held_out: bool = False, seed: int = 0) -> list[tuple[Region, ...]]:
    rng = np.random.default_rng(seed)
    return [random_regions(rng, held_out) for _ in range(count)]


def test_the_grammar_goes_there_and_back() -> None:
    for regions in regions_of(200):
        prompt = make_prompt(regions)
        assert parse_prompt(prompt.text) == regions
        assert prompt.words == tuple(r.word for r in regions)
        assert len(prompt.boxes) == len(regions)


def test_prompts_as_they_read() -> None:
    assert make_prompt((Region("KEBA", "top"),)).text == "the word 'KEBA' at the top"
    three = tuple(Region(w, p) for w, p in zip(("KEBA", "LUX", "ZAP"), PLACES, strict=True))
    text = "the words 'KEBA' at the top, 'LUX' in the middle, 'ZAP' at the bottom"
    assert make_prompt(three).text == text
    # People write otherwise, and that is read too.
    assert parse_prompt("a card with 'LUX' in the middle and\n'KEBA'  at the top") == (
        Region("LUX", "middle"),
        Region("KEBA", "top"),
    )
    assert parse_prompt("the baker's words 'KEBA' at the top") == (Region("KEBA", "top"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "asks for no word"),
        ("a cat", "asks for no word"),
        ("the word KEBA at the top", "asks for no word"),
        ("the word 'KEBA' at the left", "place 'left'; places are top, middle, bottom"),
        ("the word 'keba' at the top", "cannot write 'keba'"),
        ("the word 'KIBA' at the top", "cannot write 'KIBA'"),
        ("the word 'KE' at the top", "3 to 5 letters"),
        ("the word 'KEBABS' at the top", "3 to 5 letters"),
        ("the word '' at the top", "3 to 5 letters"),
        ("the words 'KEBA' at the top, 'LUX' at the top", "one place twice"),
        ("the words 'KEBA' at the top, 'LUX' below it", "no place for 'LUX'"),
        ("the words 'LUX', 'KEBA' at the top", "no place for 'LUX'"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_words_are_never_trained_on(held_out: bool) -> None:
    words = [r.word for regions in regions_of(300 if held_out else 3000, held_out) for r in regions]
    assert {is_held_out(w) for w in words} == {held_out}
    assert {c for w in words for c in w} == set(ALPHABET)
    assert {len(w) for w in words} == {3, 4, 5}
    assert len(set(words)) > 200


def test_a_tenth_of_all_words_is_held_out() -> None:
    words = [f"{a}{b}{c}" for a in ALPHABET for b in ALPHABET for c in ALPHABET]
    assert 0.08 < sum(map(is_held_out, words)) / len(words) < 0.12
    # The same words on every machine.
    assert [w for w in words if is_held_out(w)][:5] == ["AAV", "ABG", "ABR", "ABT", "ABY"]


def test_regions_are_one_to_three_at_their_places() -> None:
    drawn = regions_of(600)
    counts = np.bincount([len(r) for r in drawn], minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 150
    for regions in drawn:
        order = [PLACES.index(r.place) for r in regions]
        assert order == sorted(set(order))
    assert regions_of(5, seed=1) == regions_of(5, seed=1)
    assert regions_of(5, seed=1) != regions_of(5, seed=2)


def test_letters_have_their_cells() -> None:
    letters = layout((Region("KEBA", "top"), Region("LUX", "bottom")))
    assert letters.shape == (6, 6)
    assert first_column("KEBA") == 1
    assert first_column("LUX") == 1
    assert first_column("KEBAB") == 0

    def ids(word: str) -> list[int]:
        return [1 + 2 * ALPHABET.index(c) for c in word]

    assert letters[0].tolist() == [0, *ids("KEBA"), 0]
    assert letters[1].tolist() == [0, *(i + 1 for i in ids("KEBA")), 0]
    assert letters[4].tolist() == [0, *ids("LUX"), 0, 0]
    assert letters[5].tolist() == [0, *(i + 1 for i in ids("LUX")), 0, 0]
    assert not letters[2:4].any()
    assert not layout(()).any()


def test_boxes_are_the_letters_cells() -> None:
    for regions in regions_of(50):
        for region, box in zip(regions, make_prompt(regions).boxes, strict=True):
            rows, columns = layout((region,)).nonzero()
            expected = (columns.min() / 6, rows.min() / 6, (columns.max() + 1) / 6, (rows.max() + 1) / 6)
            assert box == pytest.approx(expected, abs=1e-4)
