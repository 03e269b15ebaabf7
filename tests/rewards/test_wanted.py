"""Whether the OCR reward can be won is known before the run: wanted words, their letters, and what the engine reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tiny_runs
from varl import commands, policy_commands
from varl.cli import main
from varl.distributed import Distributed
from varl.doctor import check_legibility
from varl.policy import Prompt
from varl.rewards import check_reward
from varl.rewards.engine import Line, OcrConfig, OcrEngine
from varl.rewards.ocr import OcrReward
from varl.rewards.wanted import drawn
from varl.rewards.worker import OcrWorker

from .moody import Moody
from .test_ocr import Script


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward()


def test_prompts_without_words_are_named(reward: OcrReward) -> None:
    prompts = [Prompt("a sign 'TEA'", ("TEA",)), Prompt("a cat"), Prompt("'BUS'", ("BUS",)), Prompt("a dog")]
    with pytest.raises(ValueError, match=r"prompt 2 of 4 \('a cat'\) has none, as have 2 of 4 in all"):
        check_reward(reward, prompts)
    with pytest.raises(ValueError, match=r"labels: .*prompt 1 of 1 \('class 7'\)"):
        check_reward(reward, [Prompt(label=7)], "labels")
    with pytest.raises(ValueError, match="has none"):
        check_reward(reward, [Prompt("a", ("\u200b",))])
    check_reward(reward, [prompts[0], prompts[2]])
    check_reward(reward, [])


def test_words_of_more_characters_than_can_be_compared() -> None:
    with pytest.raises(ValueError, match=r"prompt 2 of 2 .* wants 100,000 characters"):
        check_reward(OcrReward(Script([])), [Prompt("", ("TEA",)), Prompt("long", ("a" * 100_000,))])


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("ПРИВЕТ", r"'ПРИВЕТ', .* lacks п \(CYRILLIC SMALL LETTER PE\), р .* and 1 more"),
        ("مرحبا", r"ARABIC LETTER MEEM"),
        ("नमस्ते", "DEVANAGARI"),
        ("SALE🦄", r"UNICORN FACE"),
    ],
)
def test_letters_that_the_recogniser_lacks_are_named(reward: OcrReward, word: str, named: str) -> None:
    prompts = [Prompt("a sign 'TEA'", ("TEA",)), Prompt("a sign", (word,))]
    with pytest.raises(ValueError, match=rf"prompt 2 of 2 .*{named}.*rec_model"):
        check_reward(reward, prompts)


def test_what_the_recogniser_knows_once_folded_is_fine(reward: OcrReward) -> None:
    words = ("You’re", "CAFE\u0301", "Straße", "1999–2024", "ＯＰＥＮ", "ñandú", "«oui»", "½", "中文", "™")
    check_reward(reward, [Prompt("", words)])
    assert OcrReward(confusables={"ж": "x"}).check([Prompt("", ("Ж",))]) is None  # type: ignore[func-returns-value]


def test_the_literal_way_compares_letters_literally() -> None:
    reward = OcrReward(fold=False)
    reward.check([Prompt("", ("CAFÉ",))])
    with pytest.raises(ValueError, match="COMBINING ACUTE ACCENT"):
        reward.check([Prompt("", ("CAFE\u0301",))])


def test_readers_of_ones_own_are_not_asked_for_an_alphabet() -> None:
    prompts = [Prompt("", ("ПРИВЕТ",))]
    assert OcrReward(Script([])).legibility(prompts, 9, 9.0) is None
    OcrReward(Script([])).check(prompts)
    with OcrWorker(make_reader=Moody) as reader:
        OcrReward(reader).check(prompts)
        assert OcrReward(reader).legibility(prompts, 9, 9.0) is None
    assert OcrWorker(OcrConfig()).alphabet() == OcrEngine().alphabet()


def test_a_recogniser_without_an_alphabet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Session:
        def __init__(self, path: str, *_: Any, **__: Any) -> None:
            self.custom_metadata_map: dict[str, str] = {}
            self.shape = [1] * (4 if "_det_" in path else 3)

        def get_outputs(self) -> list[Session]:
            return [self]

        def get_modelmeta(self) -> Session:
            return self

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ValueError, match=r"rec.*\.onnx names no characters"):
        OcrReward().check([Prompt("", ("TEA",))])


def test_a_single_i_cannot_be_read(reward: OcrReward) -> None:
    found = reward.legibility([Prompt("", ("I SAW", "COFFEE")), Prompt("", ("coffee", "i’m 中"))], most=50, seconds=60)
    assert found is not None
    assert found.unread == ["I"]
    assert (found.checked, found.words) == (4, 5)  # 中 is in no font here
    assert str(found) == "cannot read 'I' (4 of 5 wanted words checked, the shortest first)"


def test_the_cost_is_bounded(reward: OcrReward) -> None:
    prompts = [Prompt("", ("FISH", "AB", "CATS", "TEA"))]
    few, one = reward.legibility(prompts, 2, 60.0), reward.legibility(prompts, 9, 0.0)
    assert few is not None
    assert one is not None
    assert (few.checked, few.words) == (2, 4)
    assert one.checked == 1


class Alphabet:
    """A reader that knows its letters, reads nothing, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def alphabet(self) -> list[str]:
        return list("abc")

    def read(self, images: Tensor) -> list[list[Line]]:
        self.shown += images
        return [[]] * len(images)

    def describe(self) -> dict[str, str]:
        return {}


