"""What ``python -m benchmarks`` counts and compares: operations, needs, the naive way; not seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import compiled, flops
from benchmarks.__main__ import SECTIONS, SHORT, parse
from benchmarks.bound import Arm, best, needs, needs_of
from benchmarks.compiled import compiler
from benchmarks.measure import Goal, Row, Settings, Spread, generators, product
from benchmarks.ocr import GAP, sheet
from benchmarks.options import OPTIONS
from benchmarks.peaks import peak
from benchmarks.savings import SAVINGS, Saving, all_classes_sorted
from benchmarks.scaling import exponent, straightness
from benchmarks.shapes import Bench, Kind, Naive, Step, extent, paper, sides, var_shaped
from benchmarks.updates import Case, case_rows, cases, check
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_runs
from small import counting
from test_plan import TEXT, condition_of, config_of
from varl import Prompt, Sampling, ScaleSchedule, load_policy
from varl.adapters import add_adapters
from varl.config import AdapterConfig, EvaluationConfig, MethodConfig, PolicyConfig, RunConfig, TrainConfig
from varl.policy import Condition, Policy
from varl.rollout import row_generators
from varl.sampling import filter_logits
from varl.updates import plan

pytestmark = pytest.mark.slow

VAR = {
    "transformer": {"embed_dim": 64, "num_heads": 2, "depth": 3, "patch_nums": (1, 2, 3, 4), "mlp_ratio": 3.0},
    "tokenizer": {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "vocab_size": 80, "z_channels": 16},
}
LINEAR = ("aten.mm", "aten.addmm")
METHOD = MethodConfig(middle="grid:3", prompts=2, group=4, continuations=2)


def counted_policy(family: str) -> Policy:
    """A small random policy of a family."""
    name, _, ar = family.partition("-")
    policy = load_policy(name, config_of(name, **({"use_ar": bool(ar)} if name == "switti" else {})), "random")
    cast(nn.Module, policy).requires_grad_(False)
    policy.trainable.requires_grad_(True)
    return policy


def text_of(policy: Policy) -> int:
    """Tokens of text of ``condition_of``."""
    return {"infinity": TEXT, "switti": 77}.get(policy.family, 0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two prompts, groups of four, on a tiny Inkling with a reward that has regions."""
    weights = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors")
    config = TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        reward="tiny_runs:score",
        sampling=Sampling(guidance=2.0, top_k=8),
        method=METHOD,
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(micro_batch=3),
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    return Bench(config, Settings(threads=1), runs)


def matrix_flop(counter: FlopCounterMode, kinds: tuple[str, ...]) -> int:
    """The counted operations of some kinds of operators."""
    return sum(count for operator, count in counter.get_flop_counts()["Global"].items() if str(operator) in kinds)


@pytest.mark.parametrize("steps", [range(2), range(4), range(2, 4)])
@pytest.mark.parametrize("family", ["inkling", "var", "infinity", "switti", "switti-ar"])
def test_forward_is_counted_exactly(family: str, steps: range):
    policy = counted_policy(family)
    condition, schedule = condition_of(policy), policy.default_schedule
    shape = flops.Shape.of(policy, text_of(policy))
    actions = torch.randint(policy.classes, (2, schedule.tokens, *policy.event))
    with torch.no_grad():
        state = policy.prefill(condition, actions, steps.start) if steps.start else None
    # Torch does not count its fused attention on a CPU; the plain one is two batched products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.logits(policy.hidden(condition, actions, steps, state))
    pooling = 0
    if family == "infinity":  # what it pools a text with, which is left out
        config = policy.trainable.config  # type: ignore[union-attr]
        pooling = 4 * TEXT * config.embed_dim
    assert matrix_flop(counter, LINEAR) == 2 * flops.linear(shape, schedule, steps)
    assert matrix_flop(counter, ("aten.bmm",)) == 2 * (flops.attention(shape, schedule, steps) + pooling)
    assert flops.forward(shape, schedule, steps) == flops.linear(shape, schedule, steps) + flops.attention(
        shape, schedule, steps
    )


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["inkling", "var", "infinity", "switti"])
def test_backward_costs_a_product_for_each_gradient(family: str, lora: bool):
    """Two for each of forward's, and one where a weight is frozen, but for what needs no gradient at all."""
    policy = counted_policy(family)
    if lora:
        add_adapters(policy, AdapterConfig(rank=16))
    condition, schedule = condition_of(policy), policy.default_schedule
    shape = flops.Shape.of(policy, text_of(policy))
    actions, steps = torch.randint(policy.classes, (2, schedule.tokens, *policy.event)), range(len(schedule))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.logits(policy.hidden(condition, actions, steps)).sum().backward()
    counted = 2 * flops.training(shape, schedule, steps)
    assert matrix_flop(counter, (*LINEAR, "aten.bmm")) == pytest.approx(counted, rel=0.02)
    forward = flops.forward(shape, schedule, steps)
    if lora:
        assert 2.0 < counted / 2 / forward < 2.4
    else:
        assert counted / 2 == pytest.approx(3 * forward)


