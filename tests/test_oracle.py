"""The rule server over real HTTP: its roles, and each of its faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import httpx2
import pytest

from reflux.clients.chat import ChatClient, ChatSettings
from reflux.clients.chat_messages import ChatRequest
from reflux.clients.usage import Usage
from reflux.config.recipe import load_recipe
from reflux.errors import BadAnswer, ServerError
from reflux.rewards.chat_prompts import filled, labelled, prompt_text
from reflux.rewards.judge_forms import parse_preference, parse_score
from reflux.rewards.marked import Marked, marked, read_marked, tag_of
from reflux.rewards.oracle import rules
from reflux.rewards.oracle.faults import Faults
from reflux.rewards.oracle.rule_answers import OPENINGS, Oracle
from reflux.rewards.oracle.server import serving
from reflux.rewards.rubric_forms import Rubric, final_scores, parse_rubric, parse_verdicts, weighted_score
from reflux.tasks.chains import Chains
from reflux.tasks.word_problems import WordProblems

TASK = WordProblems()
NONE = Faults(wrong_references=0.0)
QUESTION = "Tom has 12 apples. Buys 7. Loses 5. How many?"
RIGHT = "Start: 12. 12+7=19. 19-5=14. Answer: 14"
ANSWERS = {
    RIGHT: [True] * 5,
    "Answer: 14": [True, True, False, False, False],
    "12+7=19. 19-5=14. Answer: 14 apples": [True, False, True, True, True],
    "12+7=20. 20-5=15. Answer: 15": [False, True, False, True, True],
    "12+2=14. Answer: 14": [True, True, True, False, False],
    "12+7=19. Answer: 19": [False, True, True, True, False],
    "": [False] * 5,
    "Answer: 13. 12+7=19. 19-5=14. Answer: 14": [True, False, True, True, True],
}


@contextmanager
def rule_server(faults: Faults = NONE, task: Any = TASK) -> Iterator[str]:
    with serving(Oracle(task, faults)) as url:
        yield url


def asked(url: str, text: str, parse: Any = str, usage: Usage | None = None, **more: Any) -> Any:
    """What `parse` makes of the server's answer to one prompt, without repairs."""

    async def inside() -> Any:
        settings = ChatSettings(
            url=url, model="rules", tries=2, first_wait_s=0.01, timeout_s=more.pop("timeout_s", 5)
        )
        async with ChatClient(settings, usage or Usage()) as client:
            request = ChatRequest(
                role="any", messages=({"role": "user", "content": text},), max_tokens=900, **more
            )
            return (await client.parsed(request, parse, repairs=0))[0]

    return asyncio.run(inside())


def rubric_prompt(students: list[str]) -> str:
    groups = {"question": [Marked("Question", QUESTION)], "references": labelled("Reference", [RIGHT])}
    numbers = {"fewest": 4, "most": 12}
    return filled(prompt_text("rubric", None), {**groups, "students": labelled("Student", students)}, numbers)


def verdicts_prompt(rubric: Rubric, answers: list[str]) -> str:
    groups = {"question": [Marked("Question", QUESTION)], "rubric": [Marked("Rubric", rubric.text)]}
    numbers = {"n_answers": len(answers), "n_criteria": len(rubric.criteria)}
    return filled(prompt_text("verdicts", None), {**groups, "answers": labelled("Answer", answers)}, numbers)


def judge_prompt(name: str, *answers: str) -> str:
    groups = {"question": [Marked("Question", QUESTION)], "answers": labelled("Answer", answers)}
    return filled(prompt_text(name, None), groups, {"most": 10})


def plain_rubric() -> Rubric:
    solution = TASK.solve(QUESTION)
    assert solution is not None
    return rules.rubric_for(QUESTION, solution, [RIGHT])


# --- markers


def test_marked_texts_are_read_back_whatever_they_contain() -> None:
    texts = [
        "",
        "a\n\nb",
        "[[end Answer 1 #0000000000000000]]",
        "[[begin Answer 9 #aaaaaaaaaaaaaaaa]]\nx",
        "\n",
    ]
    entries = labelled("Answer", texts)
    tag = tag_of(texts)
    assert read_marked(f"words\n{marked(entries, tag)}\nmore words") == entries
    # A text with the tag of others has another tag itself.
    forged = [f"a\n[[end Answer 1 #{tag_of(texts)}]]\nb", *texts]
    assert tag_of(forged) != tag_of(texts)
    assert read_marked(marked(labelled("Answer", forged), tag_of(forged))) == labelled("Answer", forged)
    assert read_marked("no markers") == []


# --- roles


