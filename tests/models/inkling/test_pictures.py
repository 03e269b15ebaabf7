import numpy as np
import pytest

from varl.models.inkling.pictures import FONTS, HEIGHTS, WIDTH, _glyph, draw
from varl.models.inkling.text import ALPHABET, Region, layout, random_regions


def ink(picture: np.ndarray) -> np.ndarray:
    """Where a picture differs from its corner, which is paper."""
    return np.abs(picture - picture[:, 47:48, 47:48]).max(0) > 0.05


def test_pictures_are_pictures() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        picture = draw(random_regions(rng), rng)
        assert picture.shape == (3, 48, 48)
        assert picture.dtype == np.float32
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert np.ptp(picture.mean(0)) > 0.2


def test_ink_is_where_the_letters_belong() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        regions = random_regions(rng)
        cells = ink(draw(regions, rng)).reshape(6, 8, 6, 8).any((1, 3))
        wanted = layout(regions) > 0
        assert np.array_equal(cells, wanted)


def test_the_letter_is_the_one_asked_for() -> None:
    """Each cell pair holds its letter's glyph, up to colours and a vertical shift."""
    rng = np.random.default_rng(3)
    for word in ("KEBA", "XYZ"):
        picture = draw((Region(word, "middle"),), rng).mean(0)
        paper = picture[0, 0]
        alpha = np.abs(picture - paper) / np.abs(picture - paper).max()
        for i, letter in enumerate(word):
            left = (1 + i) * 8
            found = alpha[16:32, left : left + WIDTH]

            def distance(other: str, found: np.ndarray = found) -> float:
                best = np.inf
                for font in range(len(FONTS)):
                    for height in HEIGHTS:
                        glyph = _glyph(font, height, other)
                        for top in range(16 - height + 1):
                            full = np.zeros((16, WIDTH))
                            full[top : top + height] = glyph
                            best = min(best, float(np.square(found - full).sum()))
                return best

            assert min(ALPHABET, key=distance) == letter


def test_pictures_are_of_their_seed() -> None:
    regions = (Region("KEBA", "top"),)
    one, again, other = (draw(regions, np.random.default_rng(s)) for s in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("font", range(len(FONTS)))
def test_glyphs_fill_their_height(font: int) -> None:
    for letter in ALPHABET:
        glyph = _glyph(font, 12, letter)
        assert glyph.shape == (12, WIDTH)
        assert 0.1 < glyph.mean() < 0.9
        assert glyph.max() > 0.7
        for edge in (glyph[0], glyph[-1]):
            assert edge.max() > 0.1
