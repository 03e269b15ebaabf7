"""Real sizes on another machine: their settings, what is measured of them, and what counts as failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import flops
from tools.gpu import sizes
from tools.gpu.peaks import Counted, by_phase
from tools.gpu.sizes import SIZES, config_of, faults, main, product_of
from tools.gpu.texts import TOKENS, random_texts

import tiny_runs
import varl.loading
from test_plan import config_of as tiny_shape
from varl import load_policy, updates
from varl.config import PolicyConfig
from varl.loading import prepare
from varl.models import FAMILIES
from varl.plan import HEADROOM, estimate
from varl.policy import Prompt
from varl.trainer import Trainer

pytestmark = pytest.mark.slow

MACHINE = {"ceilings": {"bf16_tflops": 2.5}}


@pytest.mark.parametrize("name", list(SIZES))
def test_a_size_is_its_recipe_with_fewer_sequences(name: str, tmp_path: Path) -> None:
    config = config_of(name, "cpu", tmp_path / "run")
    recipe = tiny_runs.parse("train", "--config", str(sizes.ROOT / "recipes" / f"{name}.yaml"))
    assert config.policy.weights == "random"
    assert (config.run.micro_batch, config.run.rollout_batch) == (recipe.run.micro_batch, recipe.run.rollout_batch)
    for field in ("family", "config", "precision", "checkpointing", "lora"):
        assert getattr(config.policy, field) == getattr(recipe.policy, field)
    assert (config.method.middle, config.method.continuations) == (recipe.method.middle, recipe.method.continuations)
    # A pass with the gradients of one before it, and as many pictures at once as the recipe draws.
    sequences = config.method.prompts * config.method.group
    assert sequences >= 2 * config.run.micro_batch
    assert sequences * config.method.continuations >= config.run.rollout_batch
    assert [updates.kind_of_update(config.method, update) for update in range(4)] == ["prefix", "suffix"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SIZES))
def test_every_size_fits_a_gpu_of_80_gb(name: str, tmp_path: Path) -> None:
    assert estimate(config_of(name, "cpu", tmp_path / "run")).peak() < HEADROOM * 80e9


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"skipped": 1}, ["no step was taken"]),
        ({"loss": float("nan")}, ["loss is nan"]),
        ({"gradient_norm": float("inf")}, ["gradient_norm is inf"]),
        ({"gradient_norm": 0.0}, ["the gradient is 0"]),
        ({"failed_pictures": 3}, ["3 pictures failed"]),
    ],
)
def test_what_is_wrong_with_an_update(changes: dict[str, Any], wrong: list[str]) -> None:
    assert faults({"loss": 0.0, "gradient_norm": 1.0, "skipped": 0, "failed_pictures": 0} | changes) == wrong


def test_the_product_is_that_of_the_machines_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "product", lambda settings, dtype: (lambda: None, 3e12))
    monkeypatch.setattr(sizes, "timed", lambda work, device: 2.0)
    file = tmp_path / "1-machine.json"
    for content in ("", "{", json.dumps({"ceilings": {}})):
        file.write_text(content)
        reached, source = product_of(file, "cpu")
        assert reached == 1.5
        assert "1-machine.json does not say ceilings.bf16_tflops" in source
    assert product_of(None, "cpu") == (1.5, "measured here: no file was given")
    file.write_text(json.dumps(MACHINE))
    assert product_of(file, "cpu") == (2.5, "1-machine.json")


def test_texts_are_read_without_encoders() -> None:
    prompts = [Prompt(text=text) for text in ("a", "b", "a")]
    with random_texts():
        infinity: Any = varl.loading.load_policy("infinity", tiny_shape("infinity"), "random")
        switti: Any = varl.loading.load_policy("switti", tiny_shape("switti"), "random")
    assert varl.loading.load_policy is load_policy
    text = infinity.condition(prompts).features["text"]
    assert text.shape == (3, min(TOKENS["infinity"], 12), 128)
    embeds = switti.condition(prompts).features["prompt_embeds"]
    assert embeds.shape == (3, TOKENS["switti"], 64)
    for rows in (text, embeds):
        assert torch.equal(rows[0], rows[2])
        assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_weights_are_made_on_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def watched(*arguments: Any) -> Any:
        made.append(torch.get_default_device().type)
        return load_policy(*arguments)

    monkeypatch.setattr(varl.loading, "load_policy", watched)
    policy: Any = prepare(PolicyConfig(family, "random", tiny_shape(family)), torch.device("meta"))
    assert made == ["meta"]
    assert {t.device.type for t in [*policy.parameters(), *policy.buffers()]} == {"meta"}


def test_infinitys_learned_text_is_drawn_by_the_cpus_generator() -> None:
    """It is seeded like upstream's; a generator of the CPU draws into no tensor of another device."""
    transformer: Any = load_policy("infinity", tiny_shape("infinity"), "random").trainable
    before = transformer.cfg_uncond.clone()
    transformer.cfg_uncond.data.zero_()
    with torch.device("meta"):
        transformer.initialise()
    assert torch.equal(transformer.cfg_uncond, before)