def test_backward_of_var_is_counted_exactly():
    policy = load_policy("var", VAR, "random")
    condition = policy.condition([Prompt(label=0)])
    schedule, shape = condition.schedule, flops.Shape.of(policy)
    logits = policy.logits(policy.hidden(condition, torch.randint(80, (1, schedule.tokens)), range(4)))
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    # Input maps need no gradient: that one product is not there.
    maps = 2 * (schedule.tokens - 1) * 16 * 64
    assert matrix_flop(counter, LINEAR) == 2 * flops.linear(shape, schedule, range(4)) - maps


def test_a_family_that_is_not_counted_is_named():
    with pytest.raises(ValueError, match="inkling, var, infinity, switti, not for tokenflow"):
        flops.Shape.of(load_policy("tokenflow", config_of("tokenflow"), "random"))


def test_a_shared_prefix_is_counted_once_a_group_and_never_by_the_head():
    policy = load_policy("var", VAR, "random")
    schedule, shape, method = policy.default_schedule, flops.Shape.of(policy), METHOD
    plans = {kind: plan(kind, method, schedule) for kind in ("prefix", "suffix")}  # type: ignore[arg-type]
    head = 2 * 64 * 80
    prefix, suffix = (flops.forward(shape, schedule, plans[kind].steps) for kind in ("prefix", "suffix"))
    tokens = schedule.prefix_tokens(plans["suffix"].steps.start)
    assert flops.learning(shape, schedule, plans["prefix"], 8) == 3 * 8 * prefix
    assert flops.learning(shape, schedule, plans["suffix"], 8) == 3 * (8 * suffix + 2 * (prefix - tokens * head))
    alone = replace(shape, causal=False)
    seen = flops.forward(alone, schedule, plans["suffix"].steps)
    assert flops.learning(alone, schedule, plans["suffix"], 8) == 3 * 8 * seen < 3 * 8 * suffix


def test_an_updates_operations_are_its_needs():
    schedule = ScaleSchedule.square((1, 2, 4))
    shape = flops.Shape((flops.Product("token", 100.0), flops.Product("scored", 7.0), flops.Product("row", 9.0)), 3.0)
    parts = [flops.forward(shape, schedule, steps) for steps in (range(2), range(2, 3))]
    assert parts == [5 * 107 + 9 + 3 * (1 + 4 * 5), 16 * 107 + 9 + 3 * 16 * 21]
    counted = needs("prefix", prompts=1, group=3, continuations=2, prefix=5, suffix=16, guided=False, reference=True)
    assert flops.update(shape, schedule, 2, counted) == pytest.approx(3 * parts[0] * (1 + 3 + 1) + 6 * parts[1])
    counted = needs("suffix", prompts=2, group=3, continuations=2, prefix=5, suffix=16, guided=True, reference=False)
    assert flops.update(shape, schedule, 2, counted) == pytest.approx(2 * parts[0] * (2 + 3) + 6 * parts[1] * (2 + 3))


def test_needs_in_closed_form():
    shape = {"prompts": 2, "group": 16, "continuations": 3, "prefix": 900, "suffix": 9184}
    assert needs("prefix", **shape, guided=True, reference=True) == {
        "draw prefix": 32 * 900 * 2,
        "draw suffix": 96 * 9184 * 2,
        "decode": 96,
        "score": 96,
        "train prefix": 32 * 900,
        "reference prefix": 32 * 900,
        "optimizer": 1,
    }
    assert needs("suffix", **shape, guided=False, reference=True) == {
        "draw prefix": 2 * 900,
        "draw suffix": 32 * 9184,
        "decode": 32,
        "score": 32,
        "train prefix": 2 * 900,
        "train suffix": 32 * 9184,
        "reference prefix": 2 * 900,
        "reference suffix": 32 * 9184,
        "optimizer": 1,
    }


def test_reused_sequences_need_no_drawing():
    shape = {"prompts": 2, "group": 4, "continuations": 3, "prefix": 5, "suffix": 16}
    assert needs("suffix", **shape, guided=True, reference=True, reuses=True) == {
        "train prefix": 8 * 5,
        "train suffix": 24 * 16,
        "reference prefix": 8 * 5,
        "reference suffix": 24 * 16,
        "optimizer": 1,
    }


