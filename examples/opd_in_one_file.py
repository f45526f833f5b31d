"""On-policy distillation in one file: the student samples, the teacher gives its log-probs at every position,
and the student takes a gradient step.

    python -m reflux.tasks.word_problems train 12800 > train.jsonl
    python -m reflux.tasks.word_problems test 500 > test.jsonl
    python examples/opd_in_one_file.py --student src/reflux/assets/student --teacher src/reflux/assets/teacher

The prompts can also be lines of your own: {"id": ..., "prompt": ..., "answer": ...}. For a prompt x the
student samples y ~ student(. | x). With state s_t = (x, y_<t), and with the states held fixed, it then
minimises the reverse KL in nats:

    loss = 1/N sum over all chosen positions t of  KL(student(. | s_t) || teacher(. | s_t))

This is the whole algorithm of the library at its simplest setting, with only torch and transformers (Agarwal
et al. 2024, arXiv:2306.13649; Lu & Thinking Machines Lab 2025). Suffixes: B rows, T new tokens, V vocabulary.
Rows are padded on the left.
"""

import argparse
import hashlib
import json
import math
import re
import time
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

MASK64 = (1 << 64) - 1


def row_key(seed, purpose, step, prompt_id, sample=0, turn=0):
    """The key of a row's random numbers, 63 bits of a hash. It depends on these arguments and not on other
    rows.
    """
    digest = hashlib.blake2b(
        repr((seed, purpose, step, prompt_id, sample, turn)).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1


def signed(constant):
    return constant - (1 << 64) if constant >> 63 else constant


def shift(z, bits):
    """The logical right shift of int64."""
    return (z >> bits) & (MASK64 >> bits)


def gumbel(keys_B, t, vocabulary):
    """Standard Gumbel noise [B, V] for new token t, from a splitmix64 hash of (key, t, token id).
    argmax(logp + noise) is a sample.
    """
    ids_V = torch.arange(1, vocabulary + 1)
    z = (keys_B + torch.tensor(t + 1) * signed(0x9E3779B97F4A7C15))[:, None] + ids_V * signed(
        0xD1B54A32D192ED03
    )
    z = (z ^ shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift(z, 27)) * signed(0x94D049BB133111EB)
    uniform_BV = (shift(z ^ shift(z, 31), 41).float() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform_BV))


def ask(tokenizer, prompts):
    """(ids, mask): questions as token ids, each followed by the start of the assistant's turn."""
    chats = [[{"role": "user", "content": prompt["prompt"]}] for prompt in prompts]
    asked = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    return asked["input_ids"], asked["attention_mask"]


@torch.no_grad()
def sample(model, tokenizer, prompts, max_tokens, keys=None):
    """Sample answers from the model, greedily without keys. Returns the ids of question and answer, their
    mask, and mask_BT, which is True at the answer tokens that the model chose.
    """
    ids, mask = ask(tokenizer, prompts)
    width, cache, alive_B = (
        ids.shape[1],
        DynamicCache(config=model.config),
        torch.ones(len(ids), dtype=torch.bool),
    )
    keys_B = None if keys is None else torch.tensor(keys)
    new, position = ids, (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(max_tokens):
        made = model(
            new,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores_BV = made.logits[:, -1].float().log_softmax(-1)
        if keys_B is not None:
            scores_BV = scores_BV + gumbel(keys_B, t, scores_BV.shape[1])
        token_B = torch.where(alive_B, scores_BV.argmax(-1), tokenizer.pad_token_id)
        ids, mask = torch.cat([ids, token_B[:, None]], 1), torch.cat([mask, alive_B[:, None].long()], 1)
        # the end token is a chosen token too, and the last one
        alive_B = alive_B & (token_B != tokenizer.eos_token_id)
        if not alive_B.any():
            break
        new, position = token_B[:, None], mask.sum(1, keepdim=True) - 1
    return ids, mask, mask[:, width:].bool()


def speak(model, ids, mask, tokens):
    """logp_BTV: the model's log-probs at each of the last `tokens` positions, given all tokens before it."""
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=tokens + 1
    ).logits
    # position t is predicted by the state before it
    return logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def teach(teacher, ids, mask, tokens):
    return speak(teacher, ids, mask, tokens)


def learn(student, optimiser, ids, mask, mask_BT, teacher_BTV, max_norm=1.0):
    """One gradient step on the mean reverse KL over the chosen positions. Returns the mean before the step,
    in nats.
    """
    student_BTV = speak(student, ids, mask, mask_BT.shape[1])
    kl_BT = (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1)
    loss = kl_BT[mask_BT].sum() / mask_BT.sum()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    optimiser.step()
    return loss.item()


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then a half cosine to zero."""
    along = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return min(1.0, (step + 1) / (warmup + 1)) * peak * 0.5 * (1 + math.cos(math.pi * along))


def distil(
    student,
    teacher,
    tokenizer,
    prompts,
    *,
    steps,
    per_step,
    lr,
    warmup,
    max_tokens,
    seed,
    eps=1e-8,
    report=print,
):
    """Train `student` in place on consecutive slices of `prompts`, again from the start when all are used.
    Returns the loss of every step.
    """
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    losses = []
    for step in range(steps):
        asked = [prompts[(step * per_step + row) % len(prompts)] for row in range(per_step)]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        keys = [row_key(seed, "train", step, prompt["id"]) for prompt in asked]
        # the student samples
        ids, mask, mask_BT = sample(student, tokenizer, asked, max_tokens, keys)
        # the teacher gives its log-probs
        teacher_BTV = teach(teacher, ids, mask, mask_BT.shape[1])
        # the student takes a step
        losses.append(learn(student, optimiser, ids, mask, mask_BT, teacher_BTV))
        report(f"step {step + 1:4d}/{steps}  KL {losses[-1]:.4f} nats  {int(mask_BT.sum())} tokens")
    return losses


def accuracy(model, tokenizer, prompts, max_tokens, batch=250):
    """The share of greedy answers with the right number after the last "Answer:"."""
    right = 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        ids, _, mask_BT = sample(model, tokenizer, some, max_tokens)
        for prompt, text in zip(
            some, tokenizer.batch_decode(ids[:, -mask_BT.shape[1] :], skip_special_tokens=True), strict=True
        ):
            found = (
                re.match(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])", text.rpartition("Answer:")[2])
                if "Answer:" in text
                else None
            )
            right += found is not None and found[1] == prompt["answer"]
    return right / len(prompts)


def read(path):
    """Prompts from a file with one JSON object per line."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    return [{"id": str(index), **line} for index, line in enumerate(lines)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="src/reflux/assets/student")
    parser.add_argument("--teacher", default="src/reflux/assets/teacher")
    parser.add_argument("--prompts", default="train.jsonl")
    parser.add_argument("--held-out", default="test.jsonl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--per-step", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (given.student, given.teacher)
    )
    before, held_out = deepcopy(student), read(given.held_out)
    begun = time.monotonic()
    distil(
        student, teacher, tokenizer, read(given.prompts), steps=given.steps, per_step=given.per_step,
        lr=given.lr, warmup=given.warmup, max_tokens=given.max_tokens, seed=given.seed,
    )  # fmt: skip
    print(f"{(time.monotonic() - begun) / given.steps:.3f} s per step")
    for name, model in (("student before", before), ("student after", student), ("teacher", teacher)):
        print(
            f"{name:15s} {accuracy(model, tokenizer, held_out, given.max_tokens):.1%} of {len(held_out)} "
            "held-out problems"
        )


if __name__ == "__main__":
    main()
