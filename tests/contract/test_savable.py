"""What transformers refuses on saving is mended or refused before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from reflux.errors import ModelError
from reflux.models.savable import check_savable, mend_generation_config
from reflux.models.text import load_model


@pytest.mark.parametrize(
    ("stored", "exported"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"temperature": 0.9, "do_sample": False}, {}),
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.9, "length_penalty": 2.0}, {}),
        ({"pad_token_id": -1}, {}),
    ],
)
def test_generation_settings_are_mended(student: str, tmp_path: Path, stored: Any, exported: Any) -> None:
    net = load_model(student, "m").net
    net.generation_config = GenerationConfig.from_dict({"eos_token_id": [1, 2], **stored})
    said = mend_generation_config(net)
    assert said is not None
    assert "generation_config.json" in said
    net.generation_config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    kept.pop("transformers_version")
    assert kept == {"eos_token_id": [1, 2], **exported}


def test_valid_settings_are_left_alone(student: str) -> None:
    net = load_model(student, "m").net
    before = net.generation_config
    assert mend_generation_config(net) is None
    assert net.generation_config is before


def test_what_cannot_be_saved_is_refused(student: str) -> None:
    model = load_model(student, "learner.model")
    check_savable(model)
    model.net.generation_config = GenerationConfig(temperature=0.5, do_sample=False)
    with pytest.raises(ModelError, match=r"learner\.model: .* could not be saved after training"):
        check_savable(model)


def test_a_run_whose_student_has_sampling_values_ends(student: str, tmp_path: Path, tiny_run: Any) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    settings = {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    done = tiny_run(learner__model=str(folder), steps=1)
    kept = json.loads((done.dir / "student" / "generation_config.json").read_text())
    assert (kept["do_sample"], kept["temperature"], kept["top_p"]) == (True, 0.9, 0.6)
