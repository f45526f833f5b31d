"""Trains the small text models on worked solutions, and the flow models on drawings
(`reflux.assets.glyph_models`). A model that starts from another one is trained after it.

`python -m reflux.assets.make [--only NAME] [--out DIR]` takes, on a free core, about 10 minutes for each
teacher and for the reader, and about 3 minutes for the student, for the novice and for each flow model.

No model is trained on the output of another one. The same seed and number of threads give bit-identical
weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.assets import folder, glyph_models
from reflux.assets.characters import character_tokenizer
from reflux.assets.specs import SPECS, Spec
from reflux.assets.store import save
from reflux.evals.problems import problems
from reflux.metrics.intervals import wilson
from reflux.tasks.base import Task
from reflux.types import Prompt, Reward

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

IGNORED = -100


def blank(spec: Spec, tokenizer: Any) -> Qwen3ForCausalLM:
    """An untrained model with the shape of `spec`: Qwen3, float32, with tied embeddings."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.inner,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        head_dim=spec.width // spec.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    torch.manual_seed(spec.seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    return model


def first(spec: Spec, tokenizer: Any) -> Qwen3ForCausalLM:
    """The model from which training starts: the shipped model `spec.start`, or an untrained one."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder(spec.start)) if spec.start else blank(spec, tokenizer)


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


def cold_start(spec: Spec, tokenizer: Any) -> Qwen3ForCausalLM:
    """A model trained on worked solutions with AdamW, warm-up and cosine decay, and gradient norm clipped at
    1.
    """
    model = first(spec, tokenizer).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream, begun = lessons(spec), time.monotonic()
    for step in range(spec.steps):
        along = step / spec.steps
        rate = spec.lr * min(1.0, (step + 1) / spec.warmup) * 0.5 * (1 + math.cos(math.pi * along))
        for group in optimiser.param_groups:
            group["lr"] = rate
        ids_BT, labels_BT = encode(list(islice(stream, spec.batch)), tokenizer)
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(
                f"{spec.name} step {step + 1}/{spec.steps} loss {loss.item():.4f} nats, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Task, *, batch: int = 250) -> tuple[int, int]:
    """(right, problems) of greedy answers to the test problems of `task`. No choice depends on these
    problems. batch: the number of problems that are answered together.
    """
    prompts, right = list(problems(task, "test")), 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=[*SPECS, *glyph_models.FLOW_SPECS], help="train only this model (default: all)"
    )
    parser.add_argument("--out", type=Path, help="folder for the models (default: the folder of this file)")
    parser.add_argument("--threads", type=int, default=1, help="the shipped models were made with 1")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    tokenizer = character_tokenizer()
    for name in [asked.only] if asked.only else [*SPECS, *glyph_models.FLOW_SPECS]:
        out = asked.out / name if asked.out else folder(name)
        if name in glyph_models.FLOW_SPECS:
            report = glyph_models.make(glyph_models.FLOW_SPECS[name], out)
        else:
            model = cold_start(SPECS[name], tokenizer)
            report = measure(model, tokenizer, SPECS[name])
            save(model, tokenizer, SPECS[name], report, out)
        print("\n".join([f"{name}:", *report]), flush=True)


if __name__ == "__main__":
    main()
