"""The rewards rubric and judge over real HTTP: what they ask, what they make of the answers, and what a
failure means.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from fake_chat import FakeChat, Reply, chatting, refused
from reflux.config.recipe import load_recipe
from reflux.config.registry import build
from reflux.engines.endpoints import base as endpoints
from reflux.errors import ConfigError, DataError, ServerError
from reflux.rewards.base import refuse_unjudged
from reflux.rewards.chat_prompts import SHIPPED
from reflux.rewards.marked import read_marked
from reflux.rewards.oracle import rules
from reflux.rewards.rubric import weighted_score
from reflux.rewards.rubric_engine import pool
from reflux.tasks.word_problems import WordProblems
from reflux.types import Attempt, Prompt, Reward

TASK = WordProblems()
RIGHT = "Start: 12. 12+7=19. 19-5=14. Answer: 14"
WRONG = "Start: 12. 12+7=20. 20-5=15. Answer: 15"
BRIEF = "Answer: 14"
PROMPT = Prompt(
    "p",
    ({"role": "user", "content": "Tom has 12 apples. Buys 7. Loses 5. How many?"},),
    "14",
    references=(RIGHT, f"So {RIGHT}", RIGHT, BRIEF),
)
HONEST = {"wrong_references": 0.0}


def group(*texts: str, prompt: Prompt = PROMPT, finish: Any = "stop") -> list[Attempt]:
    return [
        Attempt(replace(tiny.rollout(3, sample=sample, finish=finish), prompt=prompt, text=text))
        for sample, text in enumerate(texts)
    ]


class Asked:
    """Opens a reward, lets it judge groups, and keeps what it counted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.usage: dict[str, Any] = {}

    def __call__(self, part: Any, *groups: list[Attempt]) -> list[list[Reward]]:
        async def inside() -> list[list[Reward]]:
            with closing(tiny.services()) as services:
                context = tiny.context(task=TASK, folder=self.folder)
                async with part.open(context, services) as reward:
                    found = await asyncio.gather(*(reward.score(one) for one in groups))
                self.usage = services.usage.take()
            return list(found)

        return asyncio.run(inside())


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path / "part")


def local(**faults: Any) -> dict[str, Any]:
    return {"kind": "local", "faults": {**HONEST, **faults}}


def rubric(judge: dict[str, Any] | None = None, **fields: Any) -> Any:
    return build("rewards", {"kind": "rubric", "judge": judge or local(), **fields}, "rewards.rubric")


def values(rewards: list[Reward]) -> list[float | None]:
    return [reward.value for reward in rewards]


# --- what comes out


def test_a_rubric_for_each_attempt_is_that_of_a_group_of_one(asked: Asked) -> None:
    """Each text is scored as if it were alone. Equal texts share a rubric. In the group the weights differ:
    a rule that most students break has 3 points instead of 2.
    """
    texts = (RIGHT, WRONG, BRIEF, WRONG)
    (found,) = asked(rubric(rubric_per="attempt"), group(*texts))
    assert asked.usage["rubric"]["requests"] == asked.usage["verdicts"]["requests"] == 3
    assert asked.usage["rubric"]["groups"] == 1
    assert found == [asked(rubric(), group(text))[0][0] for text in texts]
    assert values(found) != values(asked(rubric(), group(*texts))[0])


def test_one_failed_rubric_of_an_attempt_leaves_the_group_without_values(asked: Asked) -> None:
    (found,) = asked(rubric(local(cut_json=0.5), rubric_per="attempt"), group(RIGHT, WRONG, BRIEF, "x", "y"))
    assert values(found) == [None] * 5
    assert len({reward.error for reward in found}) == 1
    assert "cannot be used" in (found[0].error or "")