def test_a_prefix_without_gradient_is_run_forward_only():
    shape = {"prompts": 2, "group": 4, "continuations": 3, "prefix": 5, "suffix": 16, "guided": False}
    found = needs("suffix", **shape, reference=True, prefix_gradient=False)
    assert "train prefix" not in found
    assert (found["reference prefix"], found["train suffix"]) == (2 * 2 * 5, 8 * 16)


def test_the_library_draws_what_is_needed(bench: Bench):
    policy = bench.trainer.policy
    for kind in ("prefix", "suffix"):
        counted = needs_of(bench, kind)
        with counting(policy.transformer.blocks[0]) as drawn, torch.no_grad():
            bench.trainer.learner.learn = lambda *_: {"loss": 0.0}  # type: ignore[method-assign]
            bench.step(kind)
        assert sum(drawn) == counted["draw prefix"] + counted["draw suffix"]


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
def test_the_naive_way_takes_the_same_step(bench: Bench, kind: Kind):
    step = bench.step(kind)
    assert abs(step.record["loss"]) > 1e-3
    assert step.batch.mask_BL is not None
    assert 0 < step.batch.mask_BL.mean() < 1
    parameters = bench.trainer.learner.parameters
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    plain = bench.naive(kind, step.batch)
    theirs = [p.grad for p in parameters if p.grad is not None]
    assert plain.same_tokens == 1
    assert plain.loss == pytest.approx(step.record["loss"], rel=1e-5)
    assert plain.norm == pytest.approx(step.record["gradient_norm"], rel=1e-5)
    scale = max(float(g.abs().max()) for g in theirs)
    assert len(ours) == len(theirs)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * scale) for a, b in zip(ours, theirs, strict=True))
    check(step, plain)


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
def test_the_naive_way_draws_the_same_in_parts(bench: Bench, kind: Kind, monkeypatch: pytest.MonkeyPatch):
    batch, config = bench.step(kind).batch, bench.trainer.config
    whole = bench.naive(kind, batch)
    monkeypatch.setattr(bench.trainer, "config", replace(config, run=replace(config.run, rollout_batch=3)))
    rows, start = [], bench.trainer.policy.start

    def started(condition: Condition, guidance: float) -> object:
        rows.append(condition.batch)
        return start(condition, guidance)

    monkeypatch.setattr(bench.trainer.policy, "start", started)
    parts = bench.naive(kind, batch)
    assert max(rows) == 3
    assert sum(rows) == len(whole.finished)
    assert torch.equal(parts.finished, whole.finished)


def test_every_stage_has_a_row_and_the_whole_a_goal(bench: Bench, tmp_path: Path):
    config = replace(bench.trainer.config, method=METHOD)
    folder = tmp_path / "more"
    folder.mkdir()
    found = case_rows(Case("tiny", config, (1, 2), goal=3.5), Settings(threads=1, rounds=1), folder)
    groups = {row.group: [r for r in found if r.group == row.group] for row in found}
    assert list(groups) == ["tiny: prefix update", "tiny: suffix update"]
    stages = ["rollout", "decode", "reward", "update", "optimizer"]
    for group, rows in groups.items():
        naive, bounds = rows[:6], rows[6:]
        assert sorted(r.what for r in naive) == sorted(["whole", *stages])
        assert [r.what for r in bounds] == [f"{r.what}, of its bound" for r in naive]
        whole = next(r for r in bounds if r.what.startswith("whole"))
        assert whole.baseline.median == pytest.approx(sum(r.baseline.median for r in bounds if r is not whole))
        goals = {r.what: r.goal for r in rows if r.goal}
        prefix = {"update": Goal(3.5)} if "prefix" in group else {}
        assert goals == {"whole, of its bound": Goal(0.85), **prefix}


def test_a_peak_is_what_is_alive_at_once():
    def work() -> None:
        torch.zeros(1000, 250)
        kept = torch.zeros(1000, 500)
        (kept + 1).sum()

    assert peak(work) == pytest.approx(4_000_000, abs=100)


def test_updates_can_be_repeated(bench: Bench):
    first, again = bench.step("prefix"), bench.step("prefix")
    assert torch.equal(first.batch.sequences.actions, again.batch.sequences.actions)
    assert first.record["loss"] == again.record["loss"]


