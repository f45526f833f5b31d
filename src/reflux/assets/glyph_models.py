"""Trains the flow models of the task `glyphs` by flow matching on drawings: a generalist, and from it a
specialist for each domain.

The loss is the mean of |v(x_t, t, prompt) - (x_1 - x_0)|^2 over pixels, with x_0 a drawing in [-1, 1], x_1
noise, x_t = (1 - t) x_0 + t x_1 and t the sigmoid of a normal variable (arXiv 2403.03206). No model is
trained on the output of another model.

`reflux.assets.make` runs it. It takes about 3 minutes per model on a free core. The same seed and number of
threads give bit-identical weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reflux.assets import folder
from reflux.config.step_context import seed_of
from reflux.evals.problems import problems
from reflux.metrics.intervals import wilson
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.load import load_flow
from reflux.models.flow.net import UNCONDITIONAL, FlowNet, PromptTable
from reflux.samplers.flow import prompt_text
from reflux.storage.files import write_folder
from reflux.tasks.glyph_drawing import DOMAINS, SIDE, WHITE, Domain, draw
from reflux.tasks.glyphs import Glyphs
from reflux.types import Prompt

# the width of a prompt token and of the pooled vector
WIDTH = 32
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---
# Reflux {name}

{role} for the toy task `glyphs`: diffusers' `SD3Transformer2DModel` on 16 x 16 pixels, \
without an autoencoder; it knows its prompts by
heart. Trained from {origin} by flow matching on drawings (never on another model's output). Made by
`python -m reflux.assets.make --only {name}`.

{report}
"""


@dataclass(frozen=True)
class FlowSpec:
    """A flow model and the settings of its training. Specialists differ by `domains`."""

    name: str
    seed: int
    lr: float = 2e-3
    steps: int = 1000
    batch: int = 64
    warmup: int = 50
    # the share of the prompts that are replaced by the empty prompt, so that guidance works
    blank: float = 0.1
    # the shipped model whose weights training starts from; "" for an untrained model
    start: str = ""
    domains: tuple[Domain, ...] = DOMAINS
    layers: int = 4
    # the number of held-out prompts of each domain in its evaluation
    problems: int = 480


FLOW_SPECS = {
    "glyph_base": FlowSpec("glyph_base", seed=1),
    "glyph_digits": FlowSpec("glyph_digits", seed=2, lr=1e-3, start="glyph_base", domains=("digits",)),
    "glyph_counts": FlowSpec("glyph_counts", seed=3, steps=2000, start="glyph_base", domains=("counts",)),
}


class GlyphScore(NamedTuple):
    right: int
    images: int
    # the mean quality of the images
    quality: float

    def __str__(self) -> str:
        low, high = wilson(self.right, self.images)
        share = f"{self.right / self.images:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        return f"{self.right}/{self.images} right ({share}), quality {self.quality:.3f}"


def blank(spec: FlowSpec) -> FlowModel:
    """An untrained model with the shape of `spec`, float32 on the CPU, with 0.58 million parameters."""
    torch.manual_seed(spec.seed)
    transformer = library().SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=spec.layers,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_projection_dim=64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )
    prompts = PromptTable([UNCONDITIONAL, *Glyphs().texts()], length=2, width=WIDTH, pooled=WIDTH)
    scheduler = dict(library().FlowMatchEulerDiscreteScheduler(shift=1.0).config)
    return FlowModel(FlowNet(transformer, prompts), scheduler, prompts, None, "", torch.float16)


def first(spec: FlowSpec) -> FlowModel:
    """The model from which training starts: the shipped model `spec.start`, or an untrained one."""
    return (
        load_flow(str(folder(spec.start)), "start", dtype="float32", device="cpu")
        if spec.start
        else blank(spec)
    )


def drawings(prompts: Sequence[Prompt], rng: random.Random) -> Tensor:
    """A drawing for each prompt, flattened, float32 [N, D]. Black is -1 and white is 1. rng: chooses
    positions.
    """
    images = np.stack([draw(prompt, rng) for prompt in prompts])
    return torch.from_numpy(images).flatten(1).float() * (2 / WHITE) - 1


