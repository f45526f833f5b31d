"""A verdict costs its own attempt only, whatever the verifier does; and what counts as the right answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.config.registry import part
from reflux.config.step_context import StepContext
from reflux.contexts.peers import Peers
from reflux.errors import ConfigError
from reflux.grading import graders
from reflux.grading.final import final_answer
from reflux.grading.graders import Graders
from reflux.grading.math import grade
from reflux.rewards.base import judge
from reflux.rewards.verifier import Verifier
from reflux.types import Attempt, Group, Prompt, Reward, TokenRollout

TASK = r'''
import mmap, os, signal, sys, time
from dataclasses import dataclass
from reflux.types import Reward

@dataclass(frozen=True)
class Odd:
    """Does what the text says."""
    right: float = 1.0

    def evidence(self, rollout):
        return rollout.made

    def verify(self, prompt, made):
        print("a verifier may print")
        if not isinstance(made, str):  # as a GPU's driver does: addresses, of which none is used
            return float(len(mmap.mmap(-1, 8 << 30, prot=mmap.PROT_READ)) >> 30)
        match made:
            case "hang": time.sleep(60)
            case "spin": sum(iter(int, 1))  # never gives up the interpreter
            case "raise": raise RuntimeError("no idea")
            case "exit": sys.exit(3)
            case "crash": os._exit(7)
            case "nan": return float("nan")
            case "a part of nan": return Reward(1.0, {"style": float("nan")})
            case "letters": return Reward("1.0?")
            case "nothing": return Reward(None)
            case "reason": return Reward(None, {"style": 0.5}, "no words", "there is no judge today")
            case "told": return Reward(0.25, {"style": 0.5}, "Mind the sign.\nThen try again.")
            case "half a character": return Reward(1.0, feedback="\ud83d")
            case "memory": bytearray(8 << 30)
            case "pid": return os.getpid()
            case "alarm":
                signal.signal(signal.SIGALRM, lambda *_: None)  # raises outside a main thread
                signal.alarm(0)
            case "torch":
                heavy = ("torch", "transformers", "datasets")
                return any(name.split(".")[0] in heavy for name in sys.modules)
            case "main": return hasattr(sys.modules["__main__"], "__file__")
            case "modules": return len([name for name in sys.modules if name.startswith("reflux")])
        return self.right if made == prompt.answer or made == "alarm" else 0.0
'''
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "say yes"},), answer="yes")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "odd_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(graders, "FIRST_S", 0.5)
    yield __import__("odd_task").Odd()
    sys.modules.pop("odd_task")


def verdicts(task: Any, *texts: str, timeout_s: float = 10.0, workers: int = 1) -> list[Reward]:
    with Graders(workers, timeout_s) as graders:
        return asyncio.run(graders.verify_many(task, [(PROMPT, text) for text in texts]))


def values(found: list[Reward]) -> list[float | None]:
    return [verdict.value for verdict in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("workers", [1, 3])
def test_verdicts_come_in_order(odd: Any, workers: int) -> None:
    texts = ["yes" if number % 3 == 0 else "no" for number in range(700)]
    assert values(verdicts(odd, *texts, workers=workers)) == [float(text == "yes") for text in texts]


def test_no_jobs_no_verdicts(odd: Any) -> None:
    assert verdicts(odd) == []


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_an_answer_past_the_time_limit_costs_itself_only(odd: Any, text: str) -> None:
    found = verdicts(odd, "yes", text, "yes", "no", text, "yes", timeout_s=0.5)
    assert values(found) == [1.0, None, 1.0, 0.0, None, 1.0]
    late = "the verifier gave no verdict within 0.5 s"
    assert [reward.error for reward in found] == [None, late, None, None, late, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise", "the verifier raised RuntimeError: no idea"),
        ("exit", "the verifier raised SystemExit: 3"),
        ("crash", "the verifier ended its process (code 7)"),
        ("nan", "the verdict is nan, which is not finite"),
        ("a part of nan", "the verdict is nan, which is not finite"),
        ("letters", "the verifier raised"),
        ("memory", "MemoryError"),
        ("nothing", "the verifier gave no verdict"),
        ("reason", "there is no judge today"),
    ],
)
def test_a_failing_verifier_costs_its_own_attempt_only(odd: Any, text: str, words: str) -> None:
    found = verdicts(odd, "yes", text, "yes")
    assert values(found) == [1.0, None, 1.0]
    assert words in (found[1].error or "")
    assert found[1].error is not None


def test_only_a_texts_verdict_has_a_bound_on_memory(odd: Any) -> None:
    """A grader of images may use a GPU, whose driver reserves more address space than there is memory."""
    conversation = ({"role": "assistant", "content": "yes"},)
    jobs = [(PROMPT, made) for made in ("memory", np.zeros((2, 2), np.uint8), "memory", "yes", conversation)]
    with Graders() as graders:
        found = asyncio.run(graders.verify_many(odd, jobs))
    assert values(found) == [None, 8.0, None, 1.0, None]
    assert "MemoryError" in (found[0].error or "")


def test_problems_are_counted(odd: Any) -> None:
    with Graders(timeout_s=0.5) as graders:
        asyncio.run(graders.verify_many(odd, [(PROMPT, text) for text in ("yes", "hang", "raise", "nan")]))
        assert (graders.timeouts, graders.errors) == (1, 2)


def test_a_worker_imports_no_torch_and_not_the_script(odd: Any) -> None:
    assert values(verdicts(odd, "torch", "main")) == [0.0, 0.0]
    # the question sees the worker's modules at all
    assert (verdicts(odd, "modules")[0].value or 0) > 0


def test_a_verifier_runs_in_the_main_thread_of_its_process(odd: Any) -> None:
    assert values(verdicts(odd, "alarm")) == [1.0]


def test_each_message_is_judged_by_its_own_task(odd: Any) -> None:
    with Graders() as graders:
        for right in (1.0, 0.5, 1.0):
            assert asyncio.run(graders.verify(type(odd)(right), PROMPT, "yes")).value == right


def test_many_small_questions_at_once_get_their_own_answers(odd: Any) -> None:
    async def ask(graders: Graders) -> list[Reward]:
        return await asyncio.gather(
            *(graders.verify(odd, PROMPT, "yes" if number % 2 else "no") for number in range(64))
        )

    with Graders(workers=2) as graders:
        assert values(asyncio.run(ask(graders))) == [float(number % 2) for number in range(64)]


def test_close_ends_the_workers_also_while_they_judge(odd: Any) -> None:
    async def hang_and_close(graders: Graders) -> int:
        pid = await graders.verify(odd, PROMPT, "pid")
        hanging = asyncio.create_task(graders.verify(odd, PROMPT, "hang"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(graders.close)
        with pytest.raises(RuntimeError, match="closed"):
            await hanging
        return int(pid.value or 0)

    assert not alive(asyncio.run(hang_and_close(Graders(timeout_s=30))))


def test_a_worker_that_something_else_ended_is_replaced(odd: Any) -> None:
    with Graders() as graders:
        first = int(asyncio.run(graders.verify(odd, PROMPT, "pid")).value or 0)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        second = asyncio.run(graders.verify(odd, PROMPT, "pid")).value
        assert second not in (None, first)


@pytest.mark.parametrize("doing", ["pid", "hang", "spin"])
def test_no_worker_outlives_a_killed_parent(odd: Any, tmp_path: Path, doing: str) -> None:
    """An idle, a sleeping and a computing worker, whose parent gets SIGKILL, are gone soon after."""
    script = f"""
        import asyncio
        from odd_task import Odd
        from reflux.grading import graders
        from reflux.types import Prompt

        graders.FIRST_S = 0.5
        prompt = Prompt(id="p", messages=())
        async def main():
            judges = graders.Graders(timeout_s=30 if {doing!r} == "hang" else 0.5)
            print(int((await judges.verify(Odd(), prompt, "pid")).value), flush=True)
            await judges.verify(Odd(), prompt, {doing!r})
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert gone_within(pid, 30.0)


