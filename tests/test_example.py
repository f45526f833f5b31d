"""The library gives the curve of examples/opd_in_one_file.py, which imports none of it."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "opd_in_one_file.py"
STEPS, PER_STEP, TOKENS, LR, WARMUP, SEED = 4, 8, 64, 2e-3, 2, 3
# at Adam's 1e-8 a gradient that is only rounding makes a full step, in any direction: nothing to compare
EPS = 1e-6


def load(path: Path = EXAMPLE) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_imports_nothing_of_the_library() -> None:
    imports = [
        node
        for node in ast.walk(ast.parse(EXAMPLE.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", "") or "" for node in imports
    }
    assert not any(name.startswith("reflux") for name in names)


def test_the_library_gives_the_examples_curve(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.models.locations import ASSETS
    from reflux.training import Options

    changes = {
        "steps": STEPS,
        "prompts_per_step": PER_STEP,
        "seed": SEED,
        "threads": 1,
        "evals": "none",
        "sampler.max_tokens": TOKENS,
        "learner.lr": {"kind": "cosine", "peak": LR, "warmup": WARMUP},
        "learner.betas": [0.9, 0.95],
        "learner.eps": EPS,
    }
    cfg = load_recipe("full", changes)
    asyncio.run(train(cfg, Options(tmp_path / "run")))
    ours = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]

    example = load()
    prompts = islice(cfg.task.prompts("train", SEED), STEPS * PER_STEP)
    lines = [{"id": prompt.id, "prompt": prompt.messages[-1]["content"]} for prompt in prompts]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ASSETS / name).eval() for name in ("student", "teacher")
    )
    theirs = example.distil(
        student, teacher, tokenizer, lines, steps=STEPS, per_step=PER_STEP, lr=LR, warmup=WARMUP,
        max_tokens=TOKENS, seed=SEED, eps=EPS,
        report=lambda line: None,
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-4)

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight, dict(student.named_parameters())[name], rtol=1e-3, atol=2e-5)


def test_the_loss_alone_is_that_of_plain_torch() -> None:
    found = load(EXAMPLE.with_name("loss_in_your_trainer.py")).main()
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["gap"] < 1e-5
