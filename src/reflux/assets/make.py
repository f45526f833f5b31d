"""Trains the small text models on worked solutions, those of the tasks with tools on worked attempts
(`reflux.assets.tool_models`), and the flow models on drawings (`reflux.assets.glyph_models`). A model that
starts from another one is trained after it.

`python -m reflux.assets.make [--only NAME] [--out DIR]` takes, on a free core, about 10 minutes for each
teacher and for the reader, and about 3 minutes for each student, for the novice and for each flow model.

No model is trained on the output of another one. The same seed and number of threads give bit-identical
weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.assets import folder, glyph_models, tool_models
from reflux.assets.characters import character_tokenizer
from reflux.assets.specs import SPECS, Spec
from reflux.assets.store import save
from reflux.assets.text_models import IGNORED, first, train
from reflux.evals.problems import problems
from reflux.metrics.intervals import wilson
from reflux.tasks.base import Task
from reflux.types import Prompt, Reward

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def encode(prompts: list[Prompt], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(ids_BT, labels_BT), padded on the right. A row is the question and the first reference. Only the
    reference and its end token have labels.
    """
    asked = tokenizer.apply_chat_template(
        [list(prompt.messages) for prompt in prompts], add_generation_prompt=True
    )["input_ids"]
    answered = tokenizer([prompt.references[0] + tokenizer.eos_token for prompt in prompts])["input_ids"]
    rows = [torch.tensor(ask + answer) for ask, answer in zip(asked, answered, strict=True)]
    labels = [
        torch.tensor([IGNORED] * len(ask) + answer) for ask, answer in zip(asked, answered, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, float(tokenizer.pad_token_id)), pad(labels, True, float(IGNORED))


def lessons(spec: Spec) -> Iterator[Prompt]:
    """The training problems: those of the easier task, then without end those of the other."""
    if spec.easier is not None:
        yield from islice(spec.easier.prompts("train", spec.seed), spec.easier_steps * spec.batch)
    yield from spec.task.prompts("train", spec.seed)


def solutions(spec: Spec, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches (ids_BT, labels_BT), without end."""
    stream = lessons(spec)
    while True:
        yield encode(list(islice(stream, spec.batch)), tokenizer)


def cold_start(spec: Spec, tokenizer: Any) -> Qwen3ForCausalLM:
    """A model trained on worked solutions."""
    return train(first(spec, tokenizer), spec, solutions(spec, tokenizer))


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Task, *, batch: int = 250) -> tuple[int, int]:
    """(right, problems) of greedy answers to the test problems of `task`. No choice depends on these
    problems. batch: the number of problems that are answered together.
    """
    prompts, right = list(problems(task, "test")), 0
    for begin in range(0, len(prompts), batch):
        some = prompts[begin : begin + batch]
        asked = tokenizer.apply_chat_template(
            [list(prompt.messages) for prompt in some],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
        )
        room = max(len(prompt.references[0]) for prompt in some) + 8
        made = model.generate(**asked, max_new_tokens=room, do_sample=False)[:, asked["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        right += sum(
            int(Reward.of(task.verify(prompt, text)).value or 0)
            for prompt, text in zip(some, texts, strict=True)
        )
    return right, len(prompts)


def measure(model: Any, tokenizer: Any, spec: Spec) -> list[str]:
    """Lines of text on a model: one with the parameters and the training settings of `spec`, then one for
    each accuracy on a test task.
    """
    made = (
        f"{spec.steps} steps of {spec.batch} problems, seed {spec.seed}, {torch.get_num_threads()} thread(s)"
    )
    if spec.easier is not None:
        made += (
            f", the first {spec.easier_steps} steps on easier problems ({difference(spec.easier, spec.exam)})"
        )
    lines = [f"{model.num_parameters():,} parameters, {made}"]
    exams: dict[str, Task] = {
        "held-out problems": spec.exam,
        "held-out problems two steps longer": replace(spec.exam, longer=2),
    }
    if type(spec.task) is type(spec.exam) and spec.task != spec.exam:
        exams[f"held-out problems of the kind it was trained on ({difference(spec.task, spec.exam)})"] = (
            spec.task
        )
    exams |= dict(spec.also)
    for title, task in exams.items():
        right, count = accuracy(model, tokenizer, task)
        low, high = wilson(right, count)
        lines.append(
            f"{title}: {right}/{count} right, greedy ({right / count:.1%}, 95 % interval {low:.1%} to "
            f"{high:.1%})"
        )
    return lines


def difference(task: Any, exam: Any) -> str:
    """The settings in which the training task differs from the test task."""
    return ", ".join(f"{key} = {value}" for key, value in asdict(task).items() if value != asdict(exam)[key])


def main(arguments: list[str] | None = None) -> None:
    names = [*SPECS, *tool_models.TOOL_SPECS, *glyph_models.FLOW_SPECS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, help="train only this model (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the models (default: the folder of this file)")
    parser.add_argument("--threads", type=int, default=1, help="the shipped models were made with 1")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    tokenizer = character_tokenizer()
    for name in [asked.only] if asked.only else names:
        out = asked.out / name if asked.out else folder(name)
        if name in glyph_models.FLOW_SPECS:
            report = glyph_models.make(glyph_models.FLOW_SPECS[name], out)
        elif name in tool_models.TOOL_SPECS:
            report = tool_models.make(tool_models.TOOL_SPECS[name], out)
        else:
            model = cold_start(SPECS[name], tokenizer)
            report = measure(model, tokenizer, SPECS[name])
            save(model, tokenizer, SPECS[name], report, out)
        print("\n".join([f"{name}:", *report]), flush=True)


if __name__ == "__main__":
    main()