def cold_start(spec: FlowSpec) -> FlowModel:
    """A model trained on drawings with AdamW, warm-up and cosine decay, and gradient norm clipped at 1."""
    model = first(spec)
    weights = list(model.net.train().parameters())
    optimiser = torch.optim.AdamW(weights, lr=spec.lr, weight_decay=0.01)
    stream, begun = Glyphs(domains=spec.domains).prompts("train", spec.seed), time.monotonic()
    rng, noise = random.Random(spec.seed), torch.Generator().manual_seed(spec.seed)
    for step in range(spec.steps):
        rate = (
            spec.lr * min(1.0, (step + 1) / spec.warmup) * 0.5 * (1 + math.cos(math.pi * step / spec.steps))
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        prompts = list(islice(stream, spec.batch))
        texts = [UNCONDITIONAL if rng.random() < spec.blank else prompt_text(prompt) for prompt in prompts]
        loss = flow_matching(model, drawings(prompts, rng), texts, noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(
                f"{spec.name} step {step + 1}/{spec.steps} loss {loss.item():.4f}, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    model.net.eval()
    return model


def flow_matching(model: FlowModel, clean_ND: Tensor, texts: Sequence[str], rng: torch.Generator) -> Tensor:
    """The flow-matching loss of clean images `clean_ND` with prompts `texts`, with one random time and noise
    for each row.
    """
    noise_ND = torch.randn(clean_ND.shape, generator=rng)
    t_N = torch.randn(len(clean_ND), generator=rng).sigmoid()
    v_ND = model.velocity(clean_ND.lerp(noise_ND, t_N[:, None]), t_N, texts)
    return (v_ND - (noise_ND - clean_ND)).square().mean()


@torch.no_grad()
def pictures_of(
    model: FlowModel, texts: Sequence[str], *, steps: int, guidance: float = 1.0, seed: int = 0
) -> list[np.ndarray]:
    """An image for each text, made by `steps` Euler steps with this guidance, from noise with this seed."""
    channels, height, width = model.shape()
    x_ND = torch.randn((len(texts), channels * height * width), generator=torch.Generator().manual_seed(seed))
    t_S = model.grid(steps)
    for t, after in pairwise(t_S):
        t_N = torch.full((len(texts),), float(t))
        x_ND = x_ND + model.velocity(x_ND, t_N, texts, guidance) * float(after - t)
    return model.images(x_ND)


def exam(
    model: FlowModel,
    domain: Domain,
    asked: int = 480,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    batch: int = 60,
) -> GlyphScore:
    """The score of a model on `asked` test prompts of one domain, one image each, in batches of `batch`. No
    choice depends on these prompts. steps, guidance: of the sampler.
    """
    task = Glyphs(domains=(domain,), held_out=asked)
    prompts, rewards = list(problems(task, "test")), []
    for start in range(0, asked, batch):
        some = prompts[start : start + batch]
        made = pictures_of(
            model,
            [prompt_text(prompt) for prompt in some],
            steps=steps,
            guidance=guidance,
            seed=seed_of("exam", domain, start),
        )
        rewards += [task.verify(prompt, image) for prompt, image in zip(some, made, strict=True)]
    return GlyphScore(
        sum(reward.value == 1 for reward in rewards),
        asked,
        sum(reward.parts["quality"] for reward in rewards) / asked,
    )


def measure(model: FlowModel, spec: FlowSpec) -> list[str]:
    """Lines of text on a model: one with the parameters and the training settings of `spec` (steps, batch,
    learning rate, seed), then one for the exam of each sampler setting and domain.
    """
    count = sum(weight.numel() for weight in model.net.parameters())
    made = (
        f"{spec.steps} steps of {spec.batch} drawings, lr {spec.lr:g}, seed {spec.seed}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    lines = [f"{count:,} parameters, stored as float16, {made}"]
    for steps, guidance in ((10, 1.0), (40, 1.0), (10, 2.0)):
        how = f"{steps} Euler steps" + (f", guidance {guidance:g}" if guidance != 1 else "")
        lines += [
            f"held-out {domain}, {how}: {exam(model, domain, spec.problems, steps=steps, guidance=guidance)}"
            for domain in DOMAINS
        ]
    return lines


def make(spec: FlowSpec, out: Path) -> list[str]:
    """Train the model of a spec, evaluate the stored model, and write its folder, which is complete or
    absent. Returns the report.
    """
    model, report = cold_start(spec), []

    def fill(scratch: Path) -> None:
        model.save(scratch, torch.float16)
        report.extend(measure(load_flow(str(scratch), "made", dtype="float32", device="cpu"), spec))
        role = f"A specialist for {spec.domains[0]}" if len(spec.domains) == 1 else "A generalist"
        origin, lines = (
            f"`reflux:{spec.start}`" if spec.start else "nothing",
            "\n".join(f"- {line}" for line in report),
        )
        (scratch / "README.md").write_text(
            CARD.format(name=spec.name, role=role, origin=origin, report=lines)
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
    return report
