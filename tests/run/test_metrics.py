"""The metrics file: what it holds, resuming, torn lines, and its mirror in TensorBoard."""

import json
import logging

import numpy as np
import pytest
import torch

from varl.run.metrics import MetricsWriter, read_metrics


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def record(update):
    return {"update": update, "kind": "prefix", "reward": {"score": update / 3}, "kl_by_step": [0.1 * update, 0.2]}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_line_an_update(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    written = {
        "update": 1, "a": 1.5, "nan": float("nan"), "nested": {"inf": float("inf"), "list": [1, float("-inf")]},
        "tensor": torch.tensor([0.5, float("nan")]), "scalar": torch.tensor(2), "numpy": np.float32(0.25),
        "array": np.arange(2), "flag": True, "none": None, "text": "é",
    }  # fmt: skip
    writer.write(written)
    writer.write({"update": 3})
    expected = {
        "update": 1, "a": 1.5, "nan": None, "nested": {"inf": None, "list": [1, None]}, "tensor": [0.5, None],
        "scalar": 2, "numpy": 0.25, "array": [0, 1], "flag": True, "none": None, "text": "é",
    }  # fmt: skip
    assert [json.loads(line) for line in lines_of(tmp_path / "run")] == [expected, {"update": 3}]
    assert (
        read_metrics(tmp_path / "run") == read_metrics(tmp_path / "run" / "metrics.jsonl") == [expected, {"update": 3}]
    )


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    whole = MetricsWriter(tmp_path / "whole", tensorboard=False)
    for update in range(1, 8):
        whole.write(record(update))
    writer = MetricsWriter(tmp_path / "parts", tensorboard=False)
    for update in range(1, 6):
        writer.write(record(update) | {"old": True} if update > 3 else record(update))
    writer = MetricsWriter(tmp_path / "parts", tensorboard=False)
    assert writer.last_update == 5
    writer.truncate_after(3)
    for update in range(4, 8):
        writer.write(record(update))
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_truncate_to_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.truncate_after(0)
    writer.write(record(1))
    writer.truncate_after(0)
    assert read_metrics(tmp_path) == []
    writer.write(record(1))
    assert [line["update"] for line in read_metrics(tmp_path)] == [1]


def test_a_torn_last_line_is_dropped(tmp_path, caplog):
    MetricsWriter(tmp_path, tensorboard=False).write(record(1))
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"update": 2, "text": "\xc3')  # cut inside a character, too
    torn = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert [line["update"] for line in read_metrics(tmp_path)] == [1]
    assert "line 2 is half written" in caplog.text
    assert path.read_bytes() == torn  # reading changes nothing
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert writer.last_update == 1
    writer.write(record(2))
    assert read_metrics(tmp_path) == [json.loads(json.dumps(record(i))) for i in (1, 2)]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}')
    MetricsWriter(tmp_path, tensorboard=False).write({"update": 3})
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"a": 1}', '{"update": true}', '{"update": 2.0}'])
def test_a_broken_line_elsewhere_is_an_error_to_readers_and_kept_by_writers(tmp_path, caplog, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(broken := f'{{"update": 1}}\n{bad}\n{{"update": 3}}\n')
    with pytest.raises(ValueError, match="line 2 cannot be read"):
        read_metrics(tmp_path)
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, tensorboard=False)
    assert "metrics.jsonl, line 2 cannot be read" in caplog.text
    assert "the file is kept as metrics.jsonl.damaged" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == broken
    writer.write({"update": 4})
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 3, 4]
    path.write_text('{"update": 2}\n{"update": 1}\n{"update": 3}\n')
    assert MetricsWriter(tmp_path, tensorboard=False).last_update == 3
    assert [line["update"] for line in read_metrics(tmp_path)] == [2, 3]
    assert (tmp_path / "metrics.jsonl.damaged-2").exists()


@pytest.mark.parametrize("later", [[99999999999999999999], [5], [3, 5], [4, 5]])
def test_later_lines_that_do_not_follow_are_kept(tmp_path, caplog, later):
    """A run that was killed leaves lines after its last checkpoint, one an update: they are only dropped."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := "".join(f'{{"update": {update}}}\n' for update in (1, 2, *later)))
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        assert not caplog.messages
        writer.truncate_after(2)
    strange = later[0] if later[0] != 3 else 5
    assert f"{path} has a line of update {strange}, but none of the update before it" in caplog.text
    assert "the file is kept as metrics.jsonl.damaged" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == before
    writer.write({"update": 3})
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_missing_lines_are_named(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for update in (1, 2, 3):
        writer.write(record(update))
    with caplog.at_level(logging.WARNING):
        writer.truncate_after(2)
        assert not caplog.messages
        writer.truncate_after(6)
    assert "metrics.jsonl lacks 4 of the 6 updates so far, the first of them 3" in caplog.text


def test_refusals_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(record(4))
    for update in (3, 4):
        with pytest.raises(ValueError, match=f"update {update} comes after 4"):
            writer.write(record(update))
    for update in (None, 1.0, True):
        with pytest.raises(ValueError, match="needs an integer 'update'"):
            writer.write({"update": update})
    with pytest.raises(TypeError, match="metric 'a/b' is a set"):
        writer.write({"update": 5, "a": {"b": {1}}})
    assert len(lines_of(tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        read_metrics(tmp_path / "nowhere")


def test_tensorboard_gets_the_numbers(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(record(1) | {"nan": float("nan"), "flag": True})
    writer.write(record(2))
    writer.close()
    assert scalars(tmp_path) == {
        "reward/score": [(1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3))],
        "kl_by_step/step_0": [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))],
        "kl_by_step/step_1": [(1, pytest.approx(0.2)), (2, pytest.approx(0.2))],
        "flag": [(1, 1.0)],
    }


def test_tensorboard_of_a_resumed_run_has_every_update_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for update in range(1, 5):
        writer.write({"update": update, "a": float(update)})
    writer.close()
    writer = MetricsWriter(tmp_path)
    writer.truncate_after(2)
    for update in (3, 4, 5):
        writer.write({"update": update, "a": 10.0 * update})
    writer.close()
    assert scalars(tmp_path) == {"a": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]}


def test_without_tensorboard_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    writer = MetricsWriter(tmp_path)
    with caplog.at_level(logging.WARNING):
        for update in (1, 2, 3):
            writer.write(record(update))
    assert len(read_metrics(tmp_path)) == 3
    assert caplog.text.count("TensorBoard cannot be written") == 1