def test_the_value_is_the_share_of_points(asked: Asked) -> None:
    """Half of the students fail "true equations" and half "only given", so both keep 2 of 13 points."""
    (found,) = asked(rubric(), group(RIGHT, WRONG, BRIEF, RIGHT))
    assert values(found) == [1.0, 6 / 13, 6 / 13, 1.0]
    assert found[1].parts == {"c1": 0, "c2": 1, "c3": 0, "c4": 1, "c5": 1, "references": (3 + 6 / 13) / 4}
    assert found[0].parts["references"] == found[1].parts["references"]
    assert (found[1].feedback or "").splitlines()[0] == f"no (5 points): {rules.RULES[0].text}"
    assert [line.split()[0] for line in (found[1].feedback or "").splitlines()] == [
        "no",
        "yes",
        "no",
        "yes",
        "yes",
    ]
    assert found[0] == found[3]
    assert asked.usage["rubric"]["groups"] == asked.usage["rubric"]["requests"] == 1
    assert asked.usage["verdicts"]["requests"] == 1
    assert "teacher" not in asked.usage


def test_the_teacher_may_answer_during_the_run(asked: Asked) -> None:
    bare = replace(PROMPT, references=())
    (found,) = asked(rubric(teacher=local(), references=3), group(RIGHT, WRONG, prompt=bare))
    assert values(found) == [1.0, 6 / 13]
    assert asked.usage["teacher"]["requests"] == 3
    assert found[0].parts["references"] == 1.0


def test_scores_do_not_depend_on_the_order_of_attempts(asked: Asked) -> None:
    texts = [RIGHT, WRONG, BRIEF, "", "12-5=7. 7+7=14. Answer: 14", f"<think>{WRONG}</think>{RIGHT}"]
    (expected,) = asked(rubric(), group(*texts))
    by_text = dict(zip(texts, values(expected), strict=True))
    for order in itertools.islice(itertools.permutations(texts), 0, 720, 240):
        (found,) = asked(rubric(), group(*order))
        assert values(found) == [by_text[text] for text in order]
    assert by_text[texts[-1]] == 1.0
    assert by_text[""] == 0.0


@pytest.mark.parametrize("chunk", [0, 1, 2, 5])
def test_chunks_change_no_score(asked: Asked, chunk: int) -> None:
    texts = (RIGHT, WRONG, BRIEF, "Answer: 3")
    (found,) = asked(rubric(verifier_chunk=chunk), group(*texts))
    assert values(found)[0] == 1.0
    assert found == asked(rubric(), group(*texts))[0]
    assert len(set(values(found))) == 3


@pytest.mark.parametrize("fault", ["lying_score", "swapped", "fenced"])
def test_what_the_judge_adds_up_or_how_it_writes_changes_no_reward(asked: Asked, fault: str) -> None:
    texts = (RIGHT, WRONG, BRIEF)
    (expected,) = asked(rubric(), group(*texts))
    assert asked.usage["verdicts"]["sums_differ"] == 0
    (found,) = asked(rubric(local(**{fault: 1.0})), group(*texts))
    assert found == expected
    # 4 different texts are judged
    assert asked.usage["verdicts"]["sums_differ"] == (4 if fault == "lying_score" else 0)


def test_without_response_format_the_prompt_alone_says_the_form(asked: Asked) -> None:
    (expected,) = asked(rubric(), group(RIGHT, WRONG))
    assert asked(rubric(local(refuses_forms=True)), group(RIGHT, WRONG)) == [expected]


# --- what is asked


def rubric_text(points: tuple[int, ...] = (5, 1, 2, 3)) -> str:
    criteria = [
        {"criterion_id": f"c{n}", "category": "", "criterion": f"Is {n} met?", "points": p}
        for n, p in enumerate(points, start=1)
    ]
    return json.dumps({"rubrics": criteria})


def verdicts_text(*rows: str) -> str:
    answers = [
        {"answer_index": n, "judgement": [mark == "+" for mark in row]} for n, row in enumerate(rows, start=1)
    ]
    return json.dumps({"answers": answers})


def remote(fake: FakeChat, **fields: Any) -> dict[str, Any]:
    return {"kind": "openai", "url": fake.url, "model": "m", "tries": 1, **fields}


