"""Steps of TRL's DistillationTrainer (1.16), timed, and measurements that run in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def trl_seconds(
    folder: Path, *, micro: int, accumulated: int, steps: int, new: int, gpu: bool, teacher_dtype: str
) -> list[float]:
    """The seconds of each step, from the end of the one before. The loss is the exact reverse KL.

    folder: with `student`, `teacher` and `prompts.jsonl`. micro: texts of one micro-batch, of which
    `accumulated` make a step. new: tokens of each answer. gpu: in bfloat16 autocast on a GPU; otherwise in
    float32 on the CPU.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            if gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - getattr(self, "last", self.started))
            self.last = now

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        max_steps=steps,
        max_completion_length=new,
        beta=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = load_dataset(
        "json", data_files=str(folder / "prompts.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=teacher_dtype),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
        train_dataset=data.remove_columns("id"),
        callbacks=[Timer()],
    )
    trainer.train()
    return seconds


def in_process(
    python: str, script: str, side: str, folder: Path, options: Mapping[str, object], **settings: str
) -> dict[str, Any]:
    """What `script` prints after "RESULT " for one side. settings: variables of its environment."""
    source = str(Path(__file__).parents[1] / "src")
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    words = [str(word) for pair in options.items() for word in pair]
    command = [python, script, "--side", side, "--folder", str(folder), *words]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))
