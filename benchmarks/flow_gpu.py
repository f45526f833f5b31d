"""Flow-OPD at the size of Stable Diffusion 3.5 Medium with random weights on a GPU: milliseconds per
evaluated row, memory, the largest group that fits.

    python benchmarks/flow_gpu.py [--groups 1,8,16,64] [--teachers 1] [--steps 10] [--side 64] [--rank 32]
                                  [--guidance 4.5] [--batch 64] [--micro-batch 8] [--rounds 3] [--tiny]

The transformer has the published shape (24 layers of 24 heads of 64, 2.2 billion weights) and random weights.
Times and memory are meaningful; the images are not. Latents of side 64 are images of 512 pixels. Measured is
one optimiser step of the recipe, with the library's own sampler and teachers: the group of each prompt is
sampled with the SDE, its teacher (an adapter on the shared base) and the anchor (the base) are evaluated at
every trained state, and the student (LoRA) takes a step, in passes of `micro_batch` states. `--teachers`:
adapters, each with a route and one prompt of its own. Prompt encodings are random constants, because text
encoders run only once; they are not measured.

A row is one state of one image, evaluated once; with guidance it is two rows of the transformer. Sampling
evaluates each image `steps` times; teaching evaluates `steps` - 1 states of it, once by its teacher and once
by the anchor. Teaching is measured in turns with the tables asked together, where rows of all tables share a
call, and apart, where each table has its own calls. Both limits of a call are `batch` rows. Per group size:
calls and rows, the median milliseconds per row, the median ratio to sampling in the same round with its
lowest and highest value, and the peak memory. On a CPU the times are those of the process. The first size
that does not fit ends the table. `--tiny` runs a toy size on any device, to check this script.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TINY = {
    **SD35_MEDIUM,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
# 77 tokens of CLIP and 256 of T5
PROMPT_TOKENS = 333


class Constants:
    """Random encodings, the same for every prompt."""

    def __init__(self, shape: dict[str, Any], tokens: int, device: str, dtype: Any):
        import torch

        rng = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(1, tokens, shape["joint_attention_dim"], generator=rng).to(device, dtype)
        self.pooled = torch.randn(1, shape["pooled_projection_dim"], generator=rng).to(device, dtype)

    def __call__(self, texts: Any) -> tuple[Any, Any]:
        return self.tokens.expand(len(texts), -1, -1), self.pooled.expand(len(texts), -1)


def model(asked: argparse.Namespace, device: str, dtype: Any) -> Any:
    import torch

    from reflux.models.flow.diffusers_library import library
    from reflux.models.flow.flow_model import FlowModel
    from reflux.models.flow.net import FlowNet

    shape = TINY if asked.tiny else SD35_MEDIUM
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        transformer = library().SD3Transformer2DModel(**shape)
        torch.set_default_dtype(before)
    config = dict(library().FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    encode = Constants(shape, 8 if asked.tiny else PROMPT_TOKENS, device, dtype)
    return FlowModel(FlowNet(transformer.eval()), config, encode, None, "random", dtype)


@dataclass
class Parts:
    """The models of one optimiser step. The sampler and the learner have a copy of the student each."""

    sampler: Any
    # (part, open teacher) by table
    tables: dict[str, Any]
    student: Any
    prompts: list[Any]
    services: Any
    # rows of each call of the teachers' transformer
    calls: list[int]


def parts_of(asked: argparse.Namespace, device: str, dtype: Any) -> Parts:
    from reflux.config.context import Generation, StudentSpec
    from reflux.config.requirements import Requirements
    from reflux.models.flow import flow_adapters
    from reflux.models.flow.shared_base import SharedBase
    from reflux.models.settings import FlowLora
    from reflux.runtime.services import Services
    from reflux.samplers.flow import Flow as Sampler
    from reflux.samplers.flow_engine import FlowSampler
    from reflux.teachers.flow import Flow
    from reflux.teachers.flow_engine import FlowTeacher
    from reflux.types import Prompt

    lora = FlowLora(rank=asked.rank, alpha=2.0 * asked.rank)
    sampling, student, frozen = (model(asked, device, dtype) for _ in range(3))
    for one in (sampling, student, frozen):
        one.net.requires_grad_(False)
    flow_adapters.attach_fresh(student.net.transformer, lora, seed=0)
    if device == "cuda":
        student.net.transformer.enable_gradient_checkpointing()
    services: Any = Services(StudentSpec("random"))

    def context(name: str) -> Any:
        generation = Generation(guidance=asked.guidance, pixels=asked.side)
        return SimpleNamespace(name=name, seed=0, requirements=Requirements(), generation=generation)

    acting = Sampler(steps=asked.steps, guidance=asked.guidance, pixels=asked.side, batch_images=asked.batch)
    base, tables = SharedBase(frozen), {}
    for name in (*(f"teacher{i}" for i in range(asked.teachers)), "anchor"):
        adapter = None if name == "anchor" else random_adapter(frozen, lora, seed=len(tables))
        cfg = Flow(
            "random",
            adapter=adapter,
            alias=None if name == "anchor" else "main",
            routes=() if name == "anchor" else (name,),
            batch_positions=asked.batch,
        )
        voice = base.voice(adapter, f"teachers.{name}.adapter")
        tables[name] = (cfg, FlowTeacher(cfg, context(name), services, voice))
    prompts = [
        Prompt(f"prompt{i}", ({"role": "user", "content": f"a prompt {i}"},), route=f"teacher{i}")
        for i in range(asked.teachers)
    ]
    calls: list[int] = []
    frozen.net.transformer.register_forward_hook(
        lambda _, inputs, given, output: calls.append(len(given["hidden_states"])), with_kwargs=True
    )
    sampler = FlowSampler(acting, context("sampler"), services, sampling)
    return Parts(sampler, tables, student, prompts, services, calls)


def random_adapter(of: Any, lora: Any, seed: int) -> str:
    """A folder with random LoRA matrices for every module that lora names."""
    import torch

    from reflux.models.flow import flow_adapters
    from reflux.models.flow.adapter_files import write_adapter

    rng = torch.Generator().manual_seed(seed)
    shapes = flow_adapters.linear_shapes(of.net.transformer)
    # The names of a layer that already has an adapter end in "base_layer".
    shapes = {
        name.replace(".base_layer", ""): shape for name, shape in shapes.items() if ".lora_" not in name
    }
    factors = {
        name: flow_adapters.Factors(
            torch.randn(lora.rank, shapes[name][1], generator=rng) * 0.02,
            torch.randn(shapes[name][0], lora.rank, generator=rng) * 0.02,
            lora.alpha / lora.rank,
        )
        for name in flow_adapters.selected(lora.targets, shapes)
    }
    folder = tempfile.mkdtemp()
    write_adapter(flow_adapters.Adapter(factors, "random"), Path(folder))
    return folder


def sampled(parts: Parts, asked: argparse.Namespace, group: int, step: int) -> list[Any]:
    from reflux.config.step_context import SamplingParams

    draw = SamplingParams(step, "train", asked.steps, cohort=len(parts.prompts))

    async def ask() -> list[Any]:
        return await asyncio.gather(*(parts.sampler.sample(prompt, group, draw) for prompt in parts.prompts))

    return asyncio.run(ask())


def taught(parts: Parts, groups: list[Any], apart: bool) -> list[Any]:
    """Copies of the attempts with the velocities of all tables."""
    from reflux.config.requirements import Requirements
    from reflux.config.step_context import StepContext
    from reflux.teachers.collection import Teachers
    from reflux.types import Attempt

    parts.calls.clear()
    fresh = [[Attempt(attempt.rollout) for attempt in group] for group in groups]
    several = [{name: pair} for name, pair in parts.tables.items()] if apart else [parts.tables]
    for tables in several:
        asyncio.run(Teachers(tables, Requirements(), parts.services).score(fresh, StepContext(0, 0)))
    return fresh


def learn(parts: Parts, asked: argparse.Namespace, groups: list[Any], device: str) -> None:
    """The direct loss with its gradient, with passes of `micro_batch` states."""
    import numpy as np
    import torch

    from reflux.models.flow.sde import kl_weight

    attempts = [attempt for group in groups for attempt in group]
    rows = [np.flatnonzero(attempt.rollout.mask_T) for attempt in attempts]
    pairs = list(zip(attempts, rows, strict=True))
    x_ND = torch.from_numpy(np.concatenate([a.rollout.x_SD[of] for a, of in pairs]))
    t_N = torch.from_numpy(np.concatenate([a.rollout.t_S[of] for a, of in pairs]))
    dt_N = torch.from_numpy(np.concatenate([np.diff(a.rollout.t_S)[of] for a, of in pairs]))
    targets = [
        torch.from_numpy(np.concatenate([a.target(name).v_TD[of] for a, of in pairs]))
        for name in ("main", "anchor")
    ]
    for start in range(0, len(x_ND), asked.micro_batch):
        part = slice(start, start + asked.micro_batch)
        t, dt = t_N[part].to(device), dt_N[part].to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            v = parts.student.velocity(x_ND[part].to(device), t, ["a prompt"] * len(t), asked.guidance)
        gaps = [(v - target[part].to(device)).square().sum(-1) for target in targets]
        (kl_weight(t, dt, 0.7) * (gaps[0] + 0.04 * gaps[1])).sum().div(len(x_ND)).backward()


def measure(parts: Parts, asked: argparse.Namespace, group: int, device: str) -> str:
    """One line of the table. The first round is not counted."""
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        since = clock()
        made = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return made, clock() - since

    images = group * len(parts.prompts)
    sampling, teaching = images * asked.steps, 2 * images * (asked.steps - 1)
    found: dict[str, list[float]] = {}
    calls = {}
    for step in range(asked.rounds + 1):
        groups, seconds = timed(lambda step=step: sampled(parts, asked, group, step))
        per_row = {"sample": seconds / sampling}
        # in turns, each first in every second round
        for way in ("together", "apart") if step % 2 else ("apart", "together"):
            apart = way == "apart"
            told, seconds = timed(lambda groups=groups, apart=apart: taught(parts, groups, apart))
            per_row[way], calls[way] = seconds / teaching, len(parts.calls)
            groups = groups if apart else told
        _, seconds = timed(lambda groups=groups: learn(parts, asked, groups, device))
        if not step:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            continue
        found.setdefault("learn", []).append(seconds)
        for name, value in per_row.items():
            found.setdefault(name, []).append(1000 * value)
    lines = [f"group {group:4}: sample {statistics.median(found['sample']):.2f} ms a row, {sampling} rows"]
    for way in ("together", "apart"):
        ratios = [one / other for one, other in zip(found[way], found["sample"], strict=True)]
        lines.append(
            f"teach {way} {statistics.median(found[way]):.2f} ms a row, {teaching} rows in {calls[way]} calls"
            f", {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of sampling"
        )
    gain = [one / other for one, other in zip(found["together"], found["apart"], strict=True)]
    lines.append(
        f"together / apart {statistics.median(gain):.2f} [{min(gain):.2f}, {max(gain):.2f}], "
        f"learn {statistics.median(found['learn']):.2f} s"
    )
    if device == "cuda":
        lines.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return "\n            ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="1,8,16,64")
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("there is no GPU here; --tiny checks this script on a CPU")
    asked.side = 8 if asked.tiny else asked.side
    parts = parts_of(asked, device, torch.bfloat16 if device == "cuda" else torch.float32)
    weights = sum(p.numel() for p in parts.sampler.model.net.parameters())
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{weights:,} weights on {where}, {asked.steps} steps, latents of side {asked.side}")
    for group in map(int, asked.groups.split(",")):
        try:
            print(measure(parts, asked, group, device), flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"group {group:4}: does not fit")
            break


if __name__ == "__main__":
    main()