def test_the_judge_sees_texts_in_a_blind_order_and_nothing_else(asked: Asked) -> None:
    texts = ["<think>a secret</think>one", "two", "three [[end Answer 1 #x]]", "two", "four"]
    prompt = replace(PROMPT, references=("<think>hidden</think>two", "five", "one", "six"))
    script = (Reply(rubric_text()), Reply(verdicts_text("++++", "+---", "-+--", "--+-", "---+", "----")))
    with chatting(*script) as fake:
        (found,) = asked(rubric(remote(fake)), group(*texts, prompt=prompt))
    first, second = fake.bodies
    assert [first["temperature"], first["max_tokens"]] == [0.7, 8192]
    assert [second["temperature"], second["max_tokens"]] == [0.0, 4096]
    assert [body["response_format"]["json_schema"]["name"] for body in fake.bodies] == ["rubric", "verdicts"]
    seen = {entry.label: entry.text for entry in read_marked(first["messages"][0]["content"])}
    assert seen["Question"] == PROMPT.messages[0]["content"]
    assert [seen[f"Reference {n}"] for n in range(1, 5)] == ["two", "five", "one", "six"]
    assert [seen[f"Student {n}"] for n in range(1, 6)] == [
        "one",
        "two",
        "three [[end Answer 1 #x]]",
        "two",
        "four",
    ]
    shown = read_marked(second["messages"][0]["content"])
    answers = [entry.text for entry in shown if entry.label.startswith("Answer ")]
    # Every text once, in the order of digests that knows no source.
    assert sorted(answers) == sorted({"one", "two", "three [[end Answer 1 #x]]", "four", "five", "six"})
    expected = pool("p", ["two", "five", "one", "six"], ["one", "two", texts[2], "two", "four"], True)
    assert answers == [one.text for one in expected]
    text = second["messages"][0]["content"].lower()
    assert "secret" not in text + first["messages"][0]["content"]
    assert not any(word in text for word in ("student", "reference", "teacher"))
    rows = dict(zip(answers, ("++++", "+---", "-+--", "--+-", "---+", "----"), strict=True))
    scores = {text: weighted_score([5, 1, 2, 3], [mark == "+" for mark in row]) for text, row in rows.items()}
    assert values(found) == [scores["one"], scores["two"], scores[texts[2]], scores["two"], scores["four"]]


def test_the_order_is_that_of_the_digests_and_not_of_the_sources() -> None:
    rng = random.Random(0)
    first = []
    for number in range(200):
        references, students = ([f"{rng.random()}" for _ in range(4)] for _ in range(2))
        found = pool(f"p{number}", references, students, True)
        assert len(found) == 8
        assert found == pool(f"p{number}", references, students, True)
        assert found != pool(f"q{number}", references, students, True)
        first.append(found[0].source)
        shown = pool(f"p{number}", references, students, False)
        assert [one.text for one in shown] == [*references, *students]
    # Each of the eight is as likely the first: 100 are expected of either kind, with a deviation of 7.
    assert 65 <= first.count("reference") <= 135


def test_identities_may_be_shown(asked: Asked) -> None:
    script = (Reply(rubric_text()), Reply(verdicts_text("++++", "+---", "----", "++++", "++++")))
    with chatting(*script) as fake:
        (found,) = asked(rubric(remote(fake), blind=False), group("x", "y"))
    labels = [entry.label for entry in read_marked(fake.bodies[1]["messages"][0]["content"])]
    assert labels[2:] == [
        *(f"Answer {n} (reference)" for n in (1, 2, 3)),
        *(f"Answer {n} (student)" for n in (4, 5)),
    ]
    assert values(found) == [1.0, 1.0]
    assert found[0].parts["references"] == (1 + 5 / 11 + 1 + 0) / 4


