"""Tiny untrained models that are not degenerate, and hand-made attempts along which everything is known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from device import exactly, here
from reflux.assets.characters import character_tokenizer
from reflux.config.context import Generation, Numbers, PartContext, StudentSpec
from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.evals.evaluation import Evaluation
from reflux.kernels.head import Head
from reflux.learners.hf import HF as HFLearnerPart
from reflux.learners.hf_engine import HFLearner
from reflux.learners.learning import learn
from reflux.loss.step import StepRequest
from reflux.metrics.values import Stats
from reflux.models.heads import Heads
from reflux.models.text import Model, as_model
from reflux.runtime.services import Services
from reflux.teachers.base import TeacherRequest
from reflux.teachers.local import Local
from reflux.types import Attempt, Credit, Group, HiddenTarget, Prompt, TeacherAnswer, TokenRollout

# the character tokenizer's <end>
END = 1
# what every tiny run sets, before its own overrides
SCALE = {
    "steps": 3,
    "prompts_per_step": 4,
    "learner.lr": 1e-3,
    "save_every": 1000,
    "eval_every": 1000,
    "threads": 1,
    "skip_checks": ["all"],
    "evals.accuracy": "none",
    "evals.agreement": "none",
    "evals.teacher_accuracy": "none",
    "evals.test_accuracy": "none",
}


class Heard:
    """A `Watch` that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stepped(self, metrics: dict[str, Any]) -> None: ...

    def evaluated(self, results: dict[str, Any]) -> None: ...

    def noted(self, text: str) -> None:
        self.notes.append(text)


