"""A model of the seconds of a step on a cluster, from the throughput of its parts and the bytes between them.

    python benchmarks/cluster_model.py                        # 1.7B <- 8B and 8B <- 70B, 8 to 1,024 GPUs
    python benchmarks/cluster_model.py --pair 1.7B-8B --gpus 8 16 --gives top64
    python benchmarks/cluster_model.py --rates 9000 30000 35000 --copies 1.5
    python benchmarks/cluster_model.py --measure              # copies and calls on this machine; needs ray

For each number of GPUs every split among samplers, teachers and ranks of the learner is tried, and the
fastest is shown. Nothing here was measured on GPUs. The rates are computed from the shapes of the models and
the data sheet of an H100, with the shares of the peak that are named below. Give measured ones by --rates:
tokens per second of one sampler actor, of one teacher actor, and of one rank.

What the model says of the library's ways: the process of the loop puts the weights into the object store, and
each machine with samplers gets them from there. Targets come to the process of the loop, are unpacked, and
are packed again for the ranks. At max_staleness = 0 the stages follow each other. Above it, sampling and
scoring of later steps go on while the student learns; the process of the loop copies for both.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

GIGA = 1e9
GPUS_OF_A_MACHINE = 8
# An H100: bfloat16 operations a second, bytes of memory a second, bytes of memory.
PEAK, BANDWIDTH, MEMORY = 989e12, 3.35e12, 80 * GIGA
# Assumed shares of the peak: training, reading texts, and of the bandwidth while decoding.
TRAINING, READING, DECODING = 0.35, 0.45, 0.6
# Texts that one sampler decodes at the same time, and their mean length so far.
DECODED, CONTEXT = 128, 1024
# Training loses this share of its rate each time the number of ranks doubles.
LOST_BY_DOUBLING = 0.03
COLUMNS = (
    *("GPUs", "max_staleness", "samplers + teachers + ranks", "sample", "score", "learn", "sync", "targets"),
    *("calls", "step s", "slowest"),
)


@dataclass(frozen=True)
class Model:
    """parameters; layers, keys: numbers of one token's keys; width: of a hidden state; vocabulary."""

    parameters: float
    layers: int
    keys: int
    width: int
    vocabulary: int = 151_936

    @property
    def cache_bytes(self) -> float:
        return 4 * self.layers * self.keys


