"""Time and memory of one distillation loss with its gradients on a GPU: this library, other libraries, and
the matrix products alone, in turns.

    python benchmarks/loss_gpu.py [--rows 1024,8192,32768] [--vocabularies 32000,151936] [--student 2048]
                                  [--teacher 4096] [--beta 0.5] [--rounds 5] [--repeats 7]
                                  [--sides reflux,...] [--peer-python PATH] [--tiny]

Measured is the way from hidden states and heads in bfloat16 to the loss and the gradients of the student's
hidden states and head. The loss of the first sides is the generalised JSD, the only loss that all libraries
have (beta 1 is the reverse KL, 0 the forward KL). Sides:

    matmul         only the four matrix products: both heads forward, both gradients of the student's head;
                   without a loss, so this is the lower bound
    reflux         `linear_divergence`
    reflux:NAME    the same with another objective: reverse, forward, tv, sampled, vopd, minimum_variance,
                   topk_kl (the baseline over 20 tokens), top20 (the divergence at the student's 20 tokens)
    liger_triton   Liger-Kernel 0.8.5, LigerFusedLinearJSD (Triton)
    liger_chunked  Liger-Kernel 0.8.5, LigerFusedLinearJSDLoss (chunks of 1,024 rows under torch.compile),
                   only the soft loss
    trl            TRL 1.16, ChunkedDivergenceFunction (tiles of rows and vocabulary)

Every measurement runs in a separate process: three warm-up calls, then the median of `repeats`. One round is
one process of each side, in alternating order. A ratio is taken within a round and printed as median (lowest
to highest). "floor" is the share of the time of `matmul` in the time of a side. Memory is the highest
allocation during a call above that of its inputs, gradients included. "launches" are the kernels of one call
on the GPU. `error` is the relative error of the gradient of the student's hidden states over the first 64
rows, against plain torch on the same bfloat16 inputs: in float32 for the JSD, and for the other objectives
this library's own form by matrices of logits in float64, which no fused kernel computes.

The other libraries may be in another environment: pass its interpreter. `--tiny` runs on a CPU at toy size,
to check this script; its timings have no meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OTHERS = ("reverse", "forward", "tv", "sampled", "vopd", "minimum_variance", "topk_kl", "top20")
SIDES = (
    *("matmul", "reflux", "liger_triton", "liger_chunked", "trl"),
    *(f"reflux:{name}" for name in OTHERS),
)
PEERS = ("liger_triton", "liger_chunked", "trl")
WARM, CHECK_ROWS, FLOOR_ROWS = 3, 64, 8192
# (student_NH, weight_VH, teacher_NG, weight_VG) -> mean loss over the rows
Loss = Callable[..., Any]


def side_reflux(beta: float, tiny: bool) -> Loss:
    from reflux.objectives.divergence import Divergence

    return by_reflux(Divergence(divergence="jsd", beta=beta))


def other_reflux(name: str) -> Loss:
    from reflux.objectives.divergence import Divergence
    from reflux.objectives.sampled_kl import SampledKL

    return by_reflux(
        {
            "reverse": Divergence(),
            "forward": Divergence(divergence="forward"),
            "tv": Divergence(divergence="tv"),
            "sampled": SampledKL(),
            "vopd": SampledKL(baseline="kl"),
            "minimum_variance": SampledKL(baseline="minimum_variance"),
            "topk_kl": SampledKL(baseline="topk_kl"),
            "top20": Divergence(support="student", k=20),
        }[name]
    )


def by_reflux(objective: Any) -> Loss:
    import torch

    from reflux.kernels.head import Head
    from reflux.loss.linear_divergence import linear_divergence

    def loss(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any) -> Any:
        ids_N = torch.arange(len(h_NH), device=h_NH.device) % len(weight_VH)
        coef_N = torch.full((len(h_NH),), 1 / len(h_NH), device=h_NH.device)
        return linear_divergence(
            h_NH, Head.of(weight_VH), t_NG, Head.of(weight_VG), ids_N, coef_N, objective
        ).loss

    return loss


def side_liger_triton(beta: float, tiny: bool) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda h_NH, weight_VH, t_NG, weight_VG: module(h_NH, weight_VH, t_NG, weight_VG, None)


def side_liger_chunked(beta: float, tiny: bool) -> Loss:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=not tiny)

    def loss(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any) -> Any:
        return module(
            h_NH, weight_VH, t_NG, weight_VG, torch.zeros(len(h_NH), dtype=torch.long, device=h_NH.device)
        )

    return loss


def side_trl(beta: float, tiny: bool) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any) -> Any:
        divergence_N, _ = ChunkedDivergenceFunction.apply(h_NH, weight_VH, None, t_NG, weight_VG, None, beta)
        return divergence_N.mean()

    return loss


def side_plain(beta: float) -> Loss:
    """The loss in plain torch, in float32: the reference of `error`."""

    def loss(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any) -> Any:
        from math import log

        import torch

        student = (h_NH.float() @ weight_VH.float().T).log_softmax(-1)
        teacher = (t_NG.float() @ weight_VG.float().T).log_softmax(-1)
        if beta in (0.0, 1.0):
            first, second = (student, teacher) if beta else (teacher, student)
            return (first.exp() * (first - second)).sum(-1).mean()
        mixed = torch.logaddexp(student + log(1 - beta), teacher + log(beta))
        terms = beta * teacher.exp() * (teacher - mixed) + (1 - beta) * student.exp() * (student - mixed)
        return terms.sum(-1).mean()

    return loss


def floor(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any) -> Callable[[], None]:
    """The four products, in chunks of rows if there are more than FLOOR_ROWS rows of logits."""
    import torch

    rows, (vocabulary, _) = min(len(h_NH), FLOOR_ROWS), weight_VH.shape
    table_CV, grad_CH = h_NH.new_empty(rows, vocabulary), torch.empty_like(h_NH[:rows])
    grad_VH = torch.zeros_like(weight_VH)

    def products() -> None:
        for h_CH, t_CG in zip(h_NH.split(rows), t_NG.split(rows), strict=True):
            out_CV = table_CV[: len(h_CH)]
            torch.mm(t_CG, weight_VG.T, out=out_CV)
            torch.mm(h_CH, weight_VH.T, out=out_CV)
            torch.mm(out_CV, weight_VH, out=grad_CH[: len(h_CH)])
            torch.addmm(grad_VH, out_CV.T, h_CH, out=grad_VH)

    return products


def measure(side: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    device = torch.device("cpu" if args.tiny else "cuda")
    make = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(*shape, generator=make, device=device) * scale).to(
            torch.float32 if args.tiny else torch.bfloat16
        )

    inputs = [draw(args.rows, args.student), draw(args.vocabulary, args.student, scale=2 / args.student**0.5)]
    inputs += [
        draw(args.rows, args.teacher),
        draw(args.vocabulary, args.teacher, scale=2 / args.teacher**0.5),
    ]
    if side == "matmul":
        with torch.no_grad():
            return clock(floor(*inputs), args, device)
    leaves = [leaf.requires_grad_() for leaf in inputs[:2]]
    _, _, other = side.partition(":")
    makers = {
        "reflux": side_reflux,
        "liger_triton": side_liger_triton,
        "liger_chunked": side_liger_chunked,
        "trl": side_trl,
    }
    loss = other_reflux(other) if other else makers[side](args.beta, args.tiny)

    def step() -> Any:
        for leaf in leaves:
            leaf.grad = None
        made = loss(*inputs)
        made.backward()
        return made

    found = {**clock(step, args, device), "launches": launches(step, device), "loss": float(step())}
    for leaf in leaves:
        leaf.grad = None
    return found | {"error": error(loss, inputs, args.beta, in_float64=bool(other))}


def launches(step: Callable[[], Any], device: Any) -> int:
    """The kernels, copies and fills of one call on the GPU; 0 on a CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in profiler.events() or ())