def test_peaks_are_those_of_their_phases(tmp_path: Path) -> None:
    config = config_of("var-d16", "cpu", tmp_path / "run", small=True)
    trainer = Trainer(config)
    memory, stage = Counted(), trainer.stage

    def held(megabytes: int) -> torch.Tensor:
        return torch.zeros(megabytes * 250_000)

    with memory.following(trainer):
        before = memory.read()
        with by_phase(trainer, memory) as peaks:
            with trainer.stage("rollout"):
                kept = held(3)
                with trainer.stage("decode"):
                    held(5)
                held(4)
            with trainer.stage("logp"):
                held(1)
            with trainer.stage("backward"):
                held(2)
            held(9)
        assert {phase: round((peak - before) / 1e6) for phase, peak in peaks.items()} == {
            "between": 12, "rollout": 7, "decode": 8, "update": 5
        }  # fmt: skip
    assert len(kept) == 750_000
    assert trainer.stage == stage
    assert set(trainer.clock.seconds()) == {"rollout", "decode", "logp", "backward"}
    trainer.folder.close()


def test_when_no_time_is_left_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, machine = tmp_path / "4-sizes.json", tmp_path / "1-machine.json"
    machine.write_text(json.dumps(MACHINE))
    words = ["--device", "cpu", "--machine", str(machine), "--out", str(out), "--small", "--limit", "0"]
    assert main(words) == 1
    result = json.loads(out.read_text())
    assert result["failed"] == ["nothing was measured"]
    assert all(entry["skipped"] == ["the time limit is over"] for entry in result["sizes"].values())
    assert "FAILED nothing was measured" in capsys.readouterr().err


def small(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """What a small run on the CPU ends with and writes."""
    machine, out = tmp_path / "1-machine.json", tmp_path / "4-sizes.json"
    machine.write_text(json.dumps(MACHINE))
    code = main(["--device", "cpu", "--machine", str(machine), "--out", str(out), "--small", *words])
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_small_models_of_the_same_families(tmp_path: Path) -> None:
    code, result = small(tmp_path)
    assert (code, result["failed"], list(result["sizes"])) == (0, [], list(SIZES))
    for name, entry in result["sizes"].items():
        config = config_of(name, "cpu", tmp_path / "run", small=True)
        assert entry["planned_gb"] == estimate(config).peak() / 1e9
        # On a CPU pictures lie beside the rest, and norms stay in bf16.
        assert entry["memory"]["of_plan"] == pytest.approx(1, abs=0.2)
        assert set(entry["memory"]["by_phase"]) == {"rollout", "decode", "update", "optimizer"}
        for kind in ("prefix", "suffix"):
            found = entry["updates"][kind]
            assert found["measured"] == "second"
            assert found["seconds"] >= sum(found["seconds_by_stage"].values())
            assert found["pictures_a_second"] == pytest.approx(found["pictures"] / found["seconds"])
            seconds = found["seconds_by_stage"]["logp"] + found["seconds_by_stage"]["backward"]
            assert found["tflop_s"] == pytest.approx(found["tflop_of_forward_and_backward"] / seconds)
            assert found["of_product"] == pytest.approx(found["tflop_s"] / 2.5)
        assert (entry["updates"]["prefix"]["pictures"], entry["updates"]["suffix"]["pictures"]) == (8, 4)


@pytest.mark.slow
def test_a_step_that_was_not_taken_fails_its_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def broken(trainer: Trainer) -> dict[str, Any]:
        return step(trainer) | {"skipped": int(trainer.config.policy.family == "infinity")}

    monkeypatch.setattr(Trainer, "step", broken)
    monkeypatch.setattr(sizes, "SIZES", {name: SIZES[name] for name in ("infinity-2b", "var-d16")})
    code, result = small(tmp_path)
    assert (code, result["failed"]) == (1, ["infinity-2b: RuntimeError: first prefix update: no step was taken"])
    assert set(result["sizes"]["infinity-2b"]["updates"]) == set()
    assert set(result["sizes"]["var-d16"]["updates"]) == {"prefix", "suffix"}


def test_operations_are_those_of_the_sequences_that_are_trained(tmp_path: Path) -> None:
    config = config_of("var-d16", "cpu", tmp_path / "run", small=True)
    trainer = Trainer(config)
    record = {"seconds": {"rollout": 1.0, "logp": 0.5, "backward": 1.5}, "loss": 0.0, "gradient_norm": 1.0}
    found = sizes._speed(trainer, "prefix", record, 3.0, 1e-6)
    plan = updates.plan("prefix", config.method, trainer.schedule)
    operations = 4 * flops.training(flops.Shape.of(trainer.policy), trainer.schedule, plan.steps)
    assert found["of_product"] == pytest.approx(operations / 2.0 / 1e6)
    assert found["goal_of_product_met"] == (operations / 2.0 / 1e6 >= 0.45)
    assert (found["pictures"], found["pictures_a_second"]) == (8, 8 / 3)
    trainer.folder.close()
