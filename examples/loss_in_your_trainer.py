"""The library's loss without its training loop, compared with the same loss in plain torch. Values and
gradients are equal, and the library's loss needs no tensor of shape [tokens, vocabulary].

python examples/loss_in_your_trainer.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflux.kernels.head import Head
from reflux.loss.linear_divergence import linear_divergence
from reflux.models.locations import ASSETS
from reflux.objectives.divergence import Divergence

TEXTS = ["Tom has 12 apples and buys 7. How many?", "Mia had 30 pens and lost 4 of them."]


def main() -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ASSETS / name) for name in ("student", "teacher")
    )
    width = max(len(tokenizer(text).input_ids) for text in TEXTS)
    ids_BL = torch.tensor(
        [tokenizer(text).input_ids + [0] * (width - len(tokenizer(text).input_ids)) for text in TEXTS]
    )
    mask_BL = torch.tensor(
        [[place < len(tokenizer(text).input_ids) - 1 for place in range(width)] for text in TEXTS]
    )
    next_ids_N = ids_BL.roll(-1, 1)[mask_BL]
    coef_N = torch.full((len(next_ids_N),), 1 / len(next_ids_N))

    student_NH = student.model(ids_BL).last_hidden_state[mask_BL]
    with torch.no_grad():
        teacher_NG = teacher.model(ids_BL).last_hidden_state[mask_BL]
    heads = [Head.of_net(net, len(tokenizer)) for net in (student, teacher)]
    answer = linear_divergence(
        student_NH, heads[0], teacher_NG, heads[1], next_ids_N, coef_N, Divergence(divergence="reverse")
    )
    answer.loss.backward()
    ours = student.lm_head.weight.grad.clone()

    student.zero_grad()
    p_NV = student(ids_BL).logits[mask_BL].log_softmax(-1)
    with torch.no_grad():
        q_NV = teacher(ids_BL).logits[mask_BL].log_softmax(-1)
    plain = (p_NV.exp() * (p_NV - q_NV)).sum(-1).mean()
    plain.backward()
    gap = float((ours - student.lm_head.weight.grad).norm() / ours.norm())
    print(
        f"loss {answer.loss.item():.6f}, plain torch {plain.item():.6f}; gradients of the (tied) head differ "
        f"by {gap:.1e} of their size"
    )
    print(f"mean KL {answer.kl_N.mean():.4f} nats, mean entropy {answer.entropy_N.mean():.4f} nats")
    return {"ours": answer.loss.item(), "plain": plain.item(), "gap": gap}


if __name__ == "__main__":
    main()