@pytest.mark.parametrize(("name", "factor"), [("loss", 1.001), ("norm", 0.99), ("same_tokens", 0.5)])
def test_a_difference_is_an_error(name: str, factor: float):
    step = Step(1.0, {}, {"loss": 0.5, "gradient_norm": 2.0}, None)  # type: ignore[arg-type]  # nothing looks at it
    same = Naive(torch.zeros(0), {}, 0.5, 2.0, 1.0)
    check(step, same)
    with pytest.raises(AssertionError):
        check(step, replace(same, **{name: factor * getattr(same, name)}))


def test_the_best_cost_is_the_least_over_batch_sizes():
    arms = {f"draw x{rows}": Arm("draw", 10 * rows, lambda: None) for rows in (1, 2, 4)} | {
        "optimizer": Arm("optimizer", 1, lambda: None)
    }
    found = {"draw x1": [9.0, 1.0, 2.0], "draw x2": [3.0, 3.0, 1.0], "draw x4": [8.0], "optimizer": [0.5]}
    assert best(found, arms) == {"draw": 0.15, "optimizer": 0.5}


def test_ratios_are_of_pairs_and_goals_of_their_median():
    row = Row.speedup("", "", [1.0, 2.0, 4.0], [4.0, 6.0, 8.0], "", Goal(3.0))
    assert row.ratio == Spread(3.0, 2.5, 3.5, 3)
    assert row.record()["met"] is True
    row = Row.share("", "", "MB", [1.0, 3.0], [2.0, 4.0], "", Goal(0.6, at_least=False))
    assert (row.ratio.median, row.record()["met"]) == (0.625, False)


def test_exponents_and_straight_lines():
    x = [1, 2, 4, 8]
    assert exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert straightness(x, [5 + 2 * v for v in x]) == pytest.approx(1)
    assert straightness(x, [v**3 for v in x]) < 0.97


def test_pictures_of_a_sheet_lie_where_they_are_looked_for():
    images = torch.rand(3, 3, 8, 12)
    paper_sheet = sheet(images, 2)
    assert paper_sheet.shape == (3, 2 * (8 + GAP), 2 * (12 + GAP))
    half = GAP // 2
    for index, image in enumerate(images):
        top, left = index // 2 * (8 + GAP) + half, index % 2 * (12 + GAP) + half
        assert torch.equal(paper_sheet[:, top : top + 8, left : left + 12], image)


def test_the_papers_schedules():
    assert ScaleSchedule.square(sides(256)).tokens == 900
    assert ScaleSchedule.square(sides(1024)).tokens == 10_084


def test_options_change_the_recipe_they_are_measured_on():
    for option in OPTIONS:
        config = cases(Settings())[option.case].config
        assert option.change(config) != config


@pytest.mark.parametrize(
    ("saving", "kind"),
    [(saving, kind) for saving in SAVINGS for kind in saving.kinds],
    ids=lambda x: getattr(x, "name", x),
)
def test_without_a_saving_an_update_is_the_same_and_does_more(bench: Bench, saving: Saving, kind: Kind):
    """More tokens, or more of what is beside them: entropies, sorting, random numbers."""
    blocks, head = bench.trainer.policy.transformer.blocks[0], bench.trainer.policy.transformer.head
    with counting(blocks) as tokens, counting(head) as scored:
        plain = bench.step(kind)
    with counting(blocks) as more, counting(head) as more_scored, saving.without(bench):
        other = bench.step(kind)
    beside = ("entropies of 32 tokens a step", "top-p looks at what top-k left", "one random number a token")
    assert (sum(more) > sum(tokens)) == (saving.name not in beside)
    assert sum(more_scored) >= sum(scored)
    same = torch.equal(plain.batch.sequences.actions, other.batch.sequences.actions)
    assert same == (saving.name != "one random number a token")
    if same:
        assert other.record["loss"] == pytest.approx(plain.record["loss"], rel=1e-5)
        assert other.record["gradient_norm"] == pytest.approx(plain.record["gradient_norm"], rel=1e-4)
    again = bench.step(kind)
    assert again.record["loss"] == plain.record["loss"]


def test_sorting_all_classes_keeps_the_same():
    logits = 3 * torch.randn(5, 7, 40)
    for sampling in (Sampling(top_k=6, top_p=0.8), Sampling(top_p=0.5), Sampling(top_k=3)):
        assert torch.equal(all_classes_sorted(logits, sampling), filter_logits(logits, sampling))