def test_a_script_without_a_main_guard_is_not_run_again(odd: Any, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import asyncio\nfrom odd_task import Odd\nfrom reflux.grading.graders import Graders\nfrom "
        "reflux.types import Prompt\n"
        'print("once")\ngraders = Graders()\nprompt = Prompt(id="p", messages=(), answer="yes")\n'
        # and never closed
        'print(asyncio.run(graders.verify(Odd(), prompt, "yes")).value)\n'
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert (done.stdout.split(), done.returncode) == (["once", "1.0"], 0)


def test_a_task_that_cannot_be_sent_or_loaded_is_explained(odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="class must be at the top level of a module"):
        verdicts(SimpleNamespace(verify=lambda prompt, made: 1.0), "yes")
    script_class = type("Mine", (), {})
    script_class.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "Mine", script_class, raising=False)
    with pytest.raises(ConfigError, match="not in the script that is being run"):
        verdicts(script_class(), "yes")


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_graders_refuse_what_cannot_work(workers: int, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="workers >= 1"):
        Graders(workers, timeout_s)


def attempt(text: str, finish: Any = "stop") -> Attempt:
    ids = np.zeros(2, dtype=np.int64)
    common = {"mask_T": np.ones(2, dtype=bool), "logp_T": np.zeros(2, dtype=np.float32)}
    rollout = TokenRollout(
        prompt=PROMPT,
        sample=0,
        version=0,
        finish=finish,
        **common,
        prompt_tokens=ids,
        tokens_T=ids,
        text=text,
        messages=PROMPT.messages,
    )
    return Attempt(rollout)


@pytest.mark.parametrize("own", [False, True])
def test_the_verifier_says_what_it_found_of_each_attempt(odd: Any, own: bool) -> None:
    async def score(graders: Graders) -> list[Reward]:
        services = tiny.services()
        services.graders = graders
        group = [
            attempt("yes"),
            attempt("yes", "error"),
            attempt("no"),
            attempt("raise"),
            attempt("yes", "length"),
        ]
        async with Verifier(timeout_s=9.0 if own else 10.0).open(tiny.context(task=odd), services) as reward:
            rewards = await reward.score(group)
        # asking changes nothing
        assert [entry.reward for entry in group] == [None] * 5
        return rewards

    with Graders() as graders:
        rewards = asyncio.run(score(graders))
        assert graders.errors == (0 if own else 1)
    unfinished, failed = (
        Reward(None, error="sampling ended in an error"),
        Reward(None, error="the verifier raised RuntimeError: no idea"),
    )
    assert rewards == [Reward(1.0), unfinished, Reward(0.0), failed, Reward(1.0)]


