"""How far a student is from its teacher on answers that the teacher wrote: the forward KL, for the runs of a
study on a real model.

    python studies/teacher_texts.py RUN [RUN ...] [--prompts 64] [--tokens 48] [--seed 0] [--threads 2]

The evaluation `agreement` measures the reverse KL on the student's own answers. A student that repeats one
phrase can score well there. Here the teacher answers the first held-out prompts of the first run's task once,
sampled at temperature 1, and every student is measured on the same answers, and so is the student with which
the first run began. Printed: sum over the vocabulary of q (log q - log p) in nats per token (p: the student,
q: the teacher), with a 95 % t-interval over answers.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflux.config.recipe import from_table, saved_table
from reflux.errors import RefluxError
from reflux.evals.problems import problems
from reflux.metrics.intervals import clustered_mean
from reflux.tasks.base import Task


@torch.no_grad()
def written(teacher: Any, tokenizer: Any, task: Task, count: int, tokens: int) -> list[tuple[Tensor, int]]:
    """The teacher's answers to the first held-out prompts: the ids of prompt and answer, and the number of
    prompt tokens.
    """
    found = []
    for prompt in islice(problems(task, "validation"), count):
        asked = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        # top_k and top_p of the model's generation settings would leave tokens out.
        whole = teacher.generate(
            asked, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        found.append((whole[0], asked.shape[1]))
    return found


@torch.no_grad()
def logp_of(model: Any, answers: list[tuple[Tensor, int]]) -> list[Tensor]:
    """For each answer logp_NV, the log-probs of the whole vocabulary at each of its tokens."""
    # The last position predicts what follows the answer.
    return [
        model(ids[None], logits_to_keep=len(ids) - begin + 1).logits[0, :-1].log_softmax(-1)
        for ids, begin in answers
    ]


def forward_kl(logq: list[Tensor], logp: list[Tensor]) -> list[Any]:
    """For each answer the forward KL at each of its tokens, nats."""
    return [
        (logq_NV.double().exp() * (logq_NV - logp_NV)).sum(-1).numpy()
        for logq_NV, logp_NV in zip(logq, logp, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories of one study")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the teacher's answers")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for run in asked.runs:
        if not (run / "config.toml").exists():
            sys.exit(f"{run} is not a run directory: it has no config.toml")
    try:
        table = saved_table(asked.runs[0])
        folder = table["teachers"]["main"]["model"]
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(asked.seed)
        answers = written(teacher, tokenizer, from_table(table).task, asked.prompts, asked.tokens)
        logq = logp_of(teacher, answers)
        students = {"before training": table["learner"]["model"]} | {
            f"{run.parent.name} {run.name}": str(run / "student") for run in asked.runs
        }
        print("| student | forward KL on the teacher's answers, nats per token |\n|---|---|")
        for name, folder in students.items():
            student = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
            mean, low, high = clustered_mean(forward_kl(logq, logp_of(student, answers)))
            print(f"| {name} | {mean:.3f} ({low:.3f} to {high:.3f}) |", flush=True)
    except (RefluxError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
