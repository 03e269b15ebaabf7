"""The pictures of a run, looked at pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from varl.algorithm import propagate
from varl.policy import Prompt
from varl.run import gallery
from varl.run.gallery import mask_overlay, save_before_after, save_gallery, save_pictures
from varl.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square([1, 2, 4], stride=4)
COLOR = np.array([100, 150, 210])
GREY = 0.299 * 100 + 0.587 * 150 + 0.114 * 210


def load(path):
    return np.asarray(Image.open(path).convert("RGB"))


def where(sheet, block):
    """Top left corners, (y, x), at which a block is in a sheet."""
    block = np.asarray(block)
    h, w = block.shape[:2]
    starts = np.argwhere((sheet[: len(sheet) - h + 1, : sheet.shape[1] - w + 1] == block[0, 0]).all(-1))
    return [(y, x) for y, x in starts.tolist() if np.array_equal(sheet[y : y + h, x : x + w], block)]


def count(sheet, color):
    return int((sheet == color).all(-1).sum())


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


PROMPTS = [Prompt("a sign 'KEBA' and 'LUX'", ("KEBA", "LUX")), Prompt("a cat"), Prompt(label=3, words=("RUN",))]


def test_overlay_colours():
    picture = np.broadcast_to(COLOR.astype(np.uint8), (8, 8, 3)).copy()
    mask = np.array([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    out = np.asarray(mask_overlay(picture, mask, (60, 90)), float)
    assert out.shape == (90, 60, 3)
    tinted, dimmed = (COLOR + np.array(gallery.TINT)) / 2, np.full(3, GREY * gallery.DIMMED)
    for i in range(3):
        for j in range(3):
            expected = mask[i, j] * tinted + (1 - mask[i, j]) * dimmed
            inside = out[30 * i + 1 : 30 * i + 30, 20 * j + 1 : 20 * j + 20]
            assert np.abs(inside - expected).max() <= 0.51
    assert np.abs(out[30, 0] - (dimmed * 0.7 + 255 * 0.3)).max() <= 0.51  # the line above the second row
    assert np.abs(out[0, 20] - (dimmed * 0.7 + 255 * 0.3)).max() <= 0.51
    assert np.abs(out[0, 0] - tinted).max() <= 0.51


def test_narrow_cells_have_no_lines():
    picture = np.broadcast_to(COLOR.astype(np.uint8), (8, 8, 3)).copy()
    assert len(np.unique(np.asarray(mask_overlay(picture, np.ones((10, 10)), (50, 50))).reshape(-1, 3), axis=0)) == 2
    assert len(np.unique(np.asarray(mask_overlay(picture, np.ones((10, 10)), (49, 50))).reshape(-1, 3), axis=0)) == 1


def test_gallery_shows_each_picture_and_its_mask_at_every_scale(tmp_path, images):
    finest = torch.zeros(3, 4, 4)
    finest[0, 0, 1], finest[1, 3, 3], finest[2] = 1, 1, 1
    masks = propagate(finest, SCHEDULE)
    path = tmp_path / "new" / "gallery.png"
    save_gallery(
        path, PROMPTS, images, torch.tensor([1.0, 0.5, -0.1]), torch.zeros(3), ["keba", "", "run"], masks, SCHEDULE, 2
    )
    sheet = load(path)
    corners = []
    for i in range(3):
        picture = (images[i] * 255).round().byte().permute(1, 2, 0).numpy()
        at = where(sheet, picture.repeat(12, 0).repeat(12, 1))
        assert len(at) == 1
        corners += at
        tiles = []
        for step, side in enumerate((1, 2, 4)):
            mask = masks[i, SCHEDULE.tokens_of(step)].reshape(side, side).numpy()
            tiles += where(sheet, mask_overlay(picture, mask, (96, 96)))
        assert len(tiles) == 3
        (y, x), (y0, x0), (y1, x1), (y2, x2) = at[0], *tiles
        assert y == y0 == y1 < y2  # two rows beside the picture
        assert x + 192 < x0 == x2 < x1
    assert corners[0][0] == corners[1][0] < corners[2][0]  # two columns
    assert corners[0][1] == corners[2][1] < corners[1][1]
    assert count(sheet, gallery.HIT) > 20 < count(sheet, gallery.MISS)  # LUX and the rest were not all read


def test_gallery_with_the_least(tmp_path, images):
    path = tmp_path / "g.png"
    save_gallery(path, PROMPTS, images, torch.ones(3), None, None, None, SCHEDULE)
    sheet = load(path)
    assert count(sheet, gallery.HIT) == count(sheet, gallery.MISS) == 0
    save_gallery(path, PROMPTS, images, torch.tensor([1.0, torch.nan, 1.0]), None, None, None, SCHEDULE)
    assert count(load(path), gallery.MISS) > 0  # "failed"


def test_gallery_of_wide_and_large_pictures(tmp_path):
    schedule = ScaleSchedule(((1, 2), (2, 4)), stride=200)
    images = torch.linspace(0, 1, 800).expand(1, 3, 400, 800)
    save_gallery(
        tmp_path / "g.png", [Prompt("x " * 300)], images, torch.ones(1), None, ["y" * 300], torch.ones(1, 10), schedule
    )
    sheet = load(tmp_path / "g.png")
    picture = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert len(where(sheet, mask_overlay(picture, np.ones((2, 4)), (128, 64)))) == 1
    assert sheet.shape[1] < 256 + 128 + 100  # long texts do not widen it


def test_text_is_cut_to_its_lines():
    one = gallery._flow([("word", gallery.INK)] * 100, 150, 1)
    two = gallery._flow([("word", gallery.INK)] * 100, 150, 2)
    assert one.width == two.width == 150
    assert two.height == 2 * one.height
    assert np.array_equal(np.asarray(two)[: one.height, :30], np.asarray(one)[:, :30])
    short = gallery._flow([("word", gallery.INK)], 150, 2)
    assert short.height == one.height
    longest = gallery._flow([("w" * 100, gallery.INK), ("x", gallery.INK)], 150, 1)
    assert (np.asarray(longest)[:, -1] == 255).all()  # nothing runs over the edge


def test_before_after_marks_hits_and_misses(tmp_path, images):
    prompts = [PROMPTS[0]] * 3
    path = tmp_path / "ba.png"

    def colours(before, after):
        save_before_after(path, prompts, images, 1 - images, before, after)
        sheet = load(path)
        return count(sheet, gallery.HIT), count(sheet, gallery.MISS)

    all_missed = colours(["", "x", "kebalux"], [""] * 3)
    assert all_missed[0] == 0 < all_missed[1]
    one_word = colours(["", "x", "kebalux"], ["lux", "", ""])
    assert 0 < one_word[0] < 200  # a word, but no edge
    assert one_word[1] < all_missed[1]
    one_picture = colours(["", "x", "kebalux"], ["Lux keba", "", ""])
    assert one_picture[0] > 4 * 192
    everything = colours(["lux keba"] * 3, ["lux keba"] * 3)
    assert everything[0] > 5 * one_picture[0]
    assert everything[1] == 0


def test_an_edge_is_green_only_if_all_of_several_texts_were_read(tmp_path, images):
    prompts, found = [Prompt("", words=("keba", "lux"))] * 3, []
    for read in ("keba", "keba lux"):
        save_before_after(tmp_path / "ba.png", prompts, images, images, [read, "", ""], [""] * 3)
        found.append(count(load(tmp_path / "ba.png"), gallery.HIT))
    assert 0 < found[0] < 200
    assert found[1] > 4 * 192


def test_words_are_green_as_the_reward_compares_them(tmp_path, images):
    """Here an accent of its own letter beside the same as one letter, which are equal only if folded."""
    prompts, read = [Prompt("", words=("CAFE\u0301",))] * 3, ["CAF\u00c9"] * 3
    for fold in (True, False):
        save_before_after(tmp_path / "ba.png", prompts, images, images, read, read, fold=fold)
        score = torch.ones(3)
        save_gallery(tmp_path / "g.png", prompts, images, score, None, read, None, SCHEDULE, fold=fold)
        for name in ("ba.png", "g.png"):
            sheet = load(tmp_path / name)
            hits, misses = count(sheet, gallery.HIT), count(sheet, gallery.MISS)
            assert (hits > 20, misses > 20) == (fold, not fold), name


def test_before_after_places(tmp_path, images):
    path = tmp_path / "ba.png"
    save_before_after(path, PROMPTS, images, images.flip(3), ["", "", ""], ["", "", ""], columns=2)
    sheet = load(path)
    places = []
    for side in (images, images.flip(3)):
        shown = (side * 255).round().byte().permute(0, 2, 3, 1).numpy().repeat(12, 1).repeat(12, 2)
        found = [where(sheet, picture) for picture in shown]
        assert [len(at) for at in found] == [1, 1, 1]
        places.append([at[0] for at in found])
    before, after = places
    for (y0, x0), (y1, x1) in zip(before, after, strict=True):
        assert x0 == x1
        assert y0 + 192 < y1
    assert before[0][0] == before[1][0] < after[0][0] < before[2][0]


def test_pictures_above_their_prompts(tmp_path, images):
    path = tmp_path / "p.png"
    for columns, rows in ((None, 1), (2, 2), (1, 3)):
        save_pictures(path, PROMPTS, images, columns)
        sheet = load(path)
        shown = (images * 255).round().byte().permute(0, 2, 3, 1).numpy().repeat(12, 1).repeat(12, 2)
        places = [where(sheet, picture) for picture in shown]
        assert [len(at) for at in places] == [1, 1, 1]
        assert len({at[0][0] for at in places}) == rows
        (y, x) = places[0][0]
        below = sheet[y + 192 : y + 230, x : x + 192]
        assert count(below, gallery.INK) > 20  # the prompt


def test_refusals(tmp_path, images):
    ones = torch.ones(3)
    path = tmp_path / "g.png"
    with pytest.raises(ValueError, match="there are 3 images, but 2 prompts"):
        save_gallery(path, PROMPTS[:2], images, ones, None, None, None, SCHEDULE)
    with pytest.raises(ValueError, match="there are 3 images, but 1 texts"):
        save_gallery(path, PROMPTS, images, ones, None, ["a"], None, SCHEDULE)
    with pytest.raises(ValueError, match=r"masks must be \[3, 21\] for this schedule, got \(3, 20\)"):
        save_gallery(path, PROMPTS, images, ones, None, None, torch.ones(3, 20), SCHEDULE)
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\]"):
        save_gallery(path, [], images[:0], ones[:0], None, None, None, SCHEDULE)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        save_gallery(path, PROMPTS, images, ones, None, None, None, SCHEDULE, 0)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        save_before_after(path, PROMPTS, images, images, [""] * 3, [""] * 3, 0)
    with pytest.raises(ValueError, match="there are 3 images, but 1 prompts"):
        save_pictures(path, PROMPTS[:1], images)
    with pytest.raises(ValueError, match="there are 2 images, but 3 prompts"):
        save_before_after(path, PROMPTS, images, images[:2], [""] * 3, [""] * 2)
    assert not path.exists()