def test_a_prompt_may_come_from_a_file(asked: Asked, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Own words. {{ question }} {{ rubric }} {{ answers }} {{ n_answers }}")
    script = (Reply(rubric_text()), Reply(verdicts_text(*["++++"] * 5)))
    with chatting(*script) as fake:
        asked(rubric(remote(fake), verdicts_prompt=str(own)), group("{{ n_answers }}", "y"))
    text = fake.bodies[1]["messages"][0]["content"]
    assert text.startswith("Own words. [[begin Question")
    assert text.endswith(" 5")
    # What a model wrote is no template.
    assert "{{ n_answers }}" in text
    own.write_text("{{ question }} {{ answers }}")
    with pytest.raises(DataError, match=r"leaves out \{\{ rubric \}\}"):
        rubric(verdicts_prompt=str(own)).inputs("rewards.rubric")
    own.write_text("{{ question")
    for path in (own, tmp_path / "none.txt"):
        with pytest.raises(DataError, match="cannot be read"):
            rubric(rubric_prompt=str(path)).inputs("rewards.rubric")
    assert {path.stem for path in SHIPPED.iterdir()} == {"rubric", "verdicts", "score", "preference"}


# --- failures


FAILURES = {
    "no rubric": [refused(500)],
    "no verdicts": [Reply(rubric_text()), refused(500)],
    "refused": [refused(403)],
    "three bad rubrics": [Reply("no"), Reply(rubric_text((6, 1, 1, 1))), Reply(rubric_text((1, 1)))],
    "two bad verdicts": [Reply(rubric_text()), Reply("no"), Reply(verdicts_text("++++"))],
    "cut rubrics": [Reply(rubric_text(), finish="length")] * 3,
}


@pytest.mark.parametrize("script", FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_the_whole_group_without_a_value(asked: Asked, script: list[Reply]) -> None:
    with chatting(*script, otherwise=Reply(rubric_text())) as fake:
        (found,) = asked(rubric(remote(fake, structured="text")), group("x", "y", "z"))
        assert len(fake.bodies) == len(script)
    assert values(found) == [None] * 3
    assert len({reward.error for reward in found}) == 1
    assert (found[0].error or "").startswith("the group was not judged: ")
    assert asked.usage["rubric"]["groups_failed"] == asked.usage["rubric"]["groups"] == 1


def test_tries_within_the_limit_are_enough(asked: Asked) -> None:
    script = [
        Reply("no"),
        Reply("no"),
        Reply(rubric_text()),
        Reply("no"),
        Reply(verdicts_text(*["++++"] * 5)),
    ]
    with chatting(*script) as fake:
        (found,) = asked(rubric(remote(fake)), group("x", "y"))
    assert values(found) == [1.0, 1.0]
    assert (asked.usage["rubric"]["invalid"], asked.usage["verdicts"]["invalid"]) == (2, 1)


def test_one_failed_chunk_leaves_the_whole_group_without_a_value(asked: Asked) -> None:
    script = [Reply(rubric_text()), Reply(verdicts_text("++++")), refused(500)]
    with chatting(*script, otherwise=Reply(verdicts_text("++++"))) as fake:
        part = rubric(remote(fake, concurrency=1), verifier_chunk=1)
        (found,) = asked(part, group("x", "y"))
    assert values(found) == [None, None]


def test_attempts_that_did_not_end_are_not_judged(asked: Asked) -> None:
    mixed = [*group(RIGHT), *group("no matter", finish="error"), *group(WRONG), *group("x", finish="timeout")]
    (found,) = asked(rubric(), mixed)
    assert values(found) == [1.0, None, 6 / 13, None]
    assert [found[1].error, found[3].error] == ["sampling ended in an error", "the environment took too long"]
    (nothing,) = asked(rubric(), group("x", "y", finish="error"))
    assert values(nothing) == [None, None]
    assert asked.usage == {"rubric": {"groups": 1}}


def with_reward(value: float | None, error: str | None = None, finish: Any = "stop") -> list[Attempt]:
    found = group("x", "y", finish=finish)
    for attempt in found:
        attempt.reward = Reward(value, error=error)
    return found


def test_too_many_unjudged_groups_stop_the_run_with_their_reasons() -> None:
    rewards = {
        "rubric": rubric(max_failed_share=0.4),
        "verifier": build("rewards", {"kind": "verifier"}, "r"),
    }
    judged, lost, other = with_reward(0.5), with_reward(None, "no answer"), with_reward(None, "cut")
    refuse_unjudged([judged] * 3 + [lost] * 2, rewards)
    with pytest.raises(ServerError) as stopped:
        refuse_unjudged([judged, judged, lost, other, lost], rewards)
    assert str(stopped.value).startswith("3 of the 5 groups of this step could not be judged")
    assert str(stopped.value).endswith("\n  2 x no answer\n  1 x cut")
    # Without such a reward, or where sampling failed, nothing is stopped.
    refuse_unjudged([lost] * 5, {"verifier": rewards["verifier"]})
    refuse_unjudged([lost] * 5, {})
    refuse_unjudged([with_reward(None, "sampling failed", "error")] * 5, rewards)


# --- refusals of recipes


def test_what_cannot_work_is_refused() -> None:
    cfg = load_recipe("rubric")
    assert list(rubric().refusals("r", cfg)) == []
    (alone,) = rubric().refusals("r", load_recipe("rubric", {"group_size": 1, "credit": "none"}))
    assert "group_size >= 2" in alone
    (images,) = rubric().refusals("r", load_recipe("flow_grpo"))
    assert "images" in images
    (single,) = rubric(references=1).advice("r", cfg)
    assert "references = 1" in single
    assert list(rubric().advice("r", cfg)) == []
    pairwise = build("rewards", {"kind": "judge", "judge": local(), "mode": "pairwise"}, "r")
    assert [
        "group_size >= 2" in text for text in pairwise.refusals("r", load_recipe("rubric", {"group_size": 1}))
    ] == [True]


def test_an_endpoint_that_cannot_be_asked_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_recipe("rubric")
    table = {"kind": "openai", "url": "http://h/v1", "model": "m", "key_variable": "REFLUX_TEST_KEY"}
    good = build("endpoints", table, "e")
    assert list(good.refusals("e", cfg)) == []
    for url in ("h:1", "http://me:secret@h/v1"):
        (reason,) = build("endpoints", {**table, "url": url}, "e").refusals("e", cfg)
        assert reason.startswith("e.url: ")
        assert "secret" not in reason
    monkeypatch.delenv("REFLUX_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"e.key_variable: .* REFLUX_TEST_KEY"):
        good.inputs("e")
    monkeypatch.setenv("REFLUX_TEST_KEY", "k")
    good.inputs("e")
    monkeypatch.setattr(endpoints, "find_spec", lambda name: None if name == "stamina" else name)
    for part in (good, build("endpoints", local(), "e")):
        (reason,) = part.refusals("e", cfg)
        assert "the packages stamina are not installed" in reason
        assert "reflux[chat]" in reason


# --- judge


def judging(judge: dict[str, Any], **fields: Any) -> Any:
    return build("rewards", {"kind": "judge", "judge": judge, **fields}, "rewards.judge")


def test_a_judge_scores_each_text_once(asked: Asked) -> None:
    (found,) = asked(judging(local()), group(RIGHT, WRONG, RIGHT, f"<think>x</think>{RIGHT}"))
    assert values(found) == [1.0, 0.5, 1.0, 1.0]
    assert asked.usage["judge"]["requests"] == 2


def test_pairs_are_compared_in_both_orders(asked: Asked) -> None:
    (found,) = asked(judging(local(), mode="pairwise"), group(RIGHT, WRONG, BRIEF, RIGHT))
    # RIGHT beats both others and ties with its copy; WRONG and BRIEF have equal shares of points.
    assert values(found) == [
        pytest.approx(5 / 6),
        pytest.approx(1 / 6),
        pytest.approx(1 / 6),
        pytest.approx(5 / 6),
    ]
    assert [reward.parts for reward in found] == [{"orders_differ": 0.0}] * 4
    assert asked.usage["judge"]["requests"] == 6
    assert values(asked(judging(local(), mode="pairwise"), group(RIGHT, RIGHT))[0]) == [0.5, 0.5]


def test_a_judge_that_prefers_the_first_place_says_nothing(asked: Asked) -> None:
    with chatting(otherwise=Reply('{"better": "first"}')) as fake:
        (found,) = asked(judging(remote(fake), mode="pairwise"), group("x", "y", "z"))
    assert values(found) == [0.5] * 3
    assert found[0].parts == {"orders_differ": 1.0}
    assert len(fake.bodies) == 6
    shown = [tuple(e.text for e in read_marked(b["messages"][0]["content"])[1:]) for b in fake.bodies]
    assert sorted(shown) == sorted(itertools.permutations("xyz", 2))


def test_a_failed_judge_leaves_the_whole_group_without_a_value(asked: Asked) -> None:
    with chatting(Reply('{"score": 3}'), Reply("3"), otherwise=Reply('{"score": "3"}')) as fake:
        (found,) = asked(judging(remote(fake, concurrency=1)), group("x", "y"))
    assert values(found) == [None, None]
    assert asked.usage["judge"]["groups_failed"] == 1