def test_the_command_line(capsys: pytest.CaptureFixture[str]):
    settings, names, out = parse(["--full", "--only", "ocr", "--out", "x.json", "--seed", "3"])
    assert (settings.full, settings.rounds, settings.seed, names, out) == (True, 3, 3, ["ocr"], Path("x.json"))
    assert set(parse([])[1]) < set(parse(["--full"])[1]) == set(SECTIONS)
    settings, names, out = parse(["--short"])
    assert (settings.short, settings.full, settings.device, names) == (True, False, "cpu", [*SHORT])
    assert {"updates", "savings", "compiled"} == set(names)
    with pytest.raises(SystemExit):
        parse(["--short", "--full"])
    assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--rounds", "0"])
    assert "--rounds and --threads must be 1 or more" in capsys.readouterr().err


ROW = Row("a group", "what", "s", Spread.exact(1.0), Spread.exact(2.0), Spread.exact(2.0), "naive / ours")


def test_a_section_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, Any]] = []
    out = tmp_path / "5-benchmarks.json"

    def differ(settings: Settings, folder: Path) -> list[Row]:
        seen.append(json.loads(out.read_text()))
        raise AssertionError("losses of the library and of the naive way differ: 1 and 2")

    sections = {"updates": differ, "savings": lambda settings, folder: [ROW], "compiled": differ}
    monkeypatch.setattr(command, "SECTIONS", {name: command.Section(name, rows) for name, rows in sections.items()})
    monkeypatch.setattr(command, "compiler", lambda device: None)
    threads = torch.get_num_threads()
    result = command.main(["--short", "--out", str(out), "--threads", str(threads)])
    assert [found["under_way"] for found in seen] == ["updates"]
    assert result == json.loads(out.read_text())
    assert result["failed"] == {"updates": "AssertionError: losses of the library and of the naive way differ: 1 and 2"}
    assert result["left_out"] == {"compiled": "blocks are compiled with a C++ compiler, and there is none"}
    assert (list(result["sections"]), result["under_way"]) == (["savings"], None)


def test_a_compiler_is_looked_for_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert compiler("cpu") is compiler("cuda") is None
    for name, device in (("clang++", "cpu"), ("cc", "cuda")):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert compiler(device) == str(tmp_path / name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler("cpu") is None


def test_compiled_blocks_must_give_the_same():
    logp = torch.full((2, 5), -3.0)
    compiled.check(logp, logp * (1 + 1e-5), 1e-4)
    compiled.check(None, None, 1e-4)
    with pytest.raises(AssertionError, match="the mean log-probability of compiled blocks is -3"):
        compiled.check(logp, logp * 1.001, 1e-4)


def test_a_gpu_gets_larger_shapes():
    short, rehearsal = extent(Settings(short=True, device="cuda")), extent(Settings(short=True))
    assert short.name == "VAR-d16 width, depth 4, 256 px"
    assert (short.group, short.micro_batch) == (16, 16)
    assert rehearsal.width * rehearsal.pixels < short.width * short.pixels / 16
    assert list(cases(Settings(short=True))) == ["var"]
    for one in (short, rehearsal, extent(Settings()), extent(Settings(full=True))):
        config = one.config(paper())
        schedule = ScaleSchedule.square(sides(one.pixels))
        assert 0 < schedule.middle(config.method.middle) < len(schedule)
        assert config.method.group == one.group == config.method.prompts * one.group


def test_what_is_measured_draws_as_a_run_does():
    policy = load_policy("var", VAR, "random")
    own, run = generators(policy, (3,), 2), row_generators((3,), 2, policy.condition([Prompt(label=0)]).device)
    for one, other in zip(own, run, strict=True):
        assert one.device == other.device
        assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=other))


def test_a_product_is_what_it_says():
    work, operations = product(Settings())
    with FlopCounterMode(display=False) as counter, FakeTensorMode(allow_non_fake_inputs=True):
        work()
    assert counter.get_total_flops() == operations == 2 * 4096**3


def test_a_short_run(tmp_path: Path):
    """All but compiling, of which tests/test_compile.py tells."""
    words = ["--short", "--only", "updates", "--only", "savings", "--threads", str(torch.get_num_threads())]
    result = command.main([*words, "--out", str(tmp_path / "found.json")])
    assert result["failed"] == result["left_out"] == {}
    assert list(result["sections"]) == ["updates", "savings"]
    assert all(section["seconds"] < 60 for section in result["sections"].values())


def test_a_var_shaped_run_measures(tmp_path: Path):
    config = var_shaped(64, 64, 1, method=replace(METHOD, prompts=1), sampling=paper())
    bench = Bench(config, Settings(threads=1), tmp_path, decoder=False)
    step = bench.step("prefix")
    check(step, bench.naive("prefix", step.batch))
