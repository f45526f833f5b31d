"""Memory and time of one loss with its gradients, from hidden states: this library against plain torch, each
case in a separate process.

    python benchmarks/loss_memory.py [--rows 4096] [--vocabulary 151936] [--student 1024] [--teacher 2048]
                                     [--rounds 3] [--threads 2] [--cases full,plain_full,...]

It runs in float32 on the CPU. The sides of one round run one after the other, in an order that alternates
from round to round. "GB above" is the highest resident memory during the call, minus the memory that was
resident before it (inputs) and minus the gradients that it returns (of the student's hidden states and head).
Ratios are by round: median, lowest, highest. `plain_*` is plain torch: logits, log-softmax, the sum,
backward. `plain_fast_full` is the same with the products of the head by oneDNN, so that the comparison shows
the method and not the matrix library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = (
    "full",
    "plain_full",
    "plain_fast_full",
    "jsd",
    "topk",
    "sampled",
    "vopd",
    "vopd_topk",
    "plain_sampled",
)
USUAL = "full,plain_full,plain_fast_full,sampled,plain_sampled,vopd,vopd_topk"
HELP = {
    "rows": "positions N",
    "vocabulary": "tokens V",
    "student": "hidden size",
    "teacher": "hidden size",
    "rounds": "processes of each case",
    "threads": "of each process",
}
PAIRS = (
    ("full", "plain_full"),
    ("full", "plain_fast_full"),
    ("sampled", "plain_sampled"),
    ("vopd", "sampled"),
    ("vopd_topk", "sampled"),
)


def resident_bytes(key: str) -> int:
    """VmRSS (resident memory) or VmHWM (its highest value since the last reset), in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(
    case: str, rows: int, vocabulary: int, student: int, teacher: int, threads: int
) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    h_NH = torch.randn(rows, student).requires_grad_()
    weight_VH = torch.randn(vocabulary, student).mul_(2 / student**0.5).requires_grad_()
    t_NG, weight_VG = torch.randn(rows, teacher), torch.randn(vocabulary, teacher).mul_(2 / teacher**0.5)
    ids_N, coef_N = torch.randint(0, vocabulary, (rows,)), torch.full((rows,), 1 / rows)
    run = side(case)
    # a small first call, so that libraries load their kernels
    run(h_NH[:8], weight_VH, t_NG[:8], weight_VG, ids_N[:8], coef_N[:8]).backward()
    h_NH.grad = weight_VH.grad = None
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    loss = run(h_NH, weight_VH, t_NG, weight_VG, ids_N, coef_N)
    loss.backward()
    seconds = time.perf_counter() - started
    gradients = sum(t.grad.numel() * 4 for t in (h_NH, weight_VH) if t.grad is not None)
    return {
        "seconds": seconds,
        "bytes": resident_bytes("VmHWM") - before - gradients,
        "loss": float(loss.detach()),
    }


def side(case: str) -> Callable[..., Any]:
    """(student_NH, weight_VH, teacher_NG, weight_VG, ids_N, coef_N) -> loss."""
    if case.startswith("plain"):
        return plain(case)
    from reflux.kernels.head import Head
    from reflux.loss.linear_divergence import linear_divergence
    from reflux.objectives.divergence import Divergence
    from reflux.objectives.sampled_kl import SampledKL

    objective = {
        "full": Divergence(),
        "jsd": Divergence(divergence="jsd"),
        "topk": Divergence(support="student"),
        "sampled": SampledKL(),
        "vopd": SampledKL(baseline="kl"),
        "vopd_topk": SampledKL(baseline="topk_kl"),
    }[case]
    return lambda h, w, t, wt, ids, coef: (
        linear_divergence(h, Head.of(w), t, Head.of(wt), ids, coef, objective).loss
    )


def plain(case: str) -> Callable[..., Any]:
    import torch
    from torch.nn import functional as F

    from reflux.models.cpu.linear import linear

    product = linear if "fast" in case else F.linear

    def loss(h_NH: Any, weight_VH: Any, t_NG: Any, weight_VG: Any, ids_N: Any, coef_N: Any) -> Any:
        student_NV = product(h_NH, weight_VH, None).log_softmax(-1)
        with torch.no_grad():
            teacher_NV = product(t_NG, weight_VG, None).log_softmax(-1)
        if case.endswith("full"):
            return (coef_N * (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)).sum()
        logp_N, teacher_N = (x.gather(-1, ids_N[:, None])[:, 0] for x in (student_NV, teacher_NV))
        return -(coef_N * (teacher_N - logp_N).detach() * logp_N).sum()

    return loss


def child(case: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", case]
    command += [
        f"--{key}={getattr(args, key)}" for key in ("rows", "vocabulary", "student", "teacher", "threads")
    ]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        reason = (
            "killed, most likely out of memory"
            if done.returncode < 0
            else done.stderr.strip().split("\n")[-1]
        )
        print(f"  {case}: did not finish ({reason})")
        return {}
    return json.loads(done.stdout.strip().split("\n")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, default in (
        ("rows", 4096),
        ("vocabulary", 151_936),
        ("student", 1024),
        ("teacher", 2048),
        ("rounds", 3),
        ("threads", 2),
    ):
        parser.add_argument(
            f"--{key}", type=int, default=default, help=f"{HELP[key]}; {default} where not given"
        )
    parser.add_argument(
        "--cases",
        default=USUAL,
        help=f"some of {', '.join(CASES)}, with commas between; {USUAL} where not given",
    )
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(
            json.dumps(
                measure(args.measure, args.rows, args.vocabulary, args.student, args.teacher, args.threads)
            )
        )
        return
    cases = args.cases.split(",")
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        parser.error(f"--cases: there is no case {', '.join(map(repr, unknown))}. Cases: {', '.join(CASES)}.")
    found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(args.rounds):
        for case in cases[:: -1 if turn % 2 else 1]:
            found[case].append(child(case, args))
            print(f"  round {turn} {case}: {found[case][-1]}", flush=True)
    report(found, args)


def report(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    flops = 2 * args.rows * args.vocabulary * (3 * args.student + args.teacher)
    shape = f"N = {args.rows}, V = {args.vocabulary}, H = {args.student} / {args.teacher}"
    print(f"\n{shape}, float32, {args.threads} threads, rounds {args.rounds}")
    print(f"{'case':<16} {'seconds (min to max)':>26} {'GB above':>9} {'GFLOP/s':>8}")
    for case, runs in found.items():
        seconds = [run["seconds"] for run in runs if run]
        if seconds:
            middle = statistics.median(seconds)
            spread = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            print(
                f"{case:<16} {spread:>26} {max(run['bytes'] for run in runs if run) / 1e9:>9.2f} "
                f"{flops / middle / 1e9:>8.0f}"
            )
    for case, peer in PAIRS:
        pairs = zip(found.get(case, []), found.get(peer, []), strict=False)
        ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs if ours and theirs]
        if ratios:
            print(
                f"{case} / {peer}: {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to "
                f"{max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
