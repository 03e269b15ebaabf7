import pytest

from varl import ScaleSchedule

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
REFERENCE = ScaleSchedule.square(SIDES)


@pytest.mark.parametrize(
    ("pixels", "steps", "tokens"),
    [(64, 4, 30), (128, 8, 204), (256, 12, 900), (512, 16, 3684), (1024, 18, 10084)],
)
def test_table_6(pixels: int, steps: int, tokens: int) -> None:
    schedule = ScaleSchedule.square(SIDES[:steps])
    assert (len(schedule), schedule.tokens, schedule.image_size) == (steps, tokens, (pixels, pixels))
    assert REFERENCE.prefix_tokens(steps) == tokens
    assert steps == 18 or REFERENCE.middle(f"pixels:{pixels}") == steps


def test_counts_and_offsets_of_oblong_grids() -> None:
    schedule = ScaleSchedule(((1, 1), (1, 2), (2, 3)), stride=8)
    assert schedule.counts == (1, 2, 6)
    assert schedule.offsets == (0, 1, 3, 9)
    assert schedule.tokens == 9
    assert schedule.image_size == (16, 24)
    assert schedule.step_of_token() == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert schedule.tokens_of(1) == slice(1, 3)
    assert schedule.span(range(1, 3)) == slice(1, 9)
    assert schedule.describe() == "1x1 1x2 2x3 (9 tokens, 24x16 pixels)"


@pytest.mark.parametrize("steps", [range(0), range(2, 2), range(4), range(-1, 2), range(0, 3, 2), range(2, 0, -1)])
def test_span_refuses_what_is_no_run_of_steps(steps: range) -> None:
    with pytest.raises(ValueError, match="consecutive"):
        ScaleSchedule.square([1, 2, 3]).span(steps)


@pytest.mark.parametrize(
    ("name", "m"),
    [
        ("quarter", 12),
        ("grid:16", 12),
        ("pixels:256", 12),
        (12, 12),
        ("12", 12),
        ("grid:1", 1),
        ("pixels:128", 8),
        ("grid:48", 17),
        (1, 1),
        (17, 17),
    ],
)
def test_every_way_of_naming_m(name: int | str, m: int) -> None:
    assert REFERENCE.middle(name) == m


def test_quarter_is_16_of_64() -> None:
    assert REFERENCE.grids[REFERENCE.middle("quarter") - 1] == (16, 16)
    # The last step at or below a quarter, where none is at a quarter exactly.
    assert ScaleSchedule.square([1, 2, 3, 6, 15]).middle("quarter") == 3


def test_sides_of_oblong_grids_are_rounded_roots() -> None:
    schedule = ScaleSchedule(((1, 1), (3, 5), (6, 10), (12, 20)))
    assert schedule.middle("grid:4") == 2
    assert schedule.middle("pixels:64") == 2
    assert schedule.middle("grid:8") == 3
    assert schedule.middle("quarter") == 2


def test_the_last_of_several_grids_of_one_side_is_meant() -> None:
    assert ScaleSchedule.square([1, 2, 2, 4]).middle("grid:2") == 3


@pytest.mark.parametrize("name", ["grid:9", "pixels:250"])
def test_an_unknown_side_lists_those_there_are(name: str) -> None:
    kind, value = name.split(":")
    with pytest.raises(ValueError, match=rf"no step of the schedule has {kind} {value}; the steps have ") as error:
        REFERENCE.middle(name)
    scale = 1 if kind == "grid" else 16
    assert ", ".join(str(s * scale) for s in SIDES) in str(error.value)


@pytest.mark.parametrize("name", [0, 18, -1, "19", "grid:64", "pixels:1024"])
def test_a_split_needs_two_sides(name: int | str) -> None:
    with pytest.raises(ValueError, match="1 <= m <= 17"):
        REFERENCE.middle(name)


def test_quarter_of_a_schedule_without_a_coarse_step() -> None:
    with pytest.raises(ValueError, match="is 0 of 2 steps"):
        ScaleSchedule.square([4, 8]).middle("quarter")


@pytest.mark.parametrize("name", ["half", "grid:", "grid:x", "grid:-2", "pixels", "", "1.5", 1.5])
def test_what_names_no_step(name: int | str) -> None:
    with pytest.raises(ValueError, match="is not a middle step"):
        REFERENCE.middle(name)


def test_impossible_grids() -> None:
    for grids, stride in (((), 16), (((0, 1),), 16), (((1, 1),), 0)):
        with pytest.raises(ValueError, match="grid"):
            ScaleSchedule(grids, stride)