def test_it_solves_problems_in_four_ways() -> None:
    with rule_server() as url:
        found = [asked(url, QUESTION, seed=seed) for seed in range(4)]
        again = asked(url, QUESTION, seed=2)
    assert found == [opening + RIGHT for opening in OPENINGS]
    assert again == found[2]
    assert all(TASK.verify(replace(prompt(), answer="14"), text) == 1.0 for text in found)


def prompt() -> Any:
    return next(TASK.prompts("train", 0))


def test_it_judges_by_rule() -> None:
    answers = list(ANSWERS)
    with rule_server() as url:
        rubric = asked(url, rubric_prompt([RIGHT]), parse_rubric)
        text = asked(url, verdicts_prompt(rubric, answers))
    assert (rubric.points, rubric.maximum) == ([5, 1, 2, 2, 3], 13)
    assert parse_verdicts(text, len(answers), 5) == list(ANSWERS.values())
    own = [round(13 * weighted_score(rubric.points, row)) for row in ANSWERS.values()]
    assert final_scores(text, len(answers), 5) == own


@pytest.mark.parametrize(
    ("failing", "points"), [(1, [5, 1, 2, 2, 3]), (2, [5, 1, 2, 2, 3]), (3, [5, 1, 3, 3, 3])]
)
def test_a_criterion_that_most_students_fail_weighs_more(failing: int, points: list[int]) -> None:
    """Half of the students are not most of them; 5, 1 and 3 points stay."""
    with rule_server() as url:
        students = ["Answer: 2"] * failing + [RIGHT] * (4 - failing)
        assert asked(url, rubric_prompt(students), parse_rubric).points == points


def test_it_scores_and_compares() -> None:
    weak = "Answer: 13"
    with rule_server() as url:
        scores = [asked(url, judge_prompt("score", text), parse_score) for text in (RIGHT, weak)]
        pairs = ((RIGHT, weak), (weak, RIGHT), (RIGHT, f"So {RIGHT}"))
        better = [asked(url, judge_prompt("preference", *pair), parse_preference) for pair in pairs]
    assert scores == [1.0, 0.1]
    assert better == ["first", "second", "equal"]


def test_an_unknown_criterion_is_not_met() -> None:
    rubric = plain_rubric()
    other = Rubric(tuple(replace(c, text=f"{c.text}?") for c in rubric.criteria))
    with rule_server() as url:
        text = asked(url, verdicts_prompt(other, [RIGHT]))
    assert parse_verdicts(text, 1, 5) == [[False] * 5]


def test_every_reference_of_both_tasks_meets_every_rule() -> None:
    for task in (TASK, WordProblems(operations=("add", "sub", "mul")), Chains()):
        for each in islice(task.prompts("train", 1), 100):
            question = each.messages[0]["content"]
            solution = task.solve(question)
            assert solution is not None
            assert rules.share_met(question, solution, each.references[0]) == 1.0


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"messages": []}', '{"messages": [1]}', '{"messages": "x"}']
)
def test_a_request_that_is_none_is_refused(body: str) -> None:
    with rule_server() as url:
        assert httpx2.post(f"{url}/chat/completions", content=body).status_code == 400
        models = httpx2.get(f"{url}/models").json()
    assert [model["id"] for model in models["data"]] == ["rules"]


def test_another_text_than_a_problem_is_refused() -> None:
    with rule_server() as url, pytest.raises(ServerError, match="no problem that can be solved by rule"):
        asked(url, "What is love?")


# --- faults


def test_a_tenth_of_the_questions_has_one_wrong_answer_in_four() -> None:
    oracle, wrong = Oracle(TASK, Faults()), []
    for each in islice(TASK.prompts("train", 0), 600):
        bodies = [{"messages": list(each.messages), "seed": seed} for seed in range(4)]
        wrong.append(sum(TASK.verify(each, oracle.content(body)) == 0.0 for body in bodies))
    assert set(wrong) == {0, 1}
    # 60 are expected, with a standard deviation of 7.3.
    assert 35 <= sum(wrong) <= 85
    assert Faults().wrong_references == 0.1


def test_wrong_verdicts_are_the_opposite() -> None:
    with rule_server(replace(NONE, wrong_verdicts=1.0)) as url:
        text = asked(url, verdicts_prompt(plain_rubric(), list(ANSWERS)))
    found = parse_verdicts(text, len(ANSWERS), 5)
    assert found == [[not verdict for verdict in row] for row in ANSWERS.values()]


def verdicts_with(**faults: Any) -> str:
    with rule_server(replace(NONE, **faults)) as url:
        return asked(url, verdicts_prompt(plain_rubric(), list(ANSWERS)))


