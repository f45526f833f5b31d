"""The ids that end a turn are the same for whoever asks: the loaded model, its files, doctor, given answers
and the exported student.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from laws.test_own_rng import PROMPTS, ask, sampled
from reflux.assets.characters import character_tokenizer
from reflux.config.context import StudentSpec
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.evals.tokenizer_findings import before
from reflux.models.generation_file import end_ids_of
from reflux.models.lora import export
from reflux.models.text import as_model, load_model, load_tokenizer


def copied(model: str, folder: Path, **generation: object) -> str:
    """A copy of a model whose generation config has these values; without values it has no such file."""
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    file.unlink()
    if generation:
        file.write_text(json.dumps(generation))
    return str(folder)


@pytest.mark.parametrize("declared", [{"eos_token_id": [1, 3]}, {"eos_token_id": 4}, {"top_k": 5}, {}])
def test_files_name_the_ends_of_the_loaded_model(
    student: str, tmp_path: Path, declared: dict[str, object]
) -> None:
    model = copied(student, tmp_path / "model", **declared)
    tokenizer = load_tokenizer(model, "learner.model")
    assert (
        end_ids_of(StudentSpec(model), "learner.model", tokenizer)
        == load_model(model, "learner.model").end_ids
    )


def test_an_end_in_the_models_config_alone_is_one(student: str, tmp_path: Path) -> None:
    folder = Path(copied(student, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    loaded = load_model(str(folder), "learner.model")
    assert end_ids_of(StudentSpec(str(folder)), "learner.model", loaded.tokenizer) == loaded.end_ids == (1, 5)


def test_a_config_that_is_no_json_is_refused_by_its_key(student: str, tmp_path: Path) -> None:
    folder = Path(copied(student, tmp_path / "model"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"^learner\.model: the config of"):
        end_ids_of(StudentSpec(str(folder)), "learner.model", character_tokenizer())


def test_doctor_names_them(student: str, teacher: str, tmp_path: Path) -> None:
    ours = copied(student, tmp_path / "ours", eos_token_id=[1, 3])
    theirs = copied(teacher, tmp_path / "theirs", eos_token_id=[1, 4])
    found = list(before(tiny.config("full", ours, theirs)))
    texts = [finding.text for finding in found if finding.check == "end of text"]
    assert "ids [1, 3] end an answer" in texts[0]
    assert texts[1] == "teacher 'main' ends answers with ids [1, 4], the student with [1, 3]"


def test_a_given_answer_ends_at_any_of_them(student: str, teacher: str, tmp_path: Path) -> None:
    """<system> ends a turn of this model, so an answer goes no further than that."""
    cfg = tiny.config("sft", copied(student, tmp_path / "ours", eos_token_id=[1, 3]), teacher)
    prompt = replace(PROMPTS[0], references=("5<system>6",))
    ((attempt,),) = sampled(
        cfg, tmp_path / "run", lambda acting: ask(acting, [prompt], 1, SamplingParams(0, "train", 9))
    )
    tokens = attempt.rollout.tokens_T.tolist()
    assert character_tokenizer().convert_ids_to_tokens(tokens) == ["5", "<system>"]


def test_an_exported_student_stops_where_it_stopped_in_training(tmp_path: Path) -> None:
    """A base model's own end is <end>, and its chat template ends turns with another token."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "<system>")
    model = as_model(tiny.net(0), tokenizer)
    assert model.end_ids == (1, 3)
    for name in ("one", "two"):
        export(model, tmp_path / name)
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written["eos_token_id"] == [1, 3]
    assert model.net.generation_config.eos_token_id == 1
    plain = as_model(tiny.net(0), character_tokenizer())
    export(plain, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == 1
