"""Every study fits; its runner finishes, goes on where it was, mixes nothing; and its numbers are those of
the definitions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from transformers import AutoModelForCausalLM

import tiny
from reflux.config.recipe import config_hash
from reflux.config.step_context import StepContext
from reflux.errors import ConfigError, RunError
from reflux.loop import train
from reflux.loss.step import StepRequest
from reflux.training import Options
from reflux.types import Attempt, TeacherAnswer

STUDIES = Path(__file__).parents[1] / "studies"
# scripts import their neighbours
sys.path.insert(0, str(STUDIES))

import along  # noqa: E402
import gradient_variance  # noqa: E402
import gram  # noqa: E402
import intervals  # noqa: E402
import rules  # noqa: E402
import run as runner  # noqa: E402
import table  # noqa: E402
from arms import Study, load_study  # noqa: E402

STUDY = """
name = "small"
seeds = [0]
baseline = "plain"
[common]
steps = 2
prompts_per_step = 4
save_every = 1
threads = 1
task = {{ kind = "outside:Chat" }}
sampler = {{ kind = "hf", max_tokens = 6 }}
learner = {{ kind = "hf", model = "{student}", lr = 1e-3 }}
teachers = {{ main = {{ kind = "local", model = "{teacher}" }} }}
evals = {{ agreement = {{ prompts = 4 }} }}
[arms.plain]
log_variance = true
objectives = [{{ kind = "sampled_kl", baseline = "none" }}]
[arms.value]
log_variance = true
objectives = [{{ kind = "sampled_kl", baseline = "kl" }}]
[arms.exact]
objectives = [{{ kind = "divergence", divergence = "reverse" }}]
[variance]
draws = 3
reference = "exact"
students = ["start", "plain@1"]
"""


@pytest.fixture
def small(student: str, teacher: str, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY.format(student=student, teacher=teacher))
    return path


# --- the files


def arms() -> list[tuple[str, str]]:
    return [(path.stem, arm) for path in sorted(STUDIES.glob("*.toml")) for arm in load_study(path).arms]


@pytest.mark.parametrize(("study", "arm"), arms())
def test_every_arm_of_every_study_fits(study: str, arm: str) -> None:
    loaded = load_study(STUDIES / f"{study}.toml")
    assert loaded.name == study
    # joined: a misfit would be refused here
    assert loaded.config(arm, ["seed=3"]).seed == 3


@pytest.mark.parametrize("study", sorted(path.stem for path in STUDIES.glob("*.toml")))
def test_arms_of_a_study_differ_and_those_drawn_share_their_attempts(study: str) -> None:
    loaded = load_study(STUDIES / f"{study}.toml")
    hashes = [config_hash(replace(loaded.config(arm), recipe="same")) for arm in loaded.arms]
    assert len(set(hashes)) == len(hashes)
    if loaded.variance:
        drawn = loaded.variance.arms or tuple(loaded.arms)
        gradient_variance.same_but_for_objectives(
            {arm: gradient_variance.still(loaded.config(arm, (), loaded.variance.common)) for arm in drawn}
        )


def test_the_vopd_study_has_what_the_issue_names_and_one_learning_rate() -> None:
    study = load_study(STUDIES / "vopd.toml")
    assert study.seeds == (0, 1, 2, 3, 4)
    assert {"sampled", "vopd", "vopd_top20", "topk_opd", "full"} <= set(study.default)
    gradient_variance.same_but_for_objectives(
        {arm: study.config(arm, ["log_variance=false"]) for arm in study.default}
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('baseline = "plian"', "no arm plian"),
        ('default = ["other"]', "no arm other"),
        ("seed = [1]", "small.seed: unexpected field"),
        ('variance = { reference = "x" }', "no arm x"),
    ],
)
def test_a_wrong_study_is_refused_in_words(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "small.toml"
    head = "" if line.startswith("baseline") else 'baseline = "plain"\n'
    path.write_text(f'name = "small"\nseeds = [0]\n{head}{line}\n[arms.plain]\nbase = "opd"\n')
    with pytest.raises(ConfigError, match=words):
        load_study(path)


@pytest.mark.parametrize("seeds", ["a", "0,b", "1.5", "-1", "0,,1"])
def test_seeds_that_are_no_whole_numbers_are_refused_in_words(small: Path, seeds: str) -> None:
    with pytest.raises(ConfigError, match="--seeds takes whole numbers"):
        runner.run_study([str(small), "--out", str(small.parent / "out"), f"--seeds={seeds}"])


# --- the runner


def do(task: runner.Task) -> None:
    """The run of a task, in this process."""
    asyncio.run(train(task.config, Options(task.folder)))


def test_a_run_whose_models_are_named_by_relative_paths_is_finished(
    small: Path, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.parent / "here").symlink_to(student)
    monkeypatch.chdir(small.parent)
    task = runner.Task(load_study(small), "plain", 0, Path("out"), ("threads=1", "learner.model=./here"))
    do(task)
    assert task.finished
    changed = replace(task, overrides=("threads=1", f"learner.model={student}"))
    with pytest.raises(RunError, match=r"other settings.*\n.*learner\.model: was "):
        _ = changed.finished


def test_a_study_goes_on_where_it_was_and_does_nothing_twice(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small.parent / "out"
    study = load_study(small)
    do(runner.Task(study, "value", 0, out, ("threads=1",)))
    # half a run: the process below resumes it
    do(runner.Task(study, "plain", 0, out, ("threads=1", "steps=1")))
    finished = (out / "value/seed-0/metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [str(small), "--out", str(out), "--threads", "1", "--arms", "plain,value"]
    runner.run_study(command)
    assert (out / "value/seed-0/metrics.jsonl").stat().st_mtime_ns == finished
    assert [
        json.loads(line)["step"] for line in (out / "plain/seed-0/metrics.jsonl").read_text().splitlines()
    ] == [1, 2]
    assert [
        json.loads(line)["step"] for line in (out / "plain/seed-0/evals.jsonl").read_text().splitlines()
    ] == [0, 1, 2]

    written = json.loads((out / "table.json").read_text())
    assert [(row["arm"], row["seed"], row["steps"]) for row in written["runs"]] == [
        ("plain", 0, 2),
        ("value", 0, 2),
    ]
    assert all(row["config_hash"] and "commit" in row for row in written["runs"])
    assert (
        written["command"]
        == "python studies/run.py small.toml --out out --arms plain,value --jobs 1 --threads 1"
    )
    assert written["arms"]["plain"]["measures"]["variance_ratio.mean"]["value"] == 1
    assert written["arms"]["value"]["measures"]["variance_ratio.mean"]["value"] != 1
    # one start
    assert written["arms"]["value"]["minus_baseline"]["agreement.kl_nats.before"]["value"] == 0
    for name in ("table.md", "table.json"):
        assert str(small.parent) not in (out / name).read_text()
    # scores, costs, FLOP on the way
    assert (out / "table.md").read_text().count("| plain |") == 3

    monkeypatch.setattr(runner.Task, "start", None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    runner.run_study(command)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(RunError, match=r"other settings.*\n.*learner\.lr: was 0.001, is 0.5"):
        runner.run_study([*command, "--set", "learner.lr=0.5"])


def test_a_run_that_fails_is_named_and_the_others_are_run(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    started: list[str] = []

    def start(self: runner.Task) -> subprocess.Popen[bytes]:
        started.append(self.arm)
        return subprocess.Popen(["false" if self.arm == "plain" else "true"])

    monkeypatch.setattr(runner.Task, "start", start)
    with pytest.raises(RunError, match="plain seed 0"):
        runner.run_study([str(small), "--out", str(small.parent / "out"), "--jobs", "2"])
    assert started == ["plain", "value", "exact"]
    # one that exits well without a summary has failed too
    assert capsys.readouterr().out.count("failed, see") == 3


def test_a_stopped_study_stops_its_runs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def start(self: runner.Task) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(["sleep", "60"]))
        return processes[-1]

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Task, "start", start)
    monkeypatch.setattr(runner.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run_study([str(small), "--out", str(small.parent / "out")])
    assert [process.returncode for process in processes] == [-15]


# --- the table


def test_measures_are_those_of_the_files(tmp_path: Path) -> None:
    ratios, norms = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2], [2.0, 0.5, 3.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    seconds = [{"total": 9.0, "learn": 1.0}] + [
        {"total": total, "learn": 0.25 * total} for total in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0)
    ]
    columns = zip(ratios, norms, seconds, strict=True)
    rows = [
        {
            "step": i,
            "gradient_variance_ratio": r,
            "grad_norm": g,
            "seconds": s,
            "tokens_sampled": 10,
            "peak_memory_bytes": 100 - i,
        }
        for i, (r, g, s) in enumerate(columns, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [(0, 0.25, 1.5), (4, 0.5, 1.0), (8, 0.75, 0.5)]
    evals = [
        {
            "step": s,
            "accuracy": {"problems": 8, "accuracy": a, "low": 0.0, "accuracy.x": a, "accuracy.x.low": 0.0},
            "agreement": {"kl_nats": k},
        }
        for s, a, k in scores
    ]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    (tmp_path / "config.toml").write_text("[learner]\nclip = 1.0\n")
    assert table.measures(tmp_path) == pytest.approx(
        {
            "accuracy.accuracy.before": 0.25,
            "accuracy.accuracy.x.before": 0.25,
            "agreement.kl_nats.before": 1.5,
            "accuracy.accuracy.after": 0.75,
            "accuracy.accuracy.x.after": 0.75,
            "agreement.kl_nats.after": 0.5,
            "variance_ratio.mean": 0.85,
            "variance_ratio.first_quarter": 0.55,
            "variance_ratio.last_quarter": 1.15,
            "grad_norm.mean": 1.0,
            "clipped_share": 0.25,
            "seconds_per_step": 4.0,
            "learn_share": 0.25,
            "peak_memory_bytes": 99,
            "tokens_sampled": 80,
            "accuracy.accuracy@step 4": 0.5,
            "accuracy.accuracy@step 8": 0.75,
        }
    )


def test_what_margin_and_balance_did_is_a_table_of_its_own() -> None:
    steps = [
        {
            "credit": {
                "margin": {"mixed_fraction": m, "return_cut": c, "weight_mean": 1.0},
                "other": {"kept": 1.0},
            }
        }
        for m, c in ((0.5, None), (0.25, -1.0), (0.0, -3.0))
    ]
    assert rules.noted(steps) == {"rule.margin.mixed_fraction": 0.25, "rule.margin.return_cut": -2.0}
    assert rules.noted([{"credit": {}}, {}]) == {}
    compared = table.compare({"opd": {0: {"x": 1.0}}, "shift": {0: rules.noted(steps)}}, "opd")
    text = table.markdown(compared, "opd")
    assert "| shift | 0.250 | - | - | - | - | -2.000 | - | - |" in text
    assert "| opd |" not in text[text.index("Margin and balance") :]
    assert "Margin and balance" not in table.markdown(table.compare({"opd": {0: {"x": 1.0}}}, "opd"), "opd")


def test_scores_by_route_are_named_after_their_score() -> None:
    assert table.titled("accuracy.accuracy.add") == "accuracy, add"
    assert table.titled("agreement.kl_nats.mul") == "held-out KL, mul"
    assert table.titled("accuracy.avg@8") == "accuracy.avg@8"
    row = {
        "agreement": {
            "kl_nats": 1.0,
            "kl_nats.mul": 2.0,
            "kl_nats.mul.low": 1.5,
            "kl_nats.mul.attempts": 64,
            "by_teacher": {},
        }
    }
    assert table.evaluated(row) == {"agreement.kl_nats": 1.0, "agreement.kl_nats.mul": 2.0}
    text = table.markdown(table.compare({"a": {0: {"agreement.kl_nats.mul.after": 2.0}}}, "a"), "a")
    assert "held-out KL, mul before" in text
    assert "| 2.000 |" in text


def test_arms_are_compared_seed_by_seed() -> None:
    base, other = [0.5, 0.7, 0.6], [0.9, 0.75, 0.85]
    runs = {
        "a": {s: {"x": v} for s, v in enumerate(base)},
        "b": {s: {"x": v} for s, v in [*enumerate(other), (7, 0.1)]},
    }
    found = table.compare(runs, "a")
    mean, minus = found["b"]["measures"]["x"], found["b"]["minus_baseline"]["x"]
    assert (mean.n, minus.n) == (4, 3)
    ends = stats.ttest_rel(other, base).confidence_interval()
    assert (minus.value, minus.low, minus.high) == pytest.approx(
        (np.mean(other) - np.mean(base), ends.low, ends.high)
    )
    ends = stats.ttest_1samp([*other, 0.1], 0).confidence_interval()
    assert (mean.low, mean.high) == pytest.approx((ends.low, ends.high))
    assert found["a"]["minus_baseline"] == {}
    assert intervals.over_seeds([0.3]) == intervals.Estimate(0.3, None, None, 1)
    assert intervals.over_seeds([]) is None
    assert table.cell(minus, table.percent, signed=True).startswith("+23.3 % (-")
    assert [table.cell(e, table.percent) for e in (None, intervals.over_seeds([0.3]))] == ["-", "30.0 %"]


# --- the mathematics of whole gradients


def test_variance_and_means_are_unbiased_by_enumeration() -> None:
    """Over all ways to draw M = 3 times from four correlated pairs (g, h), each estimate's mean is the exact
    moment.
    """
    rng = np.random.default_rng(0)
    g, h, p = rng.normal(size=(4, 5)) + 1, rng.normal(size=(4, 5)), np.array([0.1, 0.2, 0.3, 0.4])
    variance = one = both = 0.0
    for drawn in map(list, itertools.product(range(4), repeat=3)):
        K = gram.inner(g[drawn], g[drawn])
        variance += p[drawn].prod() * gram.total_variance(K)
        one += p[drawn].prod() * gram.of_means(K)
        both += p[drawn].prod() * gram.of_means(gram.inner(g[drawn], h[drawn]))
    assert variance == pytest.approx(p @ np.square(g).sum(1) - np.square(p @ g).sum())
    assert one == pytest.approx(np.square(p @ g).sum())
    assert both == pytest.approx((p @ g) @ (p @ h))


def test_statistics_of_gradients_with_a_known_covariance() -> None:
    """Gaussian draws around a common mean m: h has 4 times g's covariance, and points elsewhere by 60
    degrees.
    """
    rng, M, D = np.random.default_rng(1), 200, 6
    root = np.linalg.cholesky(np.diag([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) + 0.5)
    m, turned = np.eye(D)[0] * 9, np.eye(D)[0] * 4.5 + np.eye(D)[1] * 9 * np.sqrt(0.75)
    drawn = {"g": m + rng.normal(size=(M, D)) @ root.T, "h": turned + 2 * rng.normal(size=(M, D)) @ root.T}
    found = gradient_variance.statistics(
        {arm: values.astype(np.float32) for arm, values in drawn.items()}, "g", "g"
    )
    truth = {"total_variance": 96.0, "squared_mean": 81.0, "ratio_to_g": 4.0, "cosine_to_g": 0.5}
    for name, exact in truth.items():
        estimate = found["h"][name]
        assert estimate.low < exact < estimate.high, name
        assert estimate.high - estimate.low < 0.6 * exact, name
    assert found["g"]["total_variance"].value == pytest.approx(np.cov(drawn["g"].T).trace(), rel=1e-5)
    assert set(found["g"]) == {"total_variance", "squared_mean"}


def test_the_jackknife_of_a_mean_is_students_t_and_of_a_ratio_lies_evenly_in_logs() -> None:
    values = np.array([0.3, 1.0, 2.0, 0.7, 1.4])
    found = intervals.jackknife(lambda kept: float(values[kept].mean()), 5)
    seeds = intervals.over_seeds(list(values))
    assert seeds is not None
    assert (found.value, found.low, found.high) == pytest.approx((seeds.value, seeds.low, seeds.high))
    ratio = intervals.jackknife(lambda kept: float(values[kept].mean()), 5, log=True)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low * ratio.high == pytest.approx(ratio.value**2)
    assert intervals.jackknife(lambda kept: float("nan"), 5).low is None
    assert intervals.jackknife(lambda kept: -1.0, 5, log=True).low is None


# --- gradients drawn from models


@pytest.fixture
def still(small: Path) -> Callable[..., Any]:
    """The arms of the small study as they are drawn, with overrides."""
    study = load_study(small)
    return lambda arms, *changes: {arm: gradient_variance.still(study.config(arm, changes)) for arm in arms}


def test_arms_are_drawn_on_the_same_attempts_and_leave_no_trace(still: Callable[..., Any]) -> None:
    draw = gradient_variance.draw_gradients
    found = asyncio.run(draw(still(["plain", "value", "exact"]), 3))
    alone = asyncio.run(draw(still(["exact"]), 3))
    # neither moved, clipped nor added to by the arms before
    assert np.array_equal(found["exact"], alone["exact"])
    assert not np.array_equal(found["exact"][0], found["exact"][1])
    # a run's own random numbers and prompts
    assert still(["exact"])["exact"].seed not in range(100)
    doubled = asyncio.run(
        draw(still(["exact"], "objectives.0.coef=2.0", "learner.lr=0.5", "learner.clip=1e-3"), 1)
    )["exact"]
    np.testing.assert_allclose(doubled[0], 2 * alone["exact"][0], rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"cannot be trained on the same attempts.*\n.*group_size"):
        asyncio.run(draw(still(["plain"]) | still(["exact"], "group_size=2"), 1))


def test_a_batch_with_nothing_to_learn_from_has_a_gradient_of_zero(
    still: Callable[..., Any], student: str, teacher: str
) -> None:
    learner, objectives = (
        tiny.learner(AutoModelForCausalLM.from_pretrained(student)),
        still(["exact"])["exact"].objectives,
    )
    word = tiny.as_model(AutoModelForCausalLM.from_pretrained(teacher), learner.services.tokenizer)
    groups = [[tiny.attempt(tiny.rollout(4), word)], [tiny.attempt(tiny.rollout(4, finish="error"), word)]]
    something, nothing = (
        asyncio.run(gradient_variance.gradient(learner, StepRequest([group], objectives, StepContext(0, 0))))
        for group in groups
    )
    assert something.shape == nothing.shape == (learner.macs,)
    assert something.any()
    assert not nothing.any()


def test_the_variance_of_one_token_answers_is_that_of_the_enumeration(
    still: Callable[..., Any], student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt, one token: sum_a p(a) |g(a)|^2 - |sum_a p(a) g(a)|^2, and the mean is the exact gradient,
    which does not vary.
    """
    seen: list[Attempt] = []
    gradient = gradient_variance.gradient

    async def watched(learner: Any, request: StepRequest) -> np.ndarray:
        seen.append(request.attempts[0])
        return await gradient(learner, request)

    monkeypatch.setattr(gradient_variance, "gradient", watched)
    cfgs = still(["plain", "exact"], "prompts_per_step=1", "sampler.max_tokens=1")
    found = gradient_variance.statistics(
        asyncio.run(gradient_variance.draw_gradients(cfgs, 150)), "plain", "exact"
    )

    learner = tiny.learner(AutoModelForCausalLM.from_pretrained(student))
    spoken, target = seen[0].rollout, seen[0].target("main")
    taught = AutoModelForCausalLM.from_pretrained(cfgs["plain"].teachers["main"].model)
    head = tiny.as_model(taught, tiny.character_tokenizer()).head
    # the study has closed its own
    monkeypatch.setitem(tiny.HEADS._heads, "teachers.main", head)
    logp_V = learner.model.head.logits(tiny.hidden(learner.model, spoken).h_TH)[0].log_softmax(-1)  # type: ignore[arg-type]
    p, rows = logp_V.exp().detach().numpy().astype(np.float64), []
    for a in range(len(p)):
        one = Attempt(
            replace(spoken, tokens_T=np.array([a]), logp_T=logp_V[a : a + 1].detach().numpy()),
            answers={"main": TeacherAnswer(target=target)},
        )
        made = tiny.gradients(learner, [[one]], cfgs["plain"].objectives)
        rows.append(np.concatenate([value.numpy().ravel() for value in made.values()]).astype(np.float64))
    g = np.stack(rows)
    variance = p @ np.square(g).sum(1) - np.square(p @ g).sum()
    estimate = found["plain"]["total_variance"]
    assert estimate.low < variance < estimate.high
    assert estimate.high - estimate.low < variance
    assert found["exact"]["squared_mean"].value == pytest.approx(np.square(p @ g).sum(), rel=1e-4)
    assert abs(found["exact"]["total_variance"].value) < 1e-6 * variance


