"""Good recipes and models that the preflight lets pass, and what it says where it can measure nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from contract.test_preflight import ON
from reflux.assets.characters import character_tokenizer
from reflux.config.recipe import load_recipe
from reflux.errors import DataError, ModelError
from reflux.evals import preflight
from reflux.evals.preflight import Preflight


def noted(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any
) -> list[str]:
    """The notes of a run."""
    heard = tiny.Heard()
    monkeypatch.setattr("reflux.training.Silent.noted", lambda self, text: heard.noted(text))
    tiny_run(*args, **{**ON, **more})
    return heard.notes


def narrowed(model: str, folder: Path, window: int) -> str:
    """The same model with a shorter context window."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": window}))
    return str(folder)


def test_prompts_that_are_all_skipped_give_a_warning(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = {"sampler__max_prompt_tokens": 1, "sampler__long_prompts": "skip"}
    notes = noted(tiny_run, monkeypatch, "full", **skipped)
    assert "preflight: answers: no answer has a token, because the prompts are too long. " in " ".join(notes)


def test_a_teacher_with_routes_need_not_read_the_prompts_of_others(
    tiny_run: Callable[..., Any], teacher: str, tmp_path: Path
) -> None:
    """The preflight reads a prompt of 19 tokens, which goes to `wide`."""
    teachers = {
        "wide": {"kind": "local", "model": teacher, "routes": ["even"], "alias": "main"},
        "narrow": {
            "kind": "local",
            "model": narrowed(teacher, tmp_path / "narrow", 20),
            "routes": ["odd"],
            "alias": "main",
        },
    }
    tiny_run("full", **{**ON, "steps": 0}, teachers=teachers, teachers__main="none")


def test_a_teacher_may_have_any_name(student: str, teacher: str, tmp_path: Path) -> None:
    """The preflight opens a teacher of its own."""
    import asyncio

    import tiny
    from reflux.loop import train
    from reflux.training import Options

    named = {"kind": "local", "model": teacher}
    objectives = [{"kind": "divergence", "divergence": "reverse", "teacher": "preflight"}]
    changes = {**tiny.SCALE, **ON, "steps": 0, "learner.model": student, "sampler.max_tokens": 12}
    cfg = load_recipe("full", {**changes, "teachers": {"preflight": named}, "objectives": objectives})
    assert "preflight" in cfg.teachers
    asyncio.run(train(cfg, Options(tmp_path / "run")))


def test_a_student_that_is_sure_of_each_token_has_a_gradient(
    student: str, tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    net = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(300)
    sure = tmp_path / "sure"
    net.save_pretrained(sure)
    AutoTokenizer.from_pretrained(student).save_pretrained(sure)
    tiny_run("rl", **{**ON, "steps": 0}, learner__model=str(sure), group_size=2)


@pytest.mark.parametrize(("opens", "passes"), [(True, True), (False, False)])
def test_a_prompt_may_end_with_an_end_token_that_opens_the_students_turn(
    student: str, teacher: str, tiny_run: Callable[..., Any], tmp_path: Path, opens: bool, passes: bool
) -> None:
    """Phi-3 declares <|assistant|> as an end, and its template opens the student's turn with it."""
    models = []
    for model in (student, teacher):
        folder = tmp_path / Path(model).name
        shutil.copytree(model, folder)
        tokenizer = character_tokenizer()
        turns = "{% for m in messages %}<user>{{ m['content'] }}<assistant>{% endfor %}"
        marked = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
        opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
        tokenizer.chat_template = marked + opening if opens else turns
        tokenizer.save_pretrained(folder)
        file = folder / "generation_config.json"
        ends = [1, tokenizer.convert_tokens_to_ids("<assistant>")]
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
        models.append(str(folder))
    changes = {"learner__model": models[0], "teachers__main__model": models[1]}
    if passes:
        tiny_run("full", **{**ON, "steps": 0}, **changes)
        return
    with pytest.raises(ModelError, match="ends with the end token '<assistant>'"):
        tiny_run("full", **{**ON, "steps": 0}, **changes)


def test_the_checkpoints_of_a_resumed_run_are_not_counted_twice(tmp_path: Path) -> None:
    from types import SimpleNamespace

    net = torch.nn.Linear(1000, 1000)
    cfg = SimpleNamespace(learner=SimpleNamespace(trains_all=True), keep_checkpoints=2)
    learner = SimpleNamespace(model=SimpleNamespace(net=net))
    parts: Any = (cfg, None, learner, None, tmp_path)
    need = [Preflight(*parts)._disk().text]
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    need.append(Preflight(*parts)._disk().text)
    assert "needed for 3 checkpoints" in need[0]
    assert "needed for 1 checkpoints" in need[1]


def test_errors_of_code_that_comes_with_a_model_are_those_of_the_model() -> None:
    for name, known in (("transformers_modules.mine.model", True), ("mine.model", False)):
        with pytest.raises(KeyError) as caught:
            exec("raise KeyError('a')", {"__name__": name})
        assert preflight._raised_in(caught.value, "transformers") is known


def test_worked_answers_end_where_the_window_ends(
    student: str, tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    """The longest of the prompts, at place 4, has 19 tokens, and the answer "ok" three."""
    short = narrowed(student, tmp_path / "short", 20)
    rows = tiny_run("sft", **ON, learner__model=short).rows("attempts")
    cut = [row for row in rows if row.get("finish") == "length"]
    assert {(row["prompt"], len(row["tokens"])) for row in cut} == {("train-4", 1)}
    tight = narrowed(student, tmp_path / "tight", 19)
    with pytest.raises(DataError, match=r"prompt train-4 has 19 tokens, and .* leaves no room for an answer"):
        tiny_run("sft", **{**ON, "skip_checks": ["all"]}, learner__model=tight)
    skips = {"sampler__generate__long_prompts": "skip"}
    rows = tiny_run("sft", **ON, learner__model=tight, **skips).rows("attempts")
    assert [row["prompt"] for row in rows if row.get("finish") == "error"] == ["train-4"]


def test_models_that_do_not_fit_into_the_memory_are_told_in_a_sentence(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(preflight.Preflight, "_disk", full)
    with pytest.raises(ModelError, match=r"do not fit .*offload = true .*torch says: tried to allocate"):
        tiny_run("full", **{**ON, "steps": 0})
