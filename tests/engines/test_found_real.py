"""A real vLLM server that somebody else has started, with the embedded teacher's weights: a teacher of each
kind in it, and a sampler that finds it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from contract.test_vllm_teacher import WANTS, answers_of, attempts, full, requests_of
from contract.test_vllm_teacher import opened as opened_teacher
from contract.test_vllm_teacher import part as teacher_part
from engines.conftest import TEACHER, Found, Tally, opened, own_net
from engines.real_server import agree, moved, process_of, sample
from reflux.config.registry import build
from reflux.errors import ServerError
from reflux.models.text import Model, load_model
from reflux.types import GivenTarget, SampledTarget, TeacherAnswer, TopKTarget

# a start of the server on a machine that is busy
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1700)]
GIVES = ["hidden", "student_topk", "teacher_topk", "sampled"]
# Float32 on both sides; the largest difference that was measured is 6e-5.
CLOSE = {"atol": 3e-4, "rtol": 0.0}
NAME = "reflux:teacher"
# What the other tests ask for, and the log-probs of the sampled tokens.
ASKED = replace(WANTS, logp=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(NAME, "model", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def local() -> list[TeacherAnswer]:
    """The answers of the same model in this process."""
    made = build("teachers", {"kind": "local", "model": NAME, "device": "cpu"}, "teachers.main")
    return answers_of(made, attempts(6, 20), ASKED)


# --- teachers


@pytest.mark.parametrize("max_rows", [8192, 7])
@pytest.mark.parametrize("gives", GIVES)
def test_a_served_teacher_gives_what_a_local_one_gives(
    found: Found, model: Model, local: list[TeacherAnswer], gives: str, max_rows: int
) -> None:
    made = teacher_part(NAME, found.url, gives=gives, k=5, max_rows=max_rows)
    for served, here in zip(answers_of(made, attempts(6, 20), ASKED), local, strict=True):
        assert served.error is None
        target: Any = served.target
        logp_TV = full(here, model)
        np.testing.assert_allclose(target.logp_T, here.target.logp_T, **CLOSE)  # type: ignore[union-attr]
        if gives == "hidden":
            np.testing.assert_allclose(full(served, model), logp_TV, **CLOSE)
        elif gives == "sampled":
            assert isinstance(target, SampledTarget)
        else:
            assert isinstance(target, GivenTarget if gives == "student_topk" else TopKTarget)
            np.testing.assert_allclose(
                target.logp_TK, np.take_along_axis(logp_TV, target.ids_TK, axis=1), **CLOSE
            )
        if gives == "teacher_topk":
            np.testing.assert_allclose(target.logp_TK, -np.sort(-logp_TV, axis=1)[:, :5], **CLOSE)


@pytest.mark.parametrize("gives", GIVES)
def test_a_teacher_whose_weights_are_not_finite_teaches_nothing(
    found: Found, tmp_path: Path, gives: str
) -> None:
    """The server answers with status 200 or 400, and each attempt has a reason instead of a target."""
    whole = load_file(TEACHER / "model.safetensors")
    broken = {**whole, "model.norm.weight": whole["model.norm.weight"] * float("nan")}
    for name, weights in (("whole", whole), ("broken", broken)):
        save_file(weights, tmp_path / name)

    async def use(teacher: Any) -> Any:
        await asyncio.to_thread(found.run, found.server.load_files([tmp_path / "broken"], 1))
        wrong = await teacher.score(requests_of(attempts(2)))
        await asyncio.to_thread(found.run, found.server.load_files([tmp_path / "whole"], 2))
        return wrong, await teacher.score(requests_of(attempts(2)))

    made = teacher_part(NAME, found.url, gives=gives, max_failed_share=1.0)
    try:
        wrong, right = opened_teacher(made, use)
    finally:
        found.run(found.server.load_files([tmp_path / "whole"], 3))
    assert [answer.target for answer in wrong] == [None, None]
    assert all("teachers.main" in answer.error for answer in wrong)
    assert all(answer.error is None for answer in right)


# --- a sampler that finds the server


def test_a_slow_server_is_asked_again_and_counts_once(found: Found, tmp_path: Path) -> None:
    with opened(None, tmp_path, NAME, mode="url", url=found.url) as real:
        plain = real.run(sample(real))
        agree(real, plain)
        tally = Tally("a server that stands still until requests are sent again")
        worker = process_of(found.pid, "VLLM::Worker")

        async def act() -> Any:
            client = await real.client()
            client._http.timeout = httpx2.Timeout(8.0)
            before = client.traffic.answered
            os.kill(worker, signal.SIGSTOP)
            try:
                asking = asyncio.create_task(sample(real))
                while client.traffic.replays < len(plain):
                    await asyncio.sleep(0.02)
            finally:
                os.kill(worker, signal.SIGCONT)
            return await asking, client.traffic.answered - before

        rollouts, answered = real.run(act())
        assert answered == len(plain)
        tally.add(plain, rollouts)
        tally.close()


def test_a_server_that_a_killed_run_left_paused_is_used(found: Found, tmp_path: Path) -> None:
    with opened(None, tmp_path / "first", NAME, mode="url", url=found.url) as real:
        plain = real.run(sample(real))
    found.run(found.server.pause())
    with opened(None, tmp_path / "second", NAME, mode="url", url=found.url) as real:
        tally = Tally("a run that was killed in a pause of a server of its own")
        tally.add(plain, real.run(sample(real)))
        agree(real, plain)
        tally.close()
        real.run(real.publish(moved(3, NAME), 1))
        agree(real, real.run(sample(real)))
        # for the other tests
        real.run(real.publish(own_net(NAME), 2))


def test_a_server_that_a_killed_run_left_in_an_update_is_refused(found: Found, tmp_path: Path) -> None:
    control = found.server.control.control
    found.run(control("/start_weight_update"))
    words = "an update that another run began was never finished"
    with pytest.raises(ServerError, match=words), opened(None, tmp_path, NAME, mode="url", url=found.url):
        pytest.fail("the server was used")
    # For the other tests: nothing of the update had come yet, so all weights may come now.
    save_file(load_file(TEACHER / "model.safetensors"), tmp_path / "whole")
    found.run(control("/update_weights", {"update_info": {"path": str(tmp_path / "whole")}}))
    found.run(control("/finish_weight_update", {"weight_version": "2"}))
    found.run(found.server.resume(2))
    with opened(None, tmp_path / "after", NAME, mode="url", url=found.url) as real:
        agree(real, real.run(sample(real)))
