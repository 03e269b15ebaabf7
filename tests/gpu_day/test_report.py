"""The table of a day, from whatever is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools.gpu import parts
from tools.gpu.parts import FILES, PARTS
from tools.gpu.report import main, note, outcome, report

MACHINE = {
    "date": "2026-12-24T10:00:00+00:00",
    "card": {"name": "A Card", "memory_gib": 79.64782},
    "versions": {"python": "3.12.3", "torch": "2.11.0", "driver": None, "rich": "15"},
    "ceilings": {"copy_gb_per_s": 3012.345, "bf16_tflops": 701.23456},
    "problems": [],
}


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_parts_have_the_limits_and_files_that_fit_ten_minutes() -> None:
    assert [(part.number, part.seconds) for part in PARTS] == [(1, 60), (2, 150), (3, 120), (4, 180), (5, 60)]
    assert sum(part.seconds for part in PARTS) <= 600
    assert len(set(FILES)) == len(FILES) == 8


def test_a_rehearsal_has_twice_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert parts.main(["list"]) == parts.main(["list", "--small"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [
        *("1 60", "2 150", "3 120", "4 180", "5 60"),
        *("1 120", "2 300", "3 240", "4 360", "5 120"),
    ]


def test_nothing_is_said_to_have_run_before_anything_has(tmp_path: Path) -> None:
    main([str(tmp_path)])
    found = rows((tmp_path / "day.md").read_text())
    assert [row[2:4] for row in found[2:]] == [["not run", ""]] * 5


def test_card_date_versions_and_a_row_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1-machine.json").write_text(json.dumps(MACHINE))
    main([str(tmp_path), "--part", "1", "--code", "0", "--seconds", "31"])
    main([str(tmp_path), "--part", "3", "--code", "124", "--seconds", "125"])
    main([str(tmp_path), "--part", "5", "--code", "3", "--seconds", "4"])
    lines = (tmp_path / "day.md").read_text().splitlines()
    assert lines[:3] == ["# A Card, 2026-12-24", "", "python 3.12.3, torch 2.11.0"]
    assert [row[2:] for row in rows("\n".join(lines))[2:7]] == [
        ["passed", "31.0", "60"],
        ["not run", "", "150"],
        ["failed: ended after 125 s", "125.0", "120"],
        ["not run", "", "180"],
        ["failed", "4.0", "60"],
    ]
    assert "part 3, Training to the end: failed: ended after 125 s, 125 s of 120" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1-machine.json",
        "3-train.json",
        "5-benchmarks.json",
        "day.md",
    ]


def test_figures_are_tables_to_four_digits(tmp_path: Path) -> None:
    (tmp_path / "1-machine.json").write_text(json.dumps(MACHINE))
    found = rows(report(tmp_path))
    assert ["copy_gb_per_s", "3012"] in found
    assert ["bf16_tflops", "701.2"] in found
    assert ["memory_gib", "79.65"] in found
    assert ["driver", "-"] in found


def test_lists_of_objects_are_tables_with_a_column_for_each_name(tmp_path: Path) -> None:
    sizes = {"models": [{"name": "a|b", "peak": 1.23456}, {"name": "c", "fits": True, "stages": {"draw": 0.5}}]}
    (tmp_path / "4-sizes.json").write_text(json.dumps(sizes))
    text = report(tmp_path)
    assert "**models**" in text
    assert "| name | peak | fits | stages |" in text
    assert "| a\\|b | 1.235 |  |  |" in text
    assert "| c |  | yes | draw 0.5 |" in text


def test_objects_of_one_kind_are_the_columns_of_a_table(tmp_path: Path) -> None:
    of_d16 = {"seconds": 2.0, "memory": {"peak_gb": 9.0, "plan": [{"what": "weights"}]}}
    sizes = {"sizes": {"d16": of_d16, "d30": {"memory": {"peak_gb": 40.0}, "skipped": ["no time"]}}}
    (tmp_path / "4-sizes.json").write_text(json.dumps(sizes))
    _, _, text = report(tmp_path).partition("**sizes**")
    assert rows(text) == [
        ["", "d16", "d30"],
        ["---"] * 3,
        ["seconds", "2", ""],
        ["memory, peak_gb", "9", "40"],
        ["skipped", "", "no time"],
    ]


def test_long_tables_are_cut_and_say_where_the_rest_is(tmp_path: Path) -> None:
    (tmp_path / "2-tests.json").write_text(json.dumps({"cases": [{"n": n} for n in range(100)]}))
    text = report(tmp_path)
    assert "| 79 |" in text
    assert "| 80 |" not in text
    assert "20 more rows are in 2-tests.json." in text


@pytest.mark.parametrize("written", ['{"a": [1, 2', "", "\\x00"])
def test_a_file_that_a_part_did_not_finish_is_said_to_be_so(tmp_path: Path, written: str) -> None:
    (tmp_path / "2-tests.json").write_text(written)
    text = report(tmp_path)
    assert "failed: it has not ended" in text
    assert "the part did not write its file to the end" in text
    note(tmp_path, PARTS[1], 137, 150)
    assert "failed: ended after 150 s" in report(tmp_path)


def test_a_note_keeps_what_the_part_wrote(tmp_path: Path) -> None:
    (tmp_path / "2-tests.json").write_text('{"passed": 7}')
    note(tmp_path, PARTS[1], 0, 12.34)
    found = json.loads((tmp_path / "2-tests.json").read_text())
    assert found == {"passed": 7, "day": {"result": "passed", "seconds": 12.3}}


def test_exit_statuses_in_words() -> None:
    found = [outcome(code, 60) for code in (0, 1, 124, 137, 130)]
    assert found == ["passed", "failed", "failed: ended after 60 s", "failed: ended after 60 s", "interrupted"]
