"""Every resolution and aspect ratio of the table, and the positions in it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from models.infinity.cases import make_policy, needs_parity
from varl import ScaleSchedule
from varl.models.infinity import Infinity
from varl.models.infinity.rope import coordinates
from varl.models.infinity.schedules import RATIOS, RESOLUTIONS, SIDES, final_grid, grids, nearest_ratio

TOKENS = {1.0: 10521, 1.25: 10774, 1.333: 10973, 1.5: 10997, 1.75: 11252, 2.0: 11269, 2.5: 10805, 3.0: 11123}
INVERSE = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}


@pytest.fixture(scope="module")
def policy() -> Infinity:
    return make_policy()


def test_fifteen_ratios_of_thirteen_grids() -> None:
    assert len(RATIOS) == 15
    assert {ratio: ScaleSchedule(RATIOS[ratio]).tokens for ratio in TOKENS} == TOKENS
    assert all(RATIOS[INVERSE[r]] == tuple((w, h) for h, w in RATIOS[r]) for r in INVERSE)
    assert [sum(h * w for h, w in grids(name, 1.0)) for name in RESOLUTIONS] == [521, 2521, 6425, 10521]


def test_the_whole_table_is_upstreams() -> None:
    table = json.loads(needs_parity("shapes/infinity_schedules.json").read_text())["h_div_w"]
    assert {float(ratio) for ratio in table} == set(RATIOS)
    for ratio, resolutions in table.items():
        assert resolutions.keys() == RESOLUTIONS.keys()
        for name, entry in resolutions.items():
            schedule = ScaleSchedule(grids(name, float(ratio)))
            assert schedule.grids == tuple((h, w) for h, w in entry["hw"])
            assert schedule.tokens == entry["L"]
            assert schedule.image_size == tuple(entry["pixel_hw"])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", RESOLUTIONS)
def test_the_middle_step_by_every_name(policy: Infinity, ratio: float, name: str) -> None:
    schedule = policy.schedules(name, ratio)
    sides = [(h * w) ** 0.5 for h, w in schedule.grids]
    assert len(schedule) == RESOLUTIONS[name]
    for step in range(len(schedule) - 1):
        side = round(sides[step])
        last = max(i for i, other in enumerate(sides) if round(other) == side)
        if last < len(schedule) - 1:
            assert schedule.middle(f"grid:{side}") == schedule.middle(f"pixels:{16 * side}") == last + 1
        assert schedule.middle(step + 1) == step + 1
    quarter = schedule.middle("quarter")
    assert sides[quarter - 1] <= sides[-1] / 4 < sides[quarter]
    height, width = schedule.image_size
    assert abs(height / width - ratio) < 0.13 * ratio


def test_quarters_of_the_square_schedules(policy: Infinity) -> None:
    assert [policy.schedules(side).middle("quarter") for side in SIDES] == [3, 5, 6, 7]
    assert policy.schedules(1024).middle("pixels:256") == 7


def test_a_schedule_is_found_by_name_side_and_nearest_ratio(policy: Infinity) -> None:
    for side, name in SIDES.items():
        assert policy.schedules(name, 1.0) == policy.schedules(side, 1.0) == policy.schedules(side, 1.1)
        assert policy.schedules(side).image_size == (side, side)
    assert policy.schedules("0.25M", 16 / 9).image_size == (672, 384)
    assert policy.schedules("0.25M", 9 / 16).image_size == (384, 672)
    assert [nearest_ratio(r) for r in (0.1, 0.36, 0.7, 1.1249, 1.126, 1.29, 9)] == [
        0.333,
        0.333,
        0.666,
        1,
        1.25,
        1.25,
        3,
    ]
    assert policy.schedules() == policy.default_schedule
    assert policy.schedules(None, 2.0) == policy.schedules("1M", 2.0)
    assert make_policy(pn="0.06M", h_div_w=1.5, scale_schedule=None).default_schedule.image_size == (336, 224)
    for wrong in (300, "2M"):
        with pytest.raises(ValueError, match=r"no resolution .*0.06M \(256\), 0.25M \(512\)"):
            policy.schedules(wrong)
    with pytest.raises(ValueError, match="height / width and positive"):
        policy.schedules(256, 0.0)


def test_a_schedule_belongs_to_the_ratio_whose_list_it_begins() -> None:
    for ratio, known in RATIOS.items():
        assert all(final_grid(known[:count], ratio) == known[-1] for count in range(1, 14))
        assert all(final_grid(known[:count]) == known[-1] for count in range(6, 14))
    assert final_grid(((1, 1), (2, 2), (5, 7))) == RATIOS[0.75][-1]
    assert final_grid(((1, 1), (2, 2), (5, 7)), 3.0) == RATIOS[0.75][-1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_coordinates_in_the_largest_grid(ratio: float) -> None:
    table = load_file(needs_parity("shapes/infinity_rope_coords.safetensors"))[f"hw_{ratio}"]
    pairs = [coordinates(grid, final_grid(RATIOS[ratio]), 2) for grid in RATIOS[ratio]]
    found = torch.cat([torch.cartesian_prod(rows, columns) for rows, columns in pairs])
    assert torch.equal(found.to(table.dtype), table)


def test_positions_do_not_depend_on_the_resolution() -> None:
    """The same table row for a token of a short schedule as for it in the long one."""
    tables = [make_policy().transformer.rotary(ScaleSchedule(grids(name, 1.5)), range(7)) for name in ("0.06M", "1M")]
    assert torch.equal(*tables)
    rows, _ = coordinates((3, 2), (78, 52), 2)
    assert rows.tolist() == [0, 26, 52]
    assert coordinates((4, 4), (70, 70), 2)[0].tolist() == [0, 18, 35, 52]  # halves go to the even one
    assert coordinates((4, 2), (70, 70), 0)[0].tolist() == [0, 1, 2, 3]
