"""Flow-OPD at the size of Stable Diffusion 3.5 Medium with random weights on a GPU: memory, seconds, the
largest group that fits.

    python benchmarks/flow_gpu.py [--groups 1,4,16,64] [--steps 10] [--side 64] [--rank 32] [--guidance 4.5]
                                  [--tiny]

The transformer has the published shape (24 layers of 24 heads of 64, 2.2 billion weights) and random weights.
Times and memory are meaningful; the images are not. Latents of side 64 are images of 512 pixels. Measured is
one optimiser step of the recipe: the group of a prompt is sampled with the SDE, a teacher (an adapter on the
shared base) and the anchor (the base) are evaluated at every trained state, and the student (LoRA) takes a
step. Prompt encodings are random constants, because text encoders run only once; they are not measured. Per
group size: the seconds of each part and the peak memory. The first size that does not fit ends the table.
`--tiny` runs a toy size on any device, to check this script.
"""

from __future__ import annotations

import argparse
import time
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


def one_step(
    asked: argparse.Namespace, student: Any, frozen: Any, group: int, device: str
) -> dict[str, float]:
    """The seconds of sampling, of both teachers and of training, with passes of `micro_batch` states."""
    import torch

    from reflux.models.flow import adapters
    from reflux.models.flow.sde import kl_weight, sde_step

    cuda = device == "cuda"
    seconds: dict[str, float] = {}

    def timed(name: str, since: float) -> float:
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name] = now - since
        return now

    def velocity(of: Any, x: Any, t: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=cuda):
            return of.velocity(x, t, ["a prompt"] * len(x), asked.guidance)

    t_S = torch.tensor(student.grid(asked.steps), dtype=torch.float32, device=device)
    states = [torch.randn(group, student.channels * asked.side**2, device=device)]
    clock = timed("start", time.perf_counter())
    with torch.inference_mode():
        for i in range(asked.steps):
            v = torch.cat(
                [velocity(student, x, t_S[i].expand(len(x))) for x in states[-1].split(asked.micro_batch)]
            )
            states.append(
                sde_step(states[-1], v, float(t_S[i]), float(t_S[i + 1] - t_S[i]), 0.7, torch.randn_like(v))[
                    0
                ]
            )
        clock = timed("sample", clock)
        rows = torch.cat(states[: asked.steps - 1]).cpu()
        times = t_S[: asked.steps - 1].repeat_interleave(group)
        velocities = []
        for name in ("teacher", None):
            adapters.use(frozen.net.transformer, name)
            pairs = zip(rows.split(asked.micro_batch), times.split(asked.micro_batch), strict=True)
            velocities.append(torch.cat([velocity(frozen, x.to(device), t).cpu() for x, t in pairs]))
        clock = timed("teach", clock)
    dt = (t_S[1:] - t_S[:-1])[: asked.steps - 1].repeat_interleave(group)
    for start in range(0, len(rows), asked.micro_batch):
        part = slice(start, start + asked.micro_batch)
        v = velocity(student, rows[part].to(device), times[part])
        w = kl_weight(times[part], dt[part], 0.7)
        gaps = [(v - target[part].to(device)).square().sum(-1) for target in velocities]
        (w * (gaps[0] + 0.04 * gaps[1])).sum().div(len(rows)).backward()
    timed("learn", clock)
    return {name: value for name, value in seconds.items() if name != "start"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="1,4,16,64")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    import torch

    from reflux.models.flow import adapters
    from reflux.models.settings import FlowLora

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("there is no GPU here; --tiny checks this script on a CPU")
    asked.side = 8 if asked.tiny else asked.side
    lora = FlowLora(rank=asked.rank, alpha=2.0 * asked.rank)
    student, frozen = (
        model(asked, device, torch.bfloat16 if device == "cuda" else torch.float32) for _ in range(2)
    )
    student.net.requires_grad_(False)
    frozen.net.requires_grad_(False)
    adapters.attach_fresh(student.net.transformer, lora, seed=0)
    adapters.attach(frozen.net.transformer, random_adapter(frozen, lora), "teacher")
    if device == "cuda":
        student.net.transformer.enable_gradient_checkpointing()
    print(
        f"{sum(p.numel() for p in frozen.net.parameters()):,} weights on {device}, {asked.steps} steps, "
        f"latents of side {asked.side}"
    )
    for group in map(int, asked.groups.split(",")):
        try:
            # a warm-up step, not measured
            one_step(asked, student, frozen, group, device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = one_step(asked, student, frozen, group, device)
        except torch.cuda.OutOfMemoryError:
            print(f"group {group:4}: does not fit")
            break
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        parts = "  ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(f"group {group:4}: {parts}  peak {peak:.1f} GiB")


def random_adapter(of: Any, lora: Any) -> Any:
    """Random adapter factors for every module that lora names."""
    import torch

    from reflux.models.flow import adapters

    rng = torch.Generator().manual_seed(1)
    shapes = adapters.linear_shapes(of.net.transformer)
    factors = {
        name: adapters.Factors(
            torch.randn(lora.rank, shapes[name][1], generator=rng) * 0.02,
            torch.randn(shapes[name][0], lora.rank, generator=rng) * 0.02,
            lora.alpha / lora.rank,
        )
        for name in adapters.selected(lora.targets, shapes)
    }
    return adapters.Adapter(factors, "random")


if __name__ == "__main__":
    main()