def test_the_whole_verdict_of_a_task_comes_back_from_the_worker(odd: Any) -> None:
    told, without, half = verdicts(odd, "told", "reason", "half a character")
    assert told == Reward(0.25, {"style": 0.5}, "Mind the sign.\nThen try again.")
    assert without == Reward(None, {"style": 0.5}, "no words", "there is no judge today")
    assert half == Reward(1.0, feedback="?")


def test_feedback_of_a_task_reaches_the_context_that_shows_it(odd: Any) -> None:
    async def show() -> list[Any]:
        group = [attempt("told"), attempt("no")]
        with Graders() as graders:
            services = tiny.services()
            services.graders = graders
            async with Verifier().open(tiny.context(task=odd), services) as reward:
                await judge(reward, group)
        return Peers(feedback="always")(group, StepContext(0, 0))

    told, without = asyncio.run(show())
    assert "Mind the sign.\nThen try again." in told.messages[-1]["content"]
    assert "Mind the sign" not in without.messages[-1]["content"]


def test_the_loop_keeps_what_a_reward_returns() -> None:
    class Words:
        async def score(self, group: Group) -> list[Reward]:
            return [Reward(float(place), feedback=f"words {place}") for place in range(len(group))]

    group = [attempt("yes"), attempt("no")]
    asyncio.run(judge(Words(), group))
    assert [entry.reward for entry in group] == [
        Reward(0.0, feedback="words 0"),
        Reward(1.0, feedback="words 1"),
    ]
    alone = [attempt("yes")]
    asyncio.run(judge(None, alone))
    assert alone[0].reward is None
    Words.score = lambda self, group: asyncio.sleep(0, [])  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="shorter"):
        asyncio.run(judge(Words(), group))


def test_the_verifier_reward_is_registered_with_its_vetted_setting() -> None:
    assert part("rewards", "verifier")() == Verifier(timeout_s=10.0, workers=1)
    with pytest.raises(ValueError, match="timeout_s\n  Input should be greater than 0"):
        Verifier(timeout_s=0.0)
    with pytest.raises(ValueError, match="workers\n  Input should be greater than or equal to 1"):
        Verifier(workers=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{18}", "18"),
        (r"\boxed{17} no, \boxed{18}", "18"),
        # what is boxed comes first
        (r"\boxed{18}. The answer is 17.", "18"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{18 \text{ dollars}}", "18"),
        ("#### 1,000.0", "1000"),
        ("The answer is $18.", "18"),
        ("Answer: 5. Hmm. Answer: 6", "6"),
        ("Answer:\n18 apples.", "18"),
        ("Answer: x = 18", "18"),
        ("Answer: 5 + 21 = 26", "26"),
        ("The answer is: **42**", "42"),
        ("Answer: \u22125", "-5"),
        ("Answer: .5", "0.5"),
        ("first 5, then 18.", "18"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{3\frac{1}{2}}", "3.5"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{(1,2)}", "(1, 2)"),
        (r"\boxed{\text{B}}", "B"),
        ("Answer: Paris", "Paris"),
        (r"thus $x=\frac{1}{3}$", "1/3"),
    ],
)
def test_a_right_answer_counts(text: str, answer: str) -> None:
    assert grade(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "5"),
        ("no number at all", "5"),
        ("Answer:", "5"),
        (r"\boxed{}", "5"),
        # cut off: it might have become 57
        (r"5, so \boxed{5", "5"),
        ("Answer: 26", "25"),
        ("Answer: -5", "5"),
        ("Answer: 12 or 13", "12"),
        ("Answer: 12, 13", "13"),
        ("Answer: 18:30", "18"),
        (r"\boxed{4x}", "4"),
        (r"\boxed{\sqrt{16}}", "16"),
        ("Answer: 3.14", "3.14159"),
        ("18 apples, or 5", "18"),
        ("version v2", "2"),
        ("Answer: Rome", "Paris"),
        (r"\boxed{x+1}", "(x+1)^2"),
    ],
)
def test_a_wrong_answer_does_not_count(text: str, answer: str) -> None:
    assert grade(text, answer) == 0.0


def test_plain_numbers_never_need_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert (grade("#### 1,234", "1234"), grade(r"\boxed{7}", "8"), grade("it is 7", "8")) == (1.0, 0.0, 0.0)
    with pytest.raises(ImportError):
        grade(r"\boxed{\sqrt{2}}", "2")


def test_an_empty_stored_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compare with"):
        grade("5", " ")


def test_nested_braces_belong_to_the_answer() -> None:
    assert final_answer(r"\boxed{\frac{1}{\sqrt{2}}} and {more}") == r"\frac{1}{\sqrt{2}}"