def clock(step: Callable[[], Any], args: argparse.Namespace, device: Any) -> dict[str, float]:
    """The median seconds of a call, and its peak allocation in bytes above the allocation before the first
    call.
    """
    import torch

    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(WARM):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "bytes": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
    }


def error(loss: Loss, inputs: list[Any], beta: float, in_float64: bool) -> float:
    """The relative error of the gradient of the hidden states of the first rows, against the same loss in
    float64 or against the plain JSD.
    """
    import torch

    few = [inputs[0][:CHECK_ROWS], inputs[1], inputs[2][:CHECK_ROWS], inputs[3]]

    def gradient(of: Loss, dtype: torch.dtype) -> Any:
        h_NH, *others = (tensor.detach().to(dtype) for tensor in few)
        h_NH.requires_grad_()
        return torch.autograd.grad(of(h_NH, *others), h_NH)[0].float()

    exact = gradient(loss, torch.float64) if in_float64 else gradient(side_plain(beta), inputs[0].dtype)
    return float((gradient(loss, inputs[0].dtype) - exact).norm() / exact.norm())


def child(side: str, rows: int, vocabulary: int, args: argparse.Namespace) -> dict[str, float]:
    """The measurement of one process. {} and a printed line if it cannot run."""
    source = str(Path(__file__).parents[1] / "src")
    python = args.peer_python if side in PEERS else sys.executable
    command = [
        python,
        __file__,
        "--measure",
        side,
        f"--rows={rows}",
        f"--vocabularies={vocabulary}",
        f"--repeats={args.repeats}",
    ]
    command += [f"--student={args.student}", f"--teacher={args.teacher}", f"--beta={args.beta}"] + [
        "--tiny"
    ] * args.tiny
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        return json.loads(lines[-1].removeprefix("RESULT "))
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    print(f"  {side}: did not finish ({'killed' if done.returncode < 0 else last[:160]})", flush=True)
    return {}


