"""What does not fit is refused in a sentence with its remedy, before anything is loaded; what is wanted is
joined.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from reflux import checks
from reflux.config.bases import recipe_names
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.errors import ConfigError, ModelError
from reflux.training import Options, Run

OUTCOME = {"credit.group_advantage": {}, "rewards": {"verifier": {}}, "group_size": 2}
# a teacher that gives a list and no more
SAID = {"teacher": "behaviour"}
ILLEGAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "train_max_tokens below 1": (
        "opd",
        {"sampler.train_max_tokens": {"kind": "linear", "start": 6, "increment": -1}, "steps": 9},
        "sampler: the limit of an attempt of step 6 is below 1 position",
    ),
    "a prefix that runs out": (
        "opd",
        {"credit.prefix": {"length": {"kind": "linear", "start": 2, "increment": -1}}, "steps": 3},
        "credit.prefix.length falls below 1 position at step 2. End the schedule at 1 or more",
    ),
    "a weight below 0": (
        "opd",
        {"credit.position": {"weight": {"kind": "linear", "start": 1, "increment": -0.5}}},
        "credit.position.weight is -0.5 at position 3; a weight must be >= 0. Set stop = 0.",
    ),
    "a negative rate": (
        "opd",
        {"learner.lr": -1.0},
        "learner.lr is -1 at step 0: it would move the student away from its teacher.",
    ),
    "a negative rate of a flow": ("flow", {"learner.lr": -1.0}, "learner.lr is -1 at step 0"),
    "more in advance than may be stale": (
        "opd",
        {"max_staleness": 1, "ahead": 2, "objectives.0.ratio": "truncated"},
        "ahead = 2 asks for attempts more steps in advance than max_staleness = 1 allows. Lower ahead",
    ),
    "a run that overlaps and must repeat": (
        "full",
        {"max_staleness": 1, "deterministic": True},
        "with max_staleness = 1 the weights of a sampled token depend on timing",
    ),
    "an empty stop text": ("opd", {"sampler.stop": ["\n\n", ""]}, "sampler: stop has an empty text"),
    "train_max_tokens 0": (
        "opd",
        {"sampler.train_max_tokens": 0},
        "sampler: the limit of an attempt of step 0 is below 1 position",
    ),
    "no such teacher": (
        "opd",
        {"objectives.0.teacher": "other"},
        "objectives[0].teacher: there is no teacher 'other'. Known: main",
    ),
    "no teacher at all": ("opd", {"teachers.main": "none"}, "Add a [teachers.main] table."),
    "a divergence of what was said": (
        "full",
        {"objectives.0.teacher": "behaviour"},
        "objectives[0]: divergence needs hidden states (the full distribution), but teacher 'behaviour' "
        "offers",
    ),
    "shifts nobody takes": (
        "full",
        OUTCOME,
        "credit.group_advantage sets advantage offsets, but no objective uses them: 'divergence'",
    ),
    "outcome without shifts": (
        "opd",
        {"objectives": [{"kind": "policy_gradient"}]},
        "learns only from advantage offsets, and no credit rule sets any",
    ),
    "a group of one": (
        "rl",
        {"group_size": 1},
        "credit.group_advantage compares the attempts at one prompt, so it needs group_size >= 2, got 1",
    ),
    "no verdicts": (
        "rl",
        {"rewards": "none"},
        "credit.group_advantage needs rewards. Add [rewards.verifier]",
    ),
    "temperature": (
        "opd",
        {"sampler.temperature": 0.7},
        "make on-policy estimators biased. Use 1 and 1, or set sampler.allow_biased = true",
    ),
    "bit for bit as it comes": (
        "opd",
        {"deterministic": True, "sampler.turns": "ready"},
        "deterministic = true requires a run that repeats bit for bit, but sampler 'hf' with these settings "
        'depends on timing. Use kind "hf" with turns = "together"',
    ),
    "top_p": ("opd", {"sampler.top_p": 0.9}, "top_p = 0.9"),
    "policy gradient on given answers": (
        "sft",
        {"objectives": [{"kind": "policy_gradient"}], **OUTCOME},
        "needs attempts that the student sampled",
    ),
    "no ratio with staleness": (
        "opd",
        {"objectives.0.ratio": "none", "max_staleness": 1},
        'ratio = "none" is biased on attempts of an older student',
    ),
    "nll on own attempts": (
        "opd",
        {"objectives": [{"kind": "nll"}]},
        "has an expected gradient of zero. Use sampler 'references'",
    ),
    "prefix on given answers": (
        "sft",
        {"credit.prefix": {"length": 5}},
        "cutting answers that the student did not write",
    ),
    "a ratio of a divergence on given answers": (
        "sft",
        {
            "objectives": [{"kind": "divergence", "ratio": "truncated"}],
            "teachers.main": {"kind": "local", "model": "m"},
        },
        "divides by the probability with which the sampler drew a token, but sampler 'references' gives "
        "answers that it did not draw",
    ),
    "siblings of an only child": (
        "opd",
        {"objectives.0.baseline": "leave_one_out"},
        'baseline = "leave_one_out" compares attempts at one prompt: it needs group_size >= 2, got 1. Raise '
        "group_size",
    ),
    "a group mean of one": (
        "opd",
        {"objectives.0.baseline": "group_mean", "group_size": 1},
        "it needs group_size >= 2",
    ),
    **{
        f"support {support} of a list": (
            "full",
            {"objectives": [{"kind": "divergence", "support": support, **SAID}]},
            f'divergence with support = "{support}" needs hidden states (the full distribution){other}, but '
            "teacher 'behaviour' offers",
        )
        for support, other in (
            ("student", " or log-probs at the student's most likely tokens"),
            ("union", ""),
        )
    },
    "the remedy for a list": (
        "full",
        {"objectives": [{"kind": "divergence", **SAID}]},
        'Use support = "teacher" where the teacher gives a list',
    ),
    **{
        f"baseline {baseline} of a list": (
            "opd",
            {"objectives": [{"kind": "sampled_kl", "baseline": baseline, **SAID}]},
            f'sampled_kl with baseline = "{baseline}" needs hidden states (the full distribution), but '
            "teacher 'behaviour' offers",
        )
        for baseline in ("kl", "topk_kl", "minimum_variance")
    },
    "the remedy for log-probs": (
        "opd",
        {"objectives": [{"kind": "sampled_kl", "baseline": "kl", **SAID}]},
        'Use baseline = "none", or "leave_one_out" in groups, or a local teacher.',
    ),
    "variance of nothing sampled": (
        "full",
        {"log_variance": True},
        'no objective has one. Use kind = "sampled_kl"',
    ),
    "variance against a list": (
        "opd",
        {"log_variance": True, "objectives": [{"kind": "sampled_kl"}, {"kind": "sampled_kl", **SAID}]},
        "objectives[1] has the teacher 'behaviour', which does not offer it. Use a local teacher, or "
        "log_variance "
        "= false",
    ),
    "two teachers of one name": (
        "opd",
        {"teachers.other": {"kind": "local", "model": "m", "alias": "main", "routes": ["a"]}},
        "share the alias 'main', so each needs its own routes",
    ),
    "one route twice": (
        "opd",
        {
            "teachers.main.routes": ["a"],
            "teachers.other": {"kind": "local", "model": "m", "alias": "main", "routes": ["a"]},
        },
        "no route may belong to two of them",
    ),
}


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        checks.join(
            load_recipe("rl", {"group_size": 1, "sampler.temperature": 0.5, "sampler.train_max_tokens": 0})
        )
    assert all(
        words in str(refused.value) for words in ("group_size >= 2", "temperature", "below 1 position")
    )


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_shipped_recipes_fit(recipe: str) -> None:
    requirements = checks.join(load_recipe(recipe))
    assert requirements.reward == (
        recipe in ("rl", "rl_opd", "uni_opd", "peers", "everything", "flow_grpo", "rubric", "gad", "opdvr")
    )


def test_biased_sampling_may_be_asked_for() -> None:
    """And what the ratio then does is said, where it corrects nothing, or is held back by its bound."""
    biased = {"sampler.temperature": 0.7, "sampler.allow_biased": True}
    cfg = load_recipe("opd", biased)
    checks.join(cfg)
    assert checks.warnings(cfg) == []
    cases = {
        "none": 'ratio = "none" does not correct for attempts drawn at temperature = 0.7 and top_p = 1;',
        "clip": "removes the gradient of many tokens",
    }
    for ratio, words in cases.items():
        (warning,) = checks.warnings(load_recipe("opd", {**biased, "objectives.0.ratio": ratio}))
        assert words in warning
        assert checks.warnings(load_recipe("opd", {"objectives.0.ratio": ratio})) == []
    (warning,) = checks.warnings(load_recipe("rl", {**biased, "objectives.0.ratio": "none"}))
    assert 'ratio = "clip" does' in warning


@pytest.mark.parametrize(
    "baseline", ["none", "kl", "topk_kl", "minimum_variance", "group_mean", "leave_one_out"]
)
def test_every_baseline_fits_a_local_teacher_and_groups_ask_for_log_probs(baseline: str) -> None:
    requirements = checks.join(
        load_recipe("opd", {"objectives.0.baseline": baseline, "group_size": 2, "log_variance": True})
    )
    assert requirements.logp == (baseline in ("group_mean", "leave_one_out"))


def test_a_list_is_enough_for_what_says_so() -> None:
    listed = [
        {"kind": "divergence", "support": "teacher", "k": 7, **SAID},
        {"kind": "sampled_kl", "baseline": "leave_one_out", **SAID},
    ]
    assert checks.join(
        load_recipe("opd", {"objectives": listed, "group_size": 2, "max_staleness": 1})
    ) == Requirements(behaviour=7, logp=True)


def test_wants_join_and_the_largest_k_wins() -> None:
    joined = (
        Requirements(behaviour=4, logp=True)
        | Requirements(behaviour=9, now_topk=3)
        | Requirements(candidates=2, now_candidates=5, now_at_behaviour=True, reward=True)
    )
    assert joined == Requirements(
        behaviour=9, now_at_behaviour=True, now_topk=3, logp=True, candidates=2, now_candidates=5, reward=True
    )
    assert joined | Requirements(now_candidates=6, now_topk=2) == dataclasses.replace(
        joined, now_candidates=6
    )


@pytest.mark.parametrize(
    ("recipe", "changes", "field"),
    [
        ("full", {"objectives.0.k": 5}, "k has no effect with support = 'full'"),
        ("topk", {"objectives.0.ratio_cap": 2.0}, "ratio_cap has no effect with ratio = 'none'"),
        ("opd", {"objectives.0.baseline_k": 5}, "baseline_k has no effect with baseline = 'none'"),
        (
            "opd",
            {"objectives.0.ratio": "clip", "objectives.0.ratio_cap": 3.0},
            "ratio_cap has no effect with ratio = 'clip'",
        ),
        ("vopd", {"objectives.0.clip": [0.1, 0.1]}, "clip has no effect with ratio = 'truncated'"),
    ],
)
def test_a_field_that_does_nothing_is_named(recipe: str, changes: dict[str, Any], field: str) -> None:
    (warning,) = checks.warnings(load_recipe(recipe, changes))
    assert warning == f"objectives[0].{field}."


def test_warnings_name_what_is_seldom_meant() -> None:
    unheard = load_recipe("full", {"teachers.other": {"kind": "local", "model": "m"}})
    assert "teachers.other scores attempts, but no objective uses it" in checks.warnings(unheard)[0]
    cut = load_recipe("rl", {"sampler.train_max_tokens": {"kind": "linear", "start": 8, "increment": 1}})
    assert any("unfinished answers" in text for text in checks.warnings(cut))
    for ahead in (None, 0, 1):
        pipeline = load_recipe("full", {"max_staleness": 2, **({} if ahead is None else {"ahead": ahead})})
        assert any("ahead = 0" in text for text in checks.warnings(pipeline)) == (ahead == 0)
    assert all(
        checks.warnings(load_recipe(name)) == []
        for name in recipe_names()
        if name not in ("rl", "rl_opd", "prefix", "rubric")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objectives": [{"kind": "sampled_kl", "baseline": "group_mean"}], "group_size": 2},
            '"leave_one_out" does not',
        ),
        (
            {"objectives": [{"kind": "divergence", "support": "union", "tail": "renormalised"}]},
            "so the optimum moves",
        ),
        ({"objectives": [{"kind": "divergence", "ratio": "truncated"}]}, "1 up to rounding"),
        ({"objectives": [{"kind": "divergence"}, {"kind": "sampled_kl", **SAID}]}, "learns nothing from it"),
    ],
)
def test_what_the_menu_offers_but_is_seldom_meant_is_a_warning(changes: dict[str, Any], words: str) -> None:
    cfg = load_recipe("full", changes)
    checks.join(cfg)
    (warning,) = checks.warnings(cfg)
    assert warning.startswith("objectives[")
    assert words in warning
    if "teaches nothing" in words or "rounding" in words:
        assert checks.warnings(load_recipe("full", changes | {"max_staleness": 1})) == []


@pytest.mark.parametrize("where", ["learner.model", "teachers.main.model"])
def test_a_missing_model_folder_leaves_no_run_behind(where: str, tmp_path: Path) -> None:
    cfg = load_recipe("opd", {where: str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match=f"{where}: the folder .* does not exist"):
        Run.open(cfg, checks.join(cfg), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- the methods that weigh attempts and tokens

REWARD = {"rewards": {"verifier": {}}}
UNI = {"group_size": 4, **REWARD}
JUMPS = {"kind": "extrapolate", "score": "minus_kl"}
ILLEGAL |= {
    "release under kept": (
        "release",
        {"loss_aggregation": "token-mean-weighted"},
        'the release would count twice. Use loss_aggregation = "token-mean" or "seq-mean-token-mean"',
    ),
    "release of nobody": (
        "release",
        {"credit.release.teacher": "mian"},
        "credit.release.teacher: there is no teacher 'mian'. Known: main",
    ),
    "release against oneself": (
        "release",
        {"credit.release.teacher": "behaviour"},
        "credit.release.teacher: there is no teacher 'behaviour'",
    ),
    "release without ids": (
        "release",
        {"teachers.main": {"kind": "outside:ListTeacher"}},
        "teachers.main gives a list of its own most likely tokens, and the probability of a token outside "
        "that list is unknown",
    ),
    "release of given answers": (
        "sft",
        {
            "credit.release": {"segments": 4, "teacher": "main"},
            "teachers": {"main": {"kind": "local", "model": "m"}},
            "loss_aggregation": "token-mean",
        },
        "answers that the student did not write. Use candidates = \"now\", or sampler 'hf'",
    ),
    "margin in groups of one": (
        "opd",
        {"credit.margin": {}, **REWARD},
        "credit.margin compares the attempts at one prompt, so it needs group_size >= 2",
    ),
    "margin without verdicts": (
        "opd",
        {"credit.margin": {}, "group_size": 4},
        "credit.margin needs rewards. Add [rewards.verifier]",
    ),
    "margin nobody takes": (
        "full",
        {"credit.margin": {}, **UNI},
        "credit.margin sets advantage offsets, but no objective uses them",
    ),
    "margin of nobody": (
        "opd",
        {"credit.margin": {"teacher": "x"}, **UNI},
        "credit.margin.teacher: there is no teacher 'x'. Known: main",
    ),
    "two kinds of margin": (
        "uni_opd",
        {"credit.other": {"kind": "margin", "action": "mask"}},
        "credit.margin and credit.other: one margin rule uses shifts and another masks",
    ),
    "balance without verdicts": (
        "opd",
        {"credit.balance": {}, "group_size": 4},
        "credit.balance needs rewards",
    ),
    "balance in groups of one": (
        "opd",
        {"credit.balance": {}, **REWARD},
        "credit.balance compares the attempts at one prompt",
    ),
    "discrepancy of nobody": (
        "opd",
        {"credit.discrepancy": {"teacher": "x"}},
        "credit.discrepancy.teacher: there is no teacher 'x'. Known: main",
    ),
    "discrepancy of the answers of others": (
        "sft",
        {"credit.discrepancy": {}},
        "credit.discrepancy compares the teacher with the log-probs of the student that sampled",
    ),
    "a gate without verdicts": ("opd", {"credit.sign_gate": {}}, "credit.sign_gate needs rewards"),
    "a gate on the answers of others": (
        "sft",
        {"credit.sign_gate": {}, **REWARD},
        "credit.sign_gate compares the teacher with the log-probs of the student that sampled",
    ),
    "unlikely tokens of images": (
        "flow_grpo",
        {"credit.unlikely": {}},
        "credit.unlikely compares the probabilities of tokens, and images have none",
    ),
    "unlikely tokens of others": (
        "sft",
        {"credit.unlikely": {}},
        "credit.unlikely reads the probabilities with which the student sampled",
    ),
    "peers in groups of one": (
        "peers",
        {"group_size": 1},
        "teachers.main.context needs at least 2 attempts per prompt, but group_size is 1",
    ),
    "peers without verdicts": (
        "peers",
        {"rewards": "none"},
        "teachers.main.context sorts attempts by their rewards. Add [rewards.verifier]",
    ),
    "a moving teacher under staleness": ("peers", {"max_staleness": 1}, "teachers.main follows the student"),
    "an unserved route": (
        "uni_opd",
        {"task.parts.mul": {"kind": "gsm8k", "route": "maths"}},
        "prompts of the route 'maths', but the teachers that objectives use serve only add, mul. Add "
        "that route to the `routes` of a teacher",
    ),
    "prompts without a route": (
        "opd",
        {"teachers.main.routes": ["a"], "task.kind": "gsm8k"},
        "of the route (none), but the teachers that objectives use serve only a",
    ),
    "a route of a teacher nobody hears": (
        "uni_opd",
        {"teachers.times.alias": "unheard"},
        "prompts of the route 'mul', but the teachers that objectives use serve only add",
    ),
    "agreement with nobody": (
        "opd",
        {"evals.agreement.teacher": "mian"},
        "evals.agreement.teacher: there is no teacher 'mian'. Known: main.",
    ),
    "the accuracy of nobody": (
        "uni_opd",
        {
            "teachers.times.alias": "both",
            "objectives.0.teacher": "both",
            "evals.teacher_accuracy": {"teacher": "plus"},
        },
        "must be NAME of a table [teachers.NAME], or an alias, and there is no 'plus'. "
        "Known: both, main, times.",
    ),
    "a margin against oneself": (
        "opd",
        {"credit.margin": {"teacher": "behaviour"}, **UNI},
        "there is no teacher 'behaviour'. Known: main.",
    ),
    "a level away from the teacher": (
        "uni_opd",
        {"credit.margin.level": "attempt", "objectives.1.coef": 0.5},
        'level = "attempt" subtracts the log-ratio of each token, so the loss must contain it',
    ),
    "a level without its log-ratio": (
        "rl",
        {"credit.margin": {"level": "attempt"}, "teachers": {"main": {"kind": "local", "model": "m"}}},
        "so the loss must contain it",
    ),
    "jumps scored by nobody": (
        "effopd",
        {"extrapolation": {**JUMPS, "teacher": "x"}},
        "extrapolation.teacher: there is no teacher 'x'",
    ),
    "jumps scored by a mover": (
        "peers",
        {"teachers.main": {"kind": "self"}, "extrapolation": JUMPS},
        "compares candidates with teachers.main, which follows the student. Name a teacher that does not "
        "change",
    ),
    "jumps scored without verdicts": (
        "peers",
        {"extrapolation": JUMPS},
        "gives teachers.main answers without verdicts",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_combination_is_refused_with_its_remedy(case: str) -> None:
    recipe, overrides, words = ILLEGAL[case]
    with pytest.raises(ConfigError) as refused:
        checks.join(load_recipe(recipe, overrides))
    assert words in str(refused.value)


def test_what_the_same_rules_can_do_is_let_through() -> None:
    for recipe, overrides in (
        ("release", {"loss_aggregation": "token-mean-weighted", "credit.release.rescale": False}),
        ("opd", {"credit.margin": {"action": "mask"}, **UNI}),
        ("full", {"credit.margin": {"action": "mask"}, **UNI}),
        (
            "peers",
            {
                "max_staleness": 1,
                "teachers.main": {"kind": "self", "follow": "frozen", "context": {"kind": "peers"}},
            },
        ),
        ("effopd", {"extrapolation": JUMPS}),
        ("uni_opd", {"credit.margin.level": "attempt"}),
        ("opd", {"credit.margin": {"level": "attempt"}, **UNI}),
    ):
        checks.join(load_recipe(recipe, overrides))


def test_attempts_that_do_not_fit_into_the_teachers_window_are_refused_before_a_directory_is_made() -> None:
    """The embedded reader holds 512 tokens: three attempts of 64 and an answer fit, three of 128 and an
    answer do not.
    """
    checks.inputs(load_recipe("peers"))
    with pytest.raises(
        ConfigError,
        match=r"up to 526 tokens of other .* of the teacher's model has 512\. Lower sampler\.max_tokens",
    ):
        checks.inputs(load_recipe("peers", {"sampler.max_tokens": 128}))
    checks.inputs(load_recipe("peers", {"sampler.max_tokens": 128, "teachers.main.context.peer_tokens": 60}))


def told_of_windows(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        checks.inputs(load_recipe("peers", changes))
    return str(refused.value)


def test_the_words_around_attempts_and_the_prompt_are_counted() -> None:
    """Three attempts of 100 and an answer are 400 of 512 tokens: too many with headings and question. The
    advised length just fits.
    """
    behaviour = told_of_windows({"sampler.max_tokens": 100})
    assert (
        "(the longest of the first 64), up to 442 tokens of other attempts and the text around them, and an "
        "answer of up to 100 take" in behaviour
    )
    fits = int(behaviour.split("Lower sampler.max_tokens to ")[1].split(",")[0])
    checks.inputs(load_recipe("peers", {"sampler.max_tokens": fits}))
    assert f"Lower sampler.max_tokens to {fits}," in told_of_windows({"sampler.max_tokens": fits + 1})
    assert f"Lower sampler.max_tokens to {fits}," in told_of_windows({"sampler.max_tokens": 128})
    # a limit is what prompts may take
    behaviour = told_of_windows({"sampler.max_tokens": 100, "sampler.max_prompt_tokens": 300})
    assert "a prompt of 300 tokens (sampler.max_prompt_tokens), up to 442 " in behaviour
    # the last token of an answer is not read
    assert "take 841 tokens" in behaviour
    assert behaviour.endswith(
        "teachers.main.context.peer_tokens, successes or failures, or sampler.max_prompt_tokens."
    )
    assert "Even answers of 1 token do not fit. Lower" in told_of_windows({"sampler.max_prompt_tokens": 400})
    checks.inputs(
        load_recipe(
            "peers",
            {"sampler.max_tokens": 100, "teachers.main": {"kind": "self", "context": {"kind": "same"}}},
        )
    )


def test_a_text_that_ends_every_prompt_takes_its_room_in_the_window() -> None:
    def taken(changes: dict[str, Any]) -> int:
        behaviour = told_of_windows({"sampler.max_tokens": 500, **changes})
        return int(behaviour.partition(" tokens, but the context")[0].rpartition(" ")[2])

    assert taken({"learner.prompt_suffix": "See: "}) == taken({}) + len("See: ")


@pytest.mark.parametrize("peer_tokens", [9, 4096])
def test_a_window_that_just_fits_is_exactly_what_a_teacher_reads(peer_tokens: int) -> None:
    """The longest question with attempts of the advised length, rendered: it takes as many tokens as were
    counted.
    """
    from reflux.contexts.base import retold
    from reflux.contexts.wording import with_attempts
    from reflux.models.chat.renderer import Renderer
    from reflux.models.text import load_tokenizer

    cfg = load_recipe("peers")
    behaviour = told_of_windows({"sampler.max_tokens": 500, "teachers.main.context.peer_tokens": peer_tokens})
    text = "7" * min(peer_tokens, 500)
    stream = cfg.task.prompts("train", cfg.seed)
    asked = [
        retold(next(stream).messages, lambda problem: with_attempts(problem, [text] * 2, [text]))
        for _ in range(64)
    ]
    renderer = Renderer(load_tokenizer("reflux:reader"))
    assert f"take {max(len(renderer.ids(messages)) for messages in asked) + 500 - 1} tokens" in behaviour


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        (
            "uni_opd",
            {"loss_aggregation": "token-mean-weighted"},
            'credit.balance with loss_aggregation = "token-mean-weighted"',
        ),
        (
            "uni_opd",
            {"max_staleness": 1},
            'credit.margin: student = "behaviour" compares with the student of up to 1 steps ago',
        ),
        (
            "opdvr",
            {"loss_aggregation": "token-mean-weighted"},
            'credit.sign_gate with loss_aggregation = "token-mean-weighted"',
        ),
        (
            "opdvr",
            {"rewards.verifier.weight": 2.0},
            "credit.sign_gate.threshold = 0.5 is compared with the sum",
        ),
        (
            "iw_opd",
            {"max_staleness": 2},
            'credit.discrepancy: student = "behaviour" compares with the student of up to 2 steps ago',
        ),
        ("unlikely", {"credit.unlikely.advantage": 0.2}, "makes unlikely tokens more likely"),
        (
            "rl",
            {"loss_aggregation": "token-mean-weighted", "objectives.0.count_dead_groups": False},
            "objectives[0].count_dead_groups = false has no effect",
        ),
        (
            "peers",
            {"teachers.main.context": {"kind": "same"}},
            "teachers.main follows the student and sees the same prompt",
        ),
    ],
)
def test_what_rules_and_teachers_are_seldom_meant_to_do_is_a_warning(
    recipe: str, changes: dict[str, Any], words: str
) -> None:
    assert checks.warnings(load_recipe(recipe)) == []
    assert any(words in warning for warning in checks.warnings(load_recipe(recipe, changes)))