def test_words_are_drawn_black_on_white_within_the_picture() -> None:
    picture = drawn("Qgj")
    assert picture.shape[:2] == (3, 64)
    ink = (picture < 0.5).all(0)
    rows, columns = (ink.any(1 - axis).nonzero().flatten() for axis in (0, 1))
    assert rows.min() > 5
    assert rows.max() < 58
    assert columns.min() >= 23
    assert columns.max() <= picture.shape[2] - 23
    assert (picture[:, 0] == 1).all()
    reader = Alphabet()
    found = OcrReward(reader).legibility([Prompt("", ("ab", "c"))], 9, 60.0)
    assert found is not None
    assert found.unread == ["c", "ab"]
    assert [picture.shape[1] for picture in reader.shown] == [64] * 4  # two words in two fonts


def test_the_doctor_says_so(reward: OcrReward) -> None:
    (check,) = check_legibility(reward, [Prompt("", ("I", "TEA"))])
    assert not check.fine
    assert "'I'" in check.found
    (check,) = check_legibility(reward, [Prompt("", ("TEA", "BUS"))])
    assert check.fine
    assert check.found == "all are read (2 of 2 wanted words checked, the shortest first)"
    assert not list(check_legibility(OcrReward(Script([])), [Prompt("", ("I",))]))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return str(tiny_runs.tiny_weights(tmp_path / "tiny.safetensors"))


def words(tmp_path: Path, weights: str, command: str, source: str, *more: str) -> list[str]:
    given = ["--policy.weights", weights, "--reward", "ocr", *more]
    if command == "train":
        return [command, *given, "--prompts.source", source, "--run.out", str(tmp_path / "run"), "--run.device", "cpu"]
    return [command, *given, "--source", source, "--device", "cpu"]


@pytest.mark.parametrize("command", ["train", "evaluate", "probe", "doctor"])
def test_commands_refuse_prompts_without_words_first(
    tmp_path: Path, weights: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawing(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was drawn")

    for room in (policy_commands, commands):
        for name in ("evaluate_policy", "probe_policy", "check_policy"):
            monkeypatch.setattr(room, name, drawing, raising=False)
    (tmp_path / "prompts.txt").write_text("a sign that says 'TEA'\na sign that says 'BUS'\n" * 3 + "a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    assert main(words(tmp_path, weights, command, "prompts.txt")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "prompts.txt: the OCR reward needs wanted words: prompt 7 of 8 ('a cat') has none, as have 2 of 8" in said


def test_held_out_prompts_are_checked_too(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text("a cat\n")
    assert main(words(tmp_path, weights, "train", "inkling:train", "--evaluation.source", "held.txt")) == 2
    assert "held.txt: the OCR reward" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_training_warns_of_words_that_cannot_be_read(
    tmp_path: Path, weights: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the word 'KEBA' at the top"
    lines = [json.dumps({"text": text, "words": own}) for own in (["I"], ["TEA"])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(commands.Trainer, "run", lambda *_: None)
    more = ("--evaluation.enabled", "false", "--method.prompts", "2")
    config = tiny_runs.parse(*words(tmp_path, weights, "train", str(tmp_path / "prompts.jsonl"), *more))
    with caplog.at_level(logging.WARNING):
        commands._train(config, Distributed())
    (warning,) = [record.getMessage() for record in caplog.records if "clean picture" in record.getMessage()]
    assert "cannot read 'I' (2 of 2 wanted words checked" in warning
