"""What a run is billed for, against the rows that really went through its models, counted by hooks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

import outside
import tiny
import tiny_flow
import tiny_glyphs
from reflux.inspection.plan import plan
from reflux.learners.flow_engine import FlowLearner
from reflux.learners.hf_engine import HFLearner
from reflux.loop import train
from reflux.metrics.flops import Landed, Ran, Work, flops
from reflux.metrics.values import step_flops
from reflux.models.cpu.decoder import CpuDecoder
from reflux.models.flow.flow_model import FlowModel
from reflux.models.parameters import parameter_count
from reflux.samplers import hf_engine
from reflux.samplers.flow_engine import FlowSampler
from reflux.teachers.flow_engine import FlowTeacher
from reflux.teachers.in_process_teacher import InProcessTeacher
from reflux.training import Options
from reflux.types import Attempt, TeacherAnswer
from tiny import rollout

CHAT = {"kind": "outside:Chat"}
# a row that has ended stays in its batch for a while, unless it is alone
ALONE = {"prompts_per_step": 1, "task": CHAT}
ROLES = {HFLearner: "learner", hf_engine.HFSampler: "sampler", InProcessTeacher: "teacher"}


class Counted:
    """Rows through the trunks by role, and tokens drawn. A text of n positions takes n - 1 rows (nothing runs
    after its last), so one is added for every text, as everywhere in the library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows: Counter[str] = Counter()
        self.roles: dict[int, str] = {}
        self.drawn = 0
        self.patch = monkeypatch
        for owner, role in ROLES.items():
            self._watch(owner, role)
        forward, step, decode = Qwen3Model.forward, CpuDecoder.step, hf_engine.decode

        def counted(
            trunk: Any, *args: Any, input_ids: Any = None, attention_mask: Any = None, **rest: Any
        ) -> Any:
            texts = input_ids.ne(0).sum() if attention_mask is None else attention_mask.sum()
            self._add(id(trunk), int(texts) + len(input_ids))
            return forward(trunk, *args, input_ids=input_ids, attention_mask=attention_mask, **rest)

        def stepped(decoder: Any, memory: Any, tokens_B: Any, place_B: Any) -> Any:
            self._add(id(decoder.trunk), len(tokens_B))
            return step(decoder, memory, tokens_B, place_B)

        def decoded(*args: Any) -> Any:
            turns = decode(*args)
            self.drawn += sum(len(turn.tokens) for turn in turns)
            return turns

        monkeypatch.setattr(Qwen3Model, "forward", counted)
        monkeypatch.setattr(CpuDecoder, "step", stepped)
        monkeypatch.setattr(hf_engine, "decode", decoded)

    def _watch(self, owner: Any, role: str) -> None:
        begin = owner.__init__

        def begun(part: Any, *args: Any, **named: Any) -> None:
            begin(part, *args, **named)
            self.roles[id(part.model.trunk)] = role

        self.patch.setattr(owner, "__init__", begun)

    def _add(self, trunk: int, rows: int) -> None:
        role = self.roles.get(trunk)
        if role is not None:
            # checks of a model that is being loaded are nobody's
            self.rows[role if role != "learner" or torch.is_grad_enabled() else "observe"] += rows


TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opd": ("opd", {"steps": 2}),
    "sft": ("sft", {"steps": 2, "task": CHAT}),
    "prefix by generation": ("opd", {"steps": 2, "sampler__train_max_tokens": {"kind": "linear", "start": 2,
                                                                               "increment": 3}}),
    "prefix by credit": ("opd", {"steps": 2, "credit": {"prefix": {"length": 3}}}),
    "a window": ("opd", {"steps": 2, "credit": {"prefix": {"length": 2, "start": 2}}}),
    "peers": ("peers", {"steps": 1, "group_size": 3, "sampler__max_tokens": 1}),
    "told the answer": ("peers", {"steps": 1, "sampler__max_tokens": 1,
                                  "teachers__main": {"kind": "self", "context": {"kind": "privileged"}}}),
    "observed": ("opd", {"steps": 2, "group_size": 2, "max_staleness": 1, "sampler__max_tokens": 1,
                         "rewards": {"verifier": {}}, "credit": {"margin": {"student": "now"}}}),
    "checkpointed": ("opd", {"steps": 1, "learner__gradient_checkpointing": True}),
    "tools": ("opd", {"steps": 2, "task": CHAT | {"replies": 2}, "sampler__max_tokens": 40}),
    "half is masked": ("opd", {"steps": 2, "task": CHAT | {"replies": 1}, "sampler__max_tokens": 40,
                               "credit": {"prefix": {"length": 1}}}),
    "too long to read": ("opd", {"steps": 6, "sampler__max_prompt_tokens": 16,
                                 "sampler__long_prompts": "skip"}),
    "scored": ("full", {"steps": 2, "extrapolation": {"kind": "extrapolate", "prompts": 1, "tries": 2}}),
    "scored by a teacher": ("full", {"steps": 2, "extrapolation": {"kind": "extrapolate", "prompts": 1,
                                                                   "tries": 2, "score": "minus_kl"}}),
    "thrown away": ("full", {"steps": 4, "max_staleness": 1,
                             "extrapolation": {"kind": "outside:Jump", "at": 2, "prompts": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_run_is_billed_for_the_rows_that_were_computed(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, student: str, teacher: str, name: str
) -> None:
    recipe, settings = TEXTS[name]
    counted = Counted(monkeypatch)
    done = tiny_run(recipe, **ALONE | settings)
    metrics, rows = done.rows("metrics"), counted.rows
    billed = {role: sum(row["flops"][role] for row in metrics) for role in ("sample", "teach", "learn")}
    S, T = parameters(student), parameters(student if recipe == "peers" else teacher)
    # the hook lies above what is computed again
    again = 2 if settings.get("learner__gradient_checkpointing") else 1
    assert billed["sample"] == 2 * S * rows["sampler"]
    assert billed["teach"] == 2 * T * rows["teacher"]
    assert billed["learn"] == S * ((2 * again + 4) * rows["learner"] + 2 * rows["observe"])
    assert done.summary["flops_total"] == sum(billed.values())
    assert done.summary["tokens_sampled_total"] == counted.drawn
    for part in ("sampled", "scored", "discarded"):
        assert done.summary[f"tokens_{part}"] == sum(row.get(f"tokens_{part}", 0) for row in metrics)
    expected = {"sft": {"learner"}, "observed": {"sampler", "teacher", "learner", "observe"}}
    assert {role for role, count in rows.items() if count} == expected.get(
        name, {"sampler", "teacher", "learner"}
    )


def parameters(folder: str) -> int:
    from transformers import AutoModelForCausalLM

    return parameter_count(AutoModelForCausalLM.from_pretrained(folder))


def test_each_case_is_what_its_name_says(tiny_run: Callable[..., Any]) -> None:
    """The hand counts above would hold of runs in which nothing special happened, too."""
    long = tiny_run("opd", **ALONE | TEXTS["too long to read"][1]).rows("metrics")
    assert 0 < sum(row["errors"] for row in long) < 6
    thrown = tiny_run("full", **ALONE | TEXTS["thrown away"][1])
    assert [row["tokens_discarded"] > 0 for row in thrown.rows("metrics")] == [False, False, True, False]
    assert thrown.summary["tokens_scored"] > 0
    tools = tiny_run("opd", **ALONE | TEXTS["tools"][1])
    objective_teachers = [
        row for row in tools.rows("attempts") if row["kind"] == "attempt" and 0 in row["mask"]
    ]
    assert objective_teachers


def test_where_tools_reply_tokens_are_those_of_the_student(tiny_run: Callable[..., Any]) -> None:
    """What was heard is read, and neither sampled nor trained on."""
    done = tiny_run("opd", **ALONE | TEXTS["tools"][1])
    written = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    for metrics in done.rows("metrics"):
        masks = [row["mask"] for row in written if row["step"] == metrics["step"]]
        assert (
            metrics["tokens_sampled"]
            == metrics["tokens_trained"]
            == sum(map(sum, masks))
            < sum(map(len, masks))
        )


def test_a_plain_step_costs_what_the_formula_says(
    tiny_run: Callable[..., Any], student: str, teacher: str
) -> None:
    """Identity of methods/prefix: 2 S (P + n), 2 T (P + n), 6 S (P + m), with a prefix m < n; several rows in
    one batch, too.
    """
    for cut in (None, 3):
        done = tiny_run(
            "opd", steps=1, task=CHAT, prompts_per_step=4, credit={"prefix": {"length": cut}} if cut else {}
        )
        asked = [len(ids) for ids in prompts(4)]
        lengths = [len(row["tokens"]) for row in done.rows("attempts") if row["kind"] == "attempt"]
        trained = sum(min(n, cut or n) for n in lengths)
        expected = step_flops(parameters(student), parameters(teacher), sum(asked), sum(lengths), trained)
        assert done.rows("metrics")[0]["flops"] == expected


def prompts(count: int) -> list[list[int]]:
    from reflux.assets.characters import character_tokenizer
    from reflux.models.chat.renderer import Renderer

    render = Renderer(character_tokenizer(), None, {})
    return [render.ids(prompt.messages) for prompt in islice(outside.Chat().prompts("train", 0), count)]


def test_a_plan_counts_the_pass_that_observes(student: str, teacher: str) -> None:
    margin = {"rewards": {"verifier": {}}, "group_size": 2, "task": CHAT}
    acted, now = (
        plan(tiny.config("opd", student, teacher, **margin, credit={"margin": {"student": side}}))
        for side in ("behaviour", "now")
    )
    assert acted.positions_at_most == now.positions_at_most
    assert now.flops_at_most - acted.flops_at_most == 2 * parameters(student) * now.positions_at_most  # type: ignore[operator]


def test_prompts_nobody_learns_from_are_not_billed_to_learning(tiny_run: Callable[..., Any]) -> None:
    """Balancing leaves attempts out, with their prompts."""
    settings: dict[str, Any] = {
        "steps": 1,
        "task": CHAT,
        "group_size": 4,
        "rewards": {"verifier": {}},
        "loss_aggregation": "seq-mean-token-mean",
    }
    done = tiny_run("opd", **settings, credit={"margin": {}, "balance": {}})
    kept = {
        (row["prompt"], row["sample"])
        for row in done.rows("attempts")
        if row["kind"] == "learned" and any(row["weight"])
    }
    acted = {(row["prompt"], row["sample"]): row for row in done.rows("attempts") if row["kind"] == "attempt"}
    assert 0 < len(kept) < len(acted)
    asked = {f"train-{i}": len(ids) for i, ids in enumerate(prompts(4))}
    read = sum(asked[key[0]] + len(acted[key]["tokens"]) for key in kept)
    everything = sum(asked[key[0]] + len(row["tokens"]) for key, row in acted.items())
    (metrics,) = done.rows("metrics")
    assert metrics["flops"]["learn"] / metrics["flops"]["sample"] == pytest.approx(
        6 * read / (2 * everything)
    )


# --- images


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> tiny_glyphs.Models:
    return tiny_glyphs.models(tmp_path_factory.mktemp("flows"))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("flow", {}),
        ("flow", {"sampler__guidance": 2.0}),
        ("flow", {"sampler__max_denoising_steps": 2}),
        ("flow_sft", {}),
        ("flow_grpo", {}),
        ("flow", {"extrapolation": {"kind": "extrapolate", "prompts": 2, "include": ["attn"], "tries": 1,
                                    "score": "minus_kl"}}),
    ],
)  # fmt: skip
def test_pictures_are_billed_for_every_call_of_a_network(
    flows: tiny_glyphs.Models,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recipe: str,
    settings: dict[str, Any],
) -> None:
    """The last step of a grid is nobody's to learn from, and takes its call nevertheless; teachers that draw
    do so for each step.
    """
    rows: Counter[str] = Counter()
    roles: dict[int, str] = {}
    for owner, role in ((FlowLearner, "learner"), (FlowSampler, "sampler"), (FlowTeacher, "teacher")):

        def begun(part: Any, *args: Any, begin: Any = owner.__init__, role: str = role) -> None:
            begin(part, *args)
            # Flow teachers on one base call this base.
            roles[id(part.model.base.model if role == "teacher" else part.model)] = role

        monkeypatch.setattr(owner, "__init__", begun)
    velocity = FlowModel.velocity

    def counted(model: Any, x_ND: Any, *rest: Any) -> Any:
        role = roles.get(id(model))
        rows["observe" if role == "learner" and not torch.is_grad_enabled() else str(role)] += len(x_ND)
        return velocity(model, x_ND, *rest)

    monkeypatch.setattr(FlowModel, "velocity", counted)
    cfg = tiny_glyphs.config(recipe, flows, evals="none", **settings)
    summary = asyncio.run(train(cfg, Options(tmp_path / "run")))
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    billed = Counter[str]()
    for line in steps:
        billed.update(json.loads(line)["flops"])
    macs = flow_macs(flows["student"], settings.get("sampler__guidance", 1.0))
    # by teachers, which are asked about what they drew besides
    drawn = 2 * 4 * tiny_glyphs.EVAL_STEPS if recipe == "flow_sft" else 0
    assert billed["sample"] == 2 * macs * (rows["sampler"] + drawn)
    assert billed["teach"] == 2 * macs * (rows["teacher"] - drawn)
    assert billed["learn"] == macs * (6 * rows["learner"] + 2 * rows["observe"])
    assert rows["None"] == 0
    assert summary["flops_total"] == sum(billed.values())
    assert (summary["tokens_sampled_total"] == 0) == (recipe == "flow_sft")


def flow_macs(folder: str, guidance: float) -> int:
    from reflux.models.flow.load import load_flow

    return load_flow(folder, "m", device="cpu").macs(guidance, 0)


# --- the parts of the sum


def test_work_is_what_attempts_say_of_themselves() -> None:
    asked = Attempt(
        rollout(4, prompt_tokens=5, mask=[1, 1, 0, 1]),
        answers={"main": TeacherAnswer(table="one", positions_read=11)},
    )
    given = Attempt(replace(rollout(3), sampled_positions=0))
    failed = Attempt(rollout(0, finish="error"))
    drawn = Attempt(tiny_flow.rollout(4, sampled_positions=0, drawn_positions={"one": 30, "two": 2}))
    assert Work.of([asked]) == Work(3, 9, {}, {"one": 11})
    assert Work.of([given, failed]) == Work()
    assert Work.of([drawn, asked]) + Work.of([asked, drawn]) == Work(
        6, 18, {"one": 60, "two": 4}, {"one": 22}
    )
    assert flops(Ran(7, 10, 8), {"one": 3, "two": 5}, Work.of([drawn, asked])) == {
        "sample": 2.0 * (7 * 9 + 3 * 30 + 5 * 2),
        "teach": 2.0 * 3 * 11,
        "learn": 7 * (2.0 * 10 + 4.0 * 8),
    }


def test_what_a_prompt_gave_before_it_was_asked_again_is_discarded() -> None:
    """It is counted by the step that trains on the later attempts."""

    def group(name: str, length: int, step: int = 0) -> list[Attempt]:
        made = replace(rollout(length), prompt=replace(rollout(length).prompt, id=name))
        return [Attempt(made, asked_step=step)]

    landed = Landed()
    for name, length in (("a", 3), ("b", 4), ("a", 5), ("a", 6), ("c", 2), ("c", 1)):
        landed.add(group(name, length))
    # another step asks for the same prompt
    landed.add(group("a", 9, step=1))
    # prompts of 5 tokens
    assert landed.take([group("a", 6), group("b", 4)]) == Work(8, 8 + 2 * 5)
    assert landed.take([group("c", 1), group("a", 9, step=1)]) == Work(2, 2 + 5)
    landed.add(group("a", 6))
    assert landed.take([group("a", 6)]) == Work()


def test_a_teacher_that_is_asked_again_is_billed_twice(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that changed since: what it read before was read."""
    from reflux.teachers import collection

    counted = Counted(monkeypatch)
    times = iter(range(1000))
    # every look is another context
    monkeypatch.setattr(collection, "_hash", lambda view: str(next(times)))
    done = tiny_run("opd", **ALONE, steps=2)
    plain = sum(row["flops"]["sample"] for row in done.rows("metrics")) / counted.rows["sampler"]
    teach = sum(row["flops"]["teach"] for row in done.rows("metrics"))
    assert counted.rows["teacher"] == 2 * counted.rows["sampler"]
    assert teach / counted.rows["teacher"] == pytest.approx(plain * np.divide(teacher_size(done), plain / 2))


def teacher_size(done: Any) -> int:
    import tomllib

    return parameters(tomllib.loads((done.dir / "config.toml").read_text())["teachers"]["main"]["model"])
