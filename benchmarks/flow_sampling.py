"""Seconds per image-step of this library's flow sampler, which records states, times and log-densities,
compared with plain diffusers sampling.

    python benchmarks/flow_sampling.py [--model reflux:glyph_base] [--images 64] [--steps 10] [--rounds 12]
                                       [--threads 2] [--guidance 1]

Both run in one process, in turns, with the same weights and prompts. The plain side is a transformer as
diffusers loads it with FlowMatchEulerDiscreteScheduler.step in a loop, without records. Our side runs the SDE
with all records of a training step, and the ODE as in an evaluation. Printed: the median of each side, and
the median ratio to the plain loop of the same round, with its lowest and highest value.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def plain(model: Any, transformer: Any, texts: list[str], steps: int, guidance: float) -> None:
    """The loop of a diffusers pipeline from prompts to images."""
    import torch

    from reflux.models.flow.diffusers_library import library

    with torch.inference_mode():
        scheduler = library().FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler))
        scheduler.set_timesteps(steps)
        halves = 1 if guidance == 1 else 2
        tokens, pooled = model.encode([*texts, *[""] * len(texts) * (halves - 1)])
        x = torch.randn(len(texts), *model.shape())
        for t in scheduler.timesteps:
            v = transformer(
                hidden_states=torch.cat([x] * halves),
                timestep=t.expand(len(texts) * halves),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            if halves == 2:
                cond, uncond = v.chunk(2)
                v = uncond + guidance * (cond - uncond)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        model.images(x.flatten(1))


def contestants(asked: argparse.Namespace, run: Any, sampler: Any) -> dict[str, Callable[[], object]]:
    from dataclasses import replace
    from itertools import islice

    import torch

    from reflux.models.flow.diffusers_library import library
    from reflux.models.locations import locate

    prompts = list(islice(run.task.prompts("train", 0), asked.images))
    texts = [prompt.messages[-1]["content"] for prompt in prompts]
    drawn = replace(run.cfg.draw(0), cohort=asked.images)
    greedy = replace(drawn, purpose="eval", temperature=0.0)

    def ours(draw: Any) -> object:
        async def ask() -> object:
            return await asyncio.gather(*(sampler.sample(prompt, 1, draw) for prompt in prompts))

        return asyncio.get_event_loop().run_until_complete(ask())

    transformer = library().SD3Transformer2DModel.from_pretrained(
        locate(asked.model), subfolder="transformer", torch_dtype=torch.float32
    )
    return {
        "plain diffusers": lambda: plain(sampler.model, transformer, texts, asked.steps, asked.guidance),
        "ours, SDE recorded": lambda: ours(drawn),
        "ours, ODE": lambda: ours(greedy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reflux:glyph_base")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=1.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(asked, Path(scratch))


def measure(asked: argparse.Namespace, scratch: Path) -> None:
    import torch

    from reflux import checks
    from reflux.config.recipe import load_recipe
    from reflux.samplers.flow_engine import FlowSampler
    from reflux.training import Options, Run

    torch.set_num_threads(asked.threads)
    sampling = {
        "steps": asked.steps,
        "eval_steps": asked.steps,
        "guidance": asked.guidance,
        "batch_images": asked.images,
    }
    changes = {f"sampler.{name}": value for name, value in sampling.items()} | {
        "learner.model": asked.model,
        "evals": "none",
    }
    cfg = load_recipe("flow", changes)
    run = Run.open(cfg, checks.join(cfg), Options(scratch / "run"))
    asyncio.set_event_loop(asyncio.new_event_loop())

    async def opened() -> Any:
        async with FlowSampler.opened(cfg.sampler, run) as sampler:
            return sampler

    named = contestants(asked, run, asyncio.get_event_loop().run_until_complete(opened()))
    for work in named.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(asked.rounds):
        for name, work in named.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    run.close()
    print(
        f"{asked.images} images of {asked.steps} steps, {asked.rounds} rounds, {asked.threads} threads, "
        f"guidance {asked.guidance:g}"
    )
    for name, spent in seconds.items():
        ratios = sorted(one / other for one, other in zip(spent, seconds["plain diffusers"], strict=True))
        micros = statistics.median(spent) / asked.images / asked.steps * 1e6
        print(
            f"{name:20} {micros:8.1f} us per image-step   ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