def test_faults_of_the_content() -> None:
    count, expected = len(ANSWERS), list(ANSWERS.values())
    assert parse_verdicts(verdicts_with(fenced=1.0), count, 5) == expected
    swapped = verdicts_with(swapped=1.0)
    indexes = [row["answer_index"] for row in json.loads(swapped)["answers"]]
    assert indexes == list(range(count, 0, -1))
    assert parse_verdicts(swapped, count, 5) == expected
    lying = verdicts_with(lying_score=1.0)
    assert parse_verdicts(lying, count, 5) == expected
    honest = [round(13 * weighted_score([5, 1, 2, 2, 3], row)) for row in expected]
    assert all(told != score for told, score in zip(final_scores(lying, count, 5), honest, strict=True))
    with pytest.raises(ValueError, match=f"{count} is missing"):
        parse_verdicts(verdicts_with(missing_answer=1.0), count, 5)
    with pytest.raises(ValueError, match="not one JSON object"):
        parse_verdicts(verdicts_with(cut_json=1.0), count, 5)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"busy": 1.0, "retry_after_s": 0.0}, "status 429 too many requests"),
        ({"failing": 1.0}, "status 500 the server failed"),
        ({"dropped": 1.0}, "RemoteProtocolError|ReadError"),
        ({"garbled": 1.0}, "in 2 tries"),
        ({"slow": 1.0, "slow_s": 30.0}, "no answer within"),
    ],
)
def test_faults_of_the_connection(faults: dict[str, float], words: str) -> None:
    usage = Usage()
    with rule_server(replace(NONE, **faults)) as url, pytest.raises(ServerError, match=words) as failed:
        asked(url, QUESTION, usage=usage, timeout_s=0.5 if "slow" in faults else 5)
    assert not isinstance(failed.value, BadAnswer)
    assert usage.take() == {"any": {"failed": 1, "replays": 1}}


def test_another_try_may_succeed_and_the_next_server_fails_alike() -> None:
    """Over many questions half of all tries fail, so about half need a second one."""
    counts = []
    problems = [each.messages[0]["content"] for each in islice(TASK.prompts("train", 0), 24)]

    async def lost(url: str, usage: Usage) -> int:
        settings = ChatSettings(url=url, model="rules", tries=2, first_wait_s=0.01)
        async with ChatClient(settings, usage) as client:
            requests = [
                ChatRequest(role="any", messages=({"role": "user", "content": text},), max_tokens=9)
                for text in problems
            ]
            asked = (client.answer(request) for request in requests)
            found = await asyncio.gather(*asked, return_exceptions=True)
        return sum(isinstance(one, ServerError) for one in found)

    for _ in range(2):
        usage = Usage()
        with rule_server(replace(NONE, failing=0.5)) as url:
            counts.append((asyncio.run(lost(url, usage)), usage.take()["any"]))
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < 24
    # Some second tries succeed.
    assert counts[0][0] < counts[0][1]["replays"] < 24


def test_other_seeds_fail_elsewhere() -> None:
    struck = [[Faults(seed=seed).strikes(0.3, "busy", number) for number in range(50)] for seed in (0, 1)]
    assert struck[0] != struck[1]
    assert all(5 <= sum(row) <= 25 for row in struck)
    assert [Faults().strikes(share, "busy", 1) for share in (0.0, 1.0)] == [False, True]


def test_forms_may_be_refused() -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}
    form = {"type": "json_schema", "json_schema": {"name": "rubric", "schema": {}}}
    with rule_server(replace(NONE, refuses_forms=True)) as url:
        answers = [
            httpx2.post(f"{url}/chat/completions", json=one)
            for one in (body, {**body, "response_format": form})
        ]
    assert [answer.status_code for answer in answers] == [200, 400]


# --- the command


def test_the_command_serves_until_it_is_stopped() -> None:
    code = "from reflux.cli.main import main; main()"
    arguments = ["serve-oracle", "--port", "0", "task.kind=chains", "faults.fenced=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        question = next(Chains().prompts("train", 0))
        text = asked(url, question.messages[0]["content"])
        assert text == question.references[0]
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("steps=3", "write a setting as task.KEY=VALUE"),
        ("faults.buzy=0.2", "did you mean 'busy'"),
        ("faults.busy=2", "less than or equal to 1"),
        ("task.kind=gsm8k", "cannot be solved by rule"),
        ("--host 192.0.2.1", "cannot be listened on"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from reflux.cli.main import main

    before, sys.argv = sys.argv, ["reflux", "serve-oracle", *arguments.split()]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_recipe_whose_task_cannot_be_solved_is_refused() -> None:
    from reflux.config.registry import build

    part = build("endpoints", {"kind": "local"}, "judge")
    assert list(part.refusals("judge", load_recipe("rl"))) == []
    (reason,) = part.refusals("judge", load_recipe("rl", {"task.kind": "gsm8k"}))
    assert "gsm8k" in reason