def compare(rows: int, vocabulary: int, args: argparse.Namespace) -> None:
    sides = args.sides.split(",")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(args.rounds):
        for side in sides[:: -1 if turn % 2 else 1]:
            found[side].append(child(side, rows, vocabulary, args))
    print(
        f"\nN = {rows:,}, V = {vocabulary:,}, H = {args.student} / {args.teacher}, beta = {args.beta}, "
        f"{args.rounds} rounds"
    )
    names = f"{'floor':>6} {'peak GB':>8} {'launches':>8} {'error':>8} {'loss':>9}"
    print(f"{'side':<24} {'milliseconds':>28} {names}")
    seconds = {side: [run["seconds"] for run in runs if run] for side, runs in found.items()}
    floor_seconds = statistics.median(seconds["matmul"]) if seconds.get("matmul") else float("nan")
    for side, runs in found.items():
        if seconds[side]:
            middle, last = statistics.median(seconds[side]), [run for run in runs if run][-1]
            spread = f"{middle * 1e3:.2f} ({min(seconds[side]) * 1e3:.2f} to {max(seconds[side]) * 1e3:.2f})"
            peak = max(run["bytes"] for run in runs if run) / 1e9
            words = (
                f"{last['launches']:>8} {last['error']:>8.1e} {last['loss']:>9.5f}" if "loss" in last else ""
            )
            print(f"{side:<24} {spread:>28} {floor_seconds / middle:>6.0%} {peak:>8.2f} {words}")
    ratios(found)


def ratios(found: dict[str, list[dict[str, float]]]) -> None:
    """Print the other side's numbers divided by those of `reflux`, by round. Above 1 the JSD is faster."""
    for peer in (*PEERS, *(f"reflux:{name}" for name in OTHERS)):
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(found.get("reflux", []), found.get(peer, []), strict=False)
            if ours and theirs
        ]
        if pairs:
            times = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
            ours_bytes, their_bytes = (
                max(ours["bytes"] for ours, _ in pairs),
                max(theirs["bytes"] for _, theirs in pairs),
            )
            memory = f", memory {their_bytes / ours_bytes:.2f}" if ours_bytes else ""
            print(
                f"{peer} / reflux: time {statistics.median(times):.2f} ({min(times):.2f} to "
                f"{max(times):.2f}){memory}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1024,8192,32768", help="positions N, separated by commas")
    parser.add_argument("--vocabularies", default="32000,151936", help="tokens V, separated by commas")
    parser.add_argument("--student", type=int, default=2048, help="hidden size")
    parser.add_argument("--teacher", type=int, default=4096, help="hidden size")
    parser.add_argument(
        "--beta", type=float, default=0.5, help="beta of the JSD: 1 is the reverse KL, 0 the forward KL"
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of a process")
    parser.add_argument("--sides", default=",".join(SIDES), help="some of the sides, separated by commas")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="the interpreter of an environment with liger-kernel and trl",
    )
    parser.add_argument("--tiny", action="store_true", help="run on a CPU at toy size, to check this script")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [name for name in args.sides.split(",") if name not in SIDES]
    if unknown:
        parser.error(f"--sides: there is no side {', '.join(map(repr, unknown))}. Sides: {', '.join(SIDES)}.")
    if args.tiny and not args.measure:
        args.rows, args.vocabularies, args.student, args.teacher = "5,40", "300", 16, 32
    sizes = [
        (int(rows), int(vocabulary))
        for vocabulary in args.vocabularies.split(",")
        for rows in args.rows.split(",")
    ]
    if args.measure:
        ((args.rows, args.vocabulary),) = sizes
        print("RESULT " + json.dumps(measure(args.measure, args)))
        return
    describe(args)
    for rows, vocabulary in sizes:
        compare(rows, vocabulary, args)


def describe(args: argparse.Namespace) -> None:
    import torch

    if args.tiny:
        print("toy size on the CPU, float32: this run checks the script and measures nothing")
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device here, so nothing was measured. Run this on a machine with a GPU, or "
            "check it with --tiny."
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, bfloat16")


if __name__ == "__main__":
    main()