def net(seed: int, *, layers: int = 1, width: int = 32, padded_rows: int = 0, lift: float = 2.0) -> Any:
    """Qwen3 from random numbers, with some 2.5 nats of entropy. padded_rows: output rows beyond the tokens.

    lift: of the end token; 2 is one position in nine, 1 one in fifty.
    """
    tokens = len(character_tokenizer())
    shape = {
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "head_dim": width // 2,
    }
    ends = {"eos_token_id": END, "pad_token_id": 0, "bos_token_id": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    cfg = Qwen3Config(
        vocab_size=tokens + padded_rows,
        max_position_embeddings=512,
        dtype="float32",
        **shape,
        **heads,
        **ends,
    )
    model = Qwen3ForCausalLM(cfg)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.normal_(0, 0.35 if "embed" in name else value.shape[1] ** -0.5, generator=rng)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[END, 0] += lift
        # padded rows would be chosen always, were they not cut off
        embedding[tokens:, 0] += 6.0
    return here(model.eval())


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def config(recipe: str, student: str, teacher: str, **overrides: Any) -> RunConfig:
    """A shipped recipe at tiny scale. Keyword names carry dots as double underscores: sampler__max_tokens =
    5.
    """
    limit = "sampler.generate.max_tokens" if recipe == "sft" else "sampler.max_tokens"
    changes: dict[str, Any] = {**SCALE, "learner.model": student, limit: 12}
    shipped = load_recipe(recipe)
    tables = shipped.teachers.items()
    changes |= {f"teachers.{name}.model": teacher for name, table in tables if isinstance(table, Local)}
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(recipe, changes | exactly(shipped, named) | named)


class AllHeads(Heads):
    """Those of every model of the tests, so that any learner reads any hand-made target; a key may be given
    to another head.
    """

    def add(self, key: str, head: Head) -> str:
        self._heads[key] = head
        return key


HEADS = AllHeads()


def context(
    requirements: Requirements = Requirements(), *, name: str = "main", seed: int = 0, **fields: Any
) -> PartContext:
    """What a part is told, with nothing behind it; `model` and other fields of StudentSpec describe the
    student.
    """
    told = {key: fields.pop(key) for key in ("model", "system", "template") if key in fields}
    sizes = Numbers(
        steps=1,
        prompts_per_step=1,
        group_size=1,
        max_staleness=0,
        order="ready",
        training_positions=12,
        evaluation_positions=12,
    )
    student = StudentSpec(**{"model": "tiny", **told})
    common = {"task": None, "generation": Generation(), "numbers": sizes, "folder": Path("nowhere"), **fields}
    return PartContext(name=name, seed=seed, requirements=requirements, student=student, **common)


def services(student: StudentSpec | None = None, **fields: Any) -> Services:
    """Services of this process. Without a student of its own, it has the character tokenizer."""
    made = Services(student or StudentSpec("tiny"), **fields)
    made.heads = HEADS
    if student is None:
        # the cached property's place
        made.tokenizer = character_tokenizer()
    return made


def evaluation(
    sampler: Any,
    teachers: Any = None,
    *,
    graders: Any = None,
    positions: int = 12,
    step: int = 0,
    **told: Any,
) -> Evaluation:
    """Answers of `sampler`, judged by `graders`; `told` are fields of the context: task, seed, generation,
    teachers.
    """
    known = context(name="sampler", **told)
    made = services()
    if graders is not None:
        # the cached property's place
        made.graders = graders
    limits = replace(known.numbers, evaluation_positions=positions)
    return Evaluation(replace(known, numbers=limits), made, None, sampler, teachers, step)  # type: ignore[arg-type]


def learner(model: Any, **fields: Any) -> HFLearner:
    """An open learner without a run directory; its optimiser does not move, and gradients stay unclipped."""
    table = {"model": "tiny", "lr": 0.0, "clip": 1e12, "autocast": "off"} | fields
    part = HFLearnerPart(**table)
    return HFLearner(part, context(name="learner"), services(), as_model(model, character_tokenizer()))


def move(
    opened: Any,
    groups: Sequence[Group],
    objectives: Sequence[Any],
    step: int = 0,
    loss_aggregation: str = "token-mean-weighted",
) -> Stats:
    """One optimiser step as the loop makes it: what the learner found out is stored on the attempts."""
    request = StepRequest(groups, objectives, StepContext(step, 0), loss_aggregation)
    return asyncio.run(learn(opened, request, lambda groups, why: Path("refused.jsonl"))).stats


def gradients(
    opened: Any,
    groups: Sequence[Group],
    objectives: Sequence[Any],
    loss_aggregation: str = "token-mean-weighted",
) -> dict[str, Tensor]:
    """What one step leaves on the parameters."""
    move(opened, groups, objectives, loss_aggregation=loss_aggregation)
    return {name: p.grad.clone() for name, p in opened.trained.items() if p.grad is not None}


def rollout(
    length: int,
    *,
    seed: int = 0,
    prompt_tokens: int = 5,
    sample: int = 0,
    finish: Any = "stop",
    mask: Any = None,
) -> TokenRollout:
    """Random tokens under random behaviour log-probs."""
    rng = np.random.default_rng((seed, length, prompt_tokens, sample))
    prompt = Prompt(f"p{seed}", ({"role": "user", "content": f"question {seed}"},))
    return TokenRollout(
        prompt=prompt,
        sample=sample,
        version=0,
        finish=finish,
        mask_T=np.ones(length, dtype=bool) if mask is None else np.asarray(mask, dtype=bool),
        logp_T=rng.uniform(-6, -2, length).astype(np.float32),
        prompt_tokens=rng.integers(6, 100, prompt_tokens),
        tokens_T=rng.integers(1, 102, length),
        text="",
        messages=prompt.messages,
    )


def hidden(model: Model, spoken: TokenRollout, name: str = "main") -> HiddenTarget:
    """The word of a teacher along a rollout."""
    ids = np.concatenate([spoken.prompt_tokens, spoken.tokens_T[:-1]])
    with torch.inference_mode():
        ids_1L = torch.from_numpy(ids)[None].to(model.device)
        h_LH = model.trunk(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
    return HiddenTarget(
        teacher=name,
        h_TH=h_LH[len(spoken.prompt_tokens) - 1 :].to("cpu", copy=True),
        head=HEADS.add(f"head {id(model.head)}", model.head),
    )


def attempt(
    spoken: TokenRollout, teacher: Model | None = None, weight: Any = 1.0, shift: Any = 0.0
) -> Attempt:
    """An attempt with the teacher's word, one rule's factor and another one's shift."""
    made = Attempt(spoken)
    if teacher is not None and spoken.length:
        made.answers["main"] = TeacherAnswer(target=hidden(teacher, spoken))
    made.credits["weigh"] = Credit(
        weight_T=np.asarray(weight, dtype=np.float32) if np.ndim(weight) else weight
    )
    made.credits["push"] = Credit(
        advantage_offset_T=np.asarray(shift, dtype=np.float32) if np.ndim(shift) else shift
    )
    return made


async def ask(teacher: Any, *asked: tuple[Attempt, TeacherPrompt]) -> None:
    """As `Teachers` asks: what an open teacher answers is put on the attempts, under its name."""
    answers = await teacher.score(
        [TeacherRequest(attempt.rollout, view, teacher.context.requirements) for attempt, view in asked]
    )
    for (made, _), answer in zip(asked, answers, strict=True):
        made.answers[teacher.name] = answer


def plainly(attempts: Iterable[Attempt]) -> list[tuple[Attempt, TeacherPrompt]]:
    """Each attempt in the context `same`."""
    return [(attempt, TeacherPrompt(attempt.rollout.prompt.messages)) for attempt in attempts]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(*(torch.as_tensor(values[name]).cpu() for values in (one, other))) for name in one
    )


def close(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """Within rtol of each value, or of the largest of all."""
    assert one.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in one.values())
    assert largest > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=rtol * largest)