def test_gradients_are_drawn_at_checkpoints_and_not_twice(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small.parent / "out"
    command = [str(small), "--out", str(out), "--threads", "1", "--variance"]
    with pytest.raises(RunError, match="Run the study first"):
        runner.run_study(command)
    do(runner.Task(load_study(small), "plain", 0, out, ("threads=1",)))
    runner.run_study(command)
    written = json.loads((out / "variance.json").read_text())["estimates"]
    assert list(written) == ["start", "plain@1"]
    assert written["start"]["plain"]["total_variance"] != written["plain@1"]["plain"]["total_variance"]
    assert set(written["start"]["value"]) == {
        "total_variance",
        "squared_mean",
        "ratio_to_plain",
        "cosine_to_exact",
    }
    assert str(small.parent) not in (out / "variance.json").read_text() + (out / "variance.md").read_text()
    before = (out / "variance.md").read_text()
    monkeypatch.setattr(gradient_variance, "draw_gradients", None)
    runner.run_study(command)
    assert (out / "variance.md").read_text() == before
    with pytest.raises(ConfigError, match="at least 3"):
        runner.run_study([*command, "--draws", "2"])


def test_a_study_without_a_variance_table_draws_nothing(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('name = "small"\nseeds = [0]\nbaseline = "plain"\n[arms.plain]\nbase = "opd"\n')
    assert isinstance(load_study(path), Study)
    with pytest.raises(ConfigError, match=r"no \[variance\] table"):
        runner.run_study([str(path), "--out", str(tmp_path / "out"), "--variance"])


def test_the_course_of_a_run_is_its_evaluations_and_the_flop_spent_by_then() -> None:
    steps = [{"step": step, "flops": {"sample": 1e12, "learn": 2e12 * step}} for step in range(1, 5)]
    evals = [
        {
            "step": step,
            "accuracy": {"accuracy": 0.1 * step},
            "foresight": {"rho": 0.5 if step else None, "alignment": {"2": 0.25 * step}},
        }
        for step in (0, 2, 4)
    ]
    found = along.along(evals, steps)
    assert found == {
        "flops@step 2": 8.0, "flops@step 4": 24.0, "accuracy.accuracy@step 2": 0.2,
        "accuracy.accuracy@step 4": 0.4,
        "foresight.rho@step 2": 0.5, "foresight.rho@step 4": 0.5, "foresight.alignment@step 2": 1.0,
    }  # fmt: skip
    # before and after alone have no course
    assert along.along(evals[::2], steps) == {}
    text = along.course(table.compare({"one": {0: found}}, "one"), table.grid, table.cell)
    assert (
        "Accuracy by step\n\n| arm | step 2 | step 4 |\n| --- | --- | --- |\n| one | 20.0 % | 40.0 % |"
        in text
    )
    assert "| one | 8 | 24 |" in text