MODELS = {
    "1.7B": Model(1.7e9, 28, 1024, 2048),
    "8B": Model(8.2e9, 36, 1024, 4096),
    "70B": Model(70.6e9, 80, 1024, 8192, 128_256),
}
PAIRS = {"1.7B-8B": ("1.7B", "8B"), "8B-70B": ("8B", "70B")}


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one actor or rank."""

    sampler: float
    teacher: float
    rank: float


@dataclass(frozen=True)
class Links:
    """Bytes a second: of a machine's network card, and of packing or unpacking in one process. Seconds of a
    call.
    """

    card: float = 50 * GIGA
    copies: float = 1.5 * GIGA
    call_s: float = 1.5e-3


@dataclass(frozen=True)
class Step:
    """A step of `tokens` sampled tokens. prompt_tokens: of all prompts, which every model reads too."""

    tokens: float
    prompt_tokens: float


@dataclass(frozen=True)
class Split:
    """GPUs of each role, and of one teacher actor."""

    samplers: int
    teachers: int
    ranks: int
    of_a_teacher: int


@dataclass(frozen=True)
class Seconds:
    """sync_s: the weights to every machine with samplers, each from the process of the loop in turn.
    targets_s: to the process of the loop and on to the ranks. calls_s: of all messages.
    """

    sample_s: float
    score_s: float
    learn_s: float
    sync_s: float
    targets_s: float
    calls_s: float

    @property
    def one_after_another(self) -> float:
        return self.sample_s + self.score_s + self.learn_s + self.sync_s + self.targets_s + self.calls_s

    @property
    def overlapped(self) -> float:
        """With staleness: the slowest of the three groups of GPUs, and the process of the loop."""
        driver = self.sync_s + self.targets_s + self.calls_s
        return max(self.sample_s + self.sync_s, self.score_s, self.learn_s + self.targets_s, driver)

    @property
    def slowest(self) -> str:
        named = {name.removesuffix("_s"): value for name, value in vars(self).items()}
        return max(named, key=lambda name: named[name])


def row_bytes(teacher: Model, gives: str, item: int) -> float:
    """Bytes of a target at one position. item: bytes of one number of a hidden state."""
    return {"hidden": item * teacher.width, "top64": 64 * 8 + 8, "logits": 4 * teacher.vocabulary}[gives]


def assumed(student: Model, teacher: Model) -> tuple[Rates, int]:
    """The rates from the shapes, and the GPUs of one teacher actor: the fewest that hold it in bfloat16."""
    of_a_teacher = 2 ** math.ceil(math.log2(max(1.0, 2 * teacher.parameters / (0.8 * MEMORY))))
    # Every decoded token reads the weights once and the keys and values of each text.
    read = 2 * student.parameters + DECODED * CONTEXT * student.cache_bytes
    return Rates(
        sampler=DECODED * BANDWIDTH * DECODING / read,
        # The layers of a teacher on several GPUs work one after another (device_map).
        teacher=PEAK * READING / (2 * teacher.parameters),
        rank=PEAK * TRAINING / (6 * student.parameters),
    ), of_a_teacher


def seconds(split: Split, rates: Rates, links: Links, step: Step, sent_bytes: float, row: float) -> Seconds:
    """sent_bytes: of the weights. row: bytes of a target at one position."""
    everything = step.tokens + step.prompt_tokens
    scaling = (1 - LOST_BY_DOUBLING) ** math.log2(split.ranks)
    machines = math.ceil(split.samplers / GPUS_OF_A_MACHINE)
    actors = split.samplers + split.teachers // split.of_a_teacher
    targets = step.tokens * row
    # In: over the card, and unpacked. On to the ranks: packed, and over the card.
    moved = (
        targets * (2 / links.card + 2 / links.copies)
        if split.ranks > 1
        else targets * (1 / links.card + 1 / links.copies)
    )
    return Seconds(
        sample_s=step.tokens / (rates.sampler * split.samplers),
        score_s=everything / (rates.teacher * split.teachers / split.of_a_teacher),
        learn_s=everything / (rates.rank * split.ranks * scaling),
        sync_s=sent_bytes / links.copies + machines * sent_bytes / links.card,
        targets_s=moved,
        calls_s=2 * actors * links.call_s,
    )


def splits(gpus: int, of_a_teacher: int, least_ranks: int) -> Iterator[Split]:
    """Splits in which every role has a GPU, in sixteenths of the cluster from 16 GPUs on. least_ranks: those
    that hold the student with its optimiser.
    """
    unit = max(1, gpus // 16)
    for ranks in range(math.ceil(least_ranks / unit) * unit, gpus, unit):
        for teachers in range(of_a_teacher, gpus - ranks, max(unit, of_a_teacher)):
            yield Split(gpus - ranks - teachers, teachers, ranks, of_a_teacher)


def best(
    tried: list[Split], rates: Rates, links: Links, step: Step, sent: float, row: float, stale: bool
) -> tuple[Split, Seconds] | None:
    found = [(each, seconds(each, rates, links, step, sent, row)) for each in tried]
    return min(
        found, key=lambda pair: pair[1].overlapped if stale else pair[1].one_after_another, default=None
    )


def table(
    pair: str, gpus: list[int], gives: str, item: int, links: Links, given: Rates | None
) -> Iterator[str]:
    student, teacher = (MODELS[name] for name in PAIRS[pair])
    rates, of_a_teacher = assumed(student, teacher)
    rates = given or rates
    row = row_bytes(teacher, gives, item)
    yield (
        f"\n{pair.replace('-', ' <- ')}, {gives} ({row / 1e3:.3g} kB a position); tokens a second: sampler "
        f"{rates.sampler:,.0f}, teacher ({of_a_teacher} GPUs) {rates.teacher:,.0f}, rank {rates.rank:,.0f}"
    )
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"{'|---' * len(COLUMNS)}|"
    for count in gpus:
        # The batch grows with the cluster: 32 answers of 1,024 tokens for each GPU.
        step = Step(32.0 * 1024 * count, 32.0 * 256 * count)
        for stale in (False, True):
            tried = list(splits(count, of_a_teacher, math.ceil(16 * student.parameters / (0.8 * MEMORY))))
            found = best(tried, rates, links, step, 2 * student.parameters, row, stale)
            if found is None:
                yield f"| {count} | | too few GPUs | | | | | | | | |"
                break
            split, cost = found
            total = cost.overlapped if stale else cost.one_after_another
            parts = (cost.sample_s, cost.score_s, cost.learn_s, cost.sync_s, cost.targets_s, cost.calls_s)
            shared = f"{split.samplers} + {split.teachers} + {split.ranks}"
            shown = " | ".join(f"{part:.2f}" for part in (*parts, total))
            yield f"| {count} | {int(stale)} | {shared} | {shown} | {cost.slowest} |"


def measured(megabytes: int = 64) -> Links:
    """Copies and calls on this machine, between two processes of Ray."""
    import ray
    import torch

    from reflux.cluster.wire import packed

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=6 * megabytes * 10**6)

    class Echo:
        def nothing(self) -> None: ...

        def unpacked_s(self, value: object) -> float:
            started = time.perf_counter()
            value.value()  # type: ignore[attr-defined]
            return time.perf_counter() - started

    states = [torch.randn(256, 4096) for _ in range(megabytes // 4)]
    size = sum(each.nbytes for each in states)
    actor = ray.remote(Echo).remote()
    ray.get(actor.nothing.remote())
    started = time.perf_counter()
    for _ in range(100):
        ray.get(actor.nothing.remote())
    call_s = (time.perf_counter() - started) / 100
    packs, unpacks = [], []
    for _ in range(5):
        started = time.perf_counter()
        reference = ray.put(packed(states))
        packs.append(time.perf_counter() - started)
        unpacks.append(ray.get(actor.unpacked_s.remote(reference)))
    ray.shutdown()
    print(
        f"a call {call_s * 1e3:.2f} ms; {size / 1e6:.0f} MB of hidden states: packed and put at "
        f"{size / min(packs) / GIGA:.2f} GB/s, read and unpacked at {size / min(unpacks) / GIGA:.2f} GB/s "
        "(the best of five)"
    )
    return replace(Links(), copies=min(size / min(packs), size / min(unpacks)), call_s=call_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=list(PAIRS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--gives", choices=["hidden", "top64", "logits"], nargs="+", default=["hidden"])
    parser.add_argument("--item", type=int, default=2, help="bytes of one number of a hidden state")
    parser.add_argument("--rates", type=float, nargs=3, metavar=("SAMPLER", "TEACHER", "RANK"))
    parser.add_argument("--copies", type=float, help="GB/s of packing or unpacking in one process")
    parser.add_argument("--card", type=float, help="GB/s of a machine's network card")
    parser.add_argument("--measure", action="store_true", help="measure copies and calls here first")
    asked = parser.parse_args()
    links = measured() if asked.measure else Links()
    if asked.copies:
        links = replace(links, copies=asked.copies * GIGA)
    if asked.card:
        links = replace(links, card=asked.card * GIGA)
    given = Rates(*asked.rates) if asked.rates else None
    for pair in asked.pair:
        for gives in asked.gives:
            print("\n".join(table(pair, asked.gpus, gives, asked.item, links, given)))


if __name__ == "__main__":
    main()
