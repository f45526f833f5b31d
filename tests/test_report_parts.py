"""What the report is made of: reading, joining, thinning, tokens, tables. The page itself is in
test_report.py.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reflux.reports.attempts import ShownAttempt, read_attempts, spread
from reflux.reports.costs import roles_table
from reflux.reports.evals import read_evals
from reflux.reports.examples import read_pairs
from reflux.reports.foresight_charts import foresight_charts, read_spectra
from reflux.reports.formatting import visible
from reflux.reports.metrics import read_metrics, thinned
from reflux.reports.reading import number, rows
from reflux.reports.searches import read_searches, search_charts
from reflux.reports.tables import before_after, before_after_text
from reflux.reports.tokens import EDGES_NATS, level, pieces, shown_tokens
from reflux.reports.views import policy
from synthetic_run import attempt_rows, summary, write_lines

# --- reading


def test_a_cut_last_line_and_a_broken_one_are_left_out_with_a_note(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"step": \xff}\n\n{"step": 2}\n{"step": 3, "lo')
    notes: list[str] = []
    assert [row["step"] for row in rows(path, notes)] == [1, 2]
    assert any("last line is cut off" in note for note in notes)
    assert any("2 line(s)" in note and "2, 3" in note for note in notes)


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    notes: list[str] = []
    assert len(list(rows(path, notes))) == 2
    assert notes == []


def test_numbers_that_are_not_finite_become_none_with_a_note(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1.5}\n')
    notes: list[str] = []
    (row,) = rows(path, notes)
    assert [number(row[key]) for key in "abcd"] == [None, None, None, 1.5]
    assert "2 number(s) are not finite" in notes[0]


@pytest.mark.parametrize("value", [True, "1", None, [1], 10**400, math.inf])
def test_what_is_no_finite_number_is_none(value: object):
    assert number(value) is None


# --- attempts


def test_the_two_lines_of_an_attempt_are_joined_on_step_prompt_and_sample(tmp_path: Path):
    acted = [
        {"kind": "attempt", "step": s, "prompt": p, "sample": n, "text": f"{s}{p}{n}"}
        for s in (0, 1)
        for p in "ab"
        for n in (0, 1)
    ]
    learned = [{**row, "kind": "learned", "teacher_logp": {"main": [row["text"]]}} for row in reversed(acted)]
    write_lines(tmp_path / "attempts.jsonl", [*acted[:6], *learned[4:], *acted[6:], *learned[:4]])
    found = read_attempts(tmp_path / "attempts.jsonl", [])
    assert [shown.acted["text"] for shown in found] == [row["text"] for row in acted]
    assert [shown.teacher_logp for shown in found] == [[row["text"]] for row in acted]


def test_steps_that_were_learned_from_are_preferred(tmp_path: Path):
    first, second = attempt_rows(0, 0, 9), attempt_rows(1, 0, 9)
    write_lines(tmp_path / "attempts.jsonl", [*first, second[0]])
    assert [shown.acted["step"] for shown in read_attempts(tmp_path / "attempts.jsonl", [])] == [0]
    write_lines(tmp_path / "attempts.jsonl", [first[0], second[0]])
    assert [shown.acted["step"] for shown in read_attempts(tmp_path / "attempts.jsonl", [])] == [0, 1]


@pytest.mark.parametrize("steps", [0, 1, 3, 9, 10, 11, 57, 4000])
@pytest.mark.parametrize("each", [1, 2, 64])
def test_shown_attempts_are_spread_over_the_run(steps: int, each: int):
    wanted = spread(dict.fromkeys(range(steps), each), 10)
    assert sum(wanted.values()) == min(10, steps * each)
    assert all(count <= each for count in wanted.values())
    if steps:
        assert {0, steps - 1} <= {step for step, count in wanted.items() if count}
    gaps = [after - before for before, after in zip(sorted(wanted), sorted(wanted)[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_large_file_is_not_held_in_memory(tmp_path: Path):
    row = {"kind": "attempt", "prompt": "p", "sample": 0, "text": "x" * 10_000}
    write_lines(tmp_path / "attempts.jsonl", [{**row, "step": step} for step in range(1000)])
    tracemalloc.start()
    assert len(read_attempts(tmp_path / "attempts.jsonl", [])) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * (tmp_path / "attempts.jsonl").stat().st_size


# --- tokens


def byte_level() -> Tokenizer:
    """One token a byte, written in the letters of byte-level tokenizers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["aé b", "€", "é", "日本", "👍!", "\n "])
def test_a_byte_inside_a_character_is_shown_as_its_byte_and_the_character_whole(text: str):
    tokenizer = byte_level()
    expected = []
    for char in text:
        *inside, _ = char.encode()
        expected += [f"⟨0x{byte:02X}⟩" for byte in inside] + [char]
    assert pieces(tokenizer.encode(text).ids, tokenizer) == expected


def test_bytes_that_never_become_a_character_and_ids_out_of_the_vocabulary_are_shown():
    tokenizer = byte_level()
    cut = tokenizer.encode("é").ids[:1]
    assert pieces(cut, tokenizer) == ["⟨0xC3⟩"]
    assert pieces([*cut, *tokenizer.encode("a").ids], tokenizer) == ["⟨0xC3⟩", "a"]
    assert pieces([999_999, -1, 2**40], tokenizer) == ["⟨id 999999⟩", "⟨id -1⟩", f"⟨id {2**40}⟩"]


def test_bytes_of_sentencepiece_that_never_become_a_character_are_shown():
    raw = Tokenizer(
        models.BPE({"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "a": 3, "▁b": 4}, [], byte_fallback=True)
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for ids in ([1, 2, 3, 4], [1, 2, 2, 1, 3], [3, 1, 2, 2, 1, 2, 4, 3]):
        shown = pieces(ids, raw)
        assert len(shown) == len(ids)
        letters = [piece.strip() for piece, token in zip(shown, ids, strict=True) if token in (3, 4)]
        assert [piece[-1] for piece in letters] == [
            "a" if token == 3 else "b" for token in ids if token in (3, 4)
        ]


def test_the_colour_is_teacher_minus_student():
    tokenizer = byte_level()
    ids = tokenizer.encode("abcde").ids
    acted = {"tokens": ids, "mask": [1, 1, 1, True, 0], "logp": [-2.0, -0.5, -1.0, -1.0, 0.0]}
    learned = {
        "teacher_logp": {"main": [-0.5, -2.0, -1.05, None, -9.0]},
        "weight": [1.0, 0.5],
        "advantage_offset": [-0.25],
    }
    tokens, tail, between = shown_tokens(ShownAttempt(acted, learned), tokenizer)
    assert [token.css for token in tokens] == ["p3", "n3", "p0", "unknown", "given"]
    assert (tail, between) == ([], 0)
    assert "student log p −2.000 nats (13.5 %)" in tokens[0].words
    assert "teacher log q −0.500 nats (60.7 %)" in tokens[0].words
    assert "log q − log p +1.500 nats" in tokens[0].words
    assert "weight 1" in tokens[0].words
    assert "advantage offset −0.250 nats" in tokens[0].words
    assert "log q − log p −1.500 nats" in tokens[1].words
    assert "weight 0.5" in tokens[1].words
    assert "advantage offset" not in tokens[1].words
    assert f"token {ids[0]}, position 0" in tokens[0].words


def test_what_the_student_said_when_it_learned_goes_before_what_it_said_when_it_acted():
    acted = {"tokens": [0], "mask": [1], "logp": [-2.0]}
    (token,), _, _ = shown_tokens(
        ShownAttempt(acted, {"teacher_logp": {"other": [-1.0]}, "student_logp": [-1.0]}), byte_level()
    )
    assert token.css == "p0"


def test_the_scale_is_symmetric_and_deepens_at_its_edges():
    for depth, edge in enumerate(EDGES_NATS, 1):
        assert (level(edge), level(-edge)) == (depth, -depth)
        assert (level(edge - 1e-9), level(1e-9 - edge)) == (depth - 1, 1 - depth)


def test_of_a_long_attempt_the_two_ends_are_shown_at_their_own_positions():
    acted = {"tokens": [5] * 3000, "mask": [1] * 3000, "logp": [-0.001 * index for index in range(3000)]}
    head, tail, between = shown_tokens(ShownAttempt(acted), byte_level())
    assert len(head) + len(tail) + between == 3000
    assert len(head) + len(tail) <= 1000
    assert "position 2999" in tail[-1].words
    assert "−2.999 nats" in tail[-1].words
    assert f"position {3000 - len(tail)}" in tail[0].words


def test_characters_that_act_are_made_visible_and_letters_are_left_alone():
    assert (
        visible("a\u202eb\u2066\x00\x1b\ud800\u200b\u2028")
        == "a⟨U+202E⟩b⟨U+2066⟩⟨U+0000⟩⟨U+001B⟩⟨U+D800⟩⟨U+200B⟩⟨U+2028⟩"
    )
    for text in ("日本語\n\tعربي", "👩\u200d🔬", "क्\u200dष"):
        assert visible(text) == text


# --- numbers


def test_thinning_keeps_the_mean_and_the_order():
    step = list(range(1, 1201))
    at, values = thinned(step, [float(value) for value in step], 300)
    assert len(at) == 300
    assert at == values == sorted(at)
    assert math.isclose(sum(at) / 300, sum(step) / 1200)
    assert thinned([1, 2, 3], [0.5, None, 0.7]) == ([1.0, 3.0], [0.5, 0.7])


def test_costs_by_role_add_up_and_what_no_role_explains_is_rest():
    metrics = read_metrics(
        [
            {"step": s, "seconds": {"sample": 1, "learn": 2, "total": 4}, "flops": {"learn": 3e9}}
            for s in (1, 2)
        ]
    )
    assert roles_table(metrics) == [
        ("sample", "2.0 s", "25 %", "–", "–"),
        ("learn", "4.0 s", "50 %", "6 GFLOP", "100 %"),
        ("rest", "2.0 s", "25 %", "–", "–"),
        ("total", "8.0 s", "100 %", "6 GFLOP", "100 %"),
    ]


def test_only_the_first_and_the_last_evaluation_keep_their_texts():
    moments = read_evals(
        {"step": step, "acc": {"accuracy": 0.5, "examples": [{"text": "x"}]}} for step in range(5)
    )
    assert [bool(step_context.examples) for step_context in moments] == [True, False, False, False, True]


def test_the_table_at_the_end_of_a_run_has_every_number_in_both_forms():
    table = before_after(summary(60))
    assert [list(column.cells)[2] for column in table.columns] == [
        "teacher",
        "98.6 %",
        "97.1 to 99.3 %",
        "500 test",
    ]
    text = before_after_text(json.loads(json.dumps(summary(60))) | {"teacher_accuracy": None})
    assert "19.0 %  15.6 to 22.3 %  500 test" in text.splitlines()[1]
    assert text.splitlines()[3].split(maxsplit=1) == ["teacher", "not measured"]
    assert before_after_text({}).count("not measured") == 3


def test_what_is_measured_of_the_teacher_is_not_a_curve_of_the_student():
    (step_context,) = read_evals(
        [{"step": 0, "accuracy": {"accuracy": 0.2}, "teacher_accuracy": {"accuracy": 0.9}}]
    )
    assert step_context.teacher is not None
    assert step_context.teacher.accuracy == 0.9
    assert list(step_context.scores) == ["accuracy"]


@pytest.mark.parametrize(
    "names",
    [
        {"id": "p7", "prompt": "How many?", "verdict": 1.0},
        {"prompt": "p7", "question": "How many?", "right": 1.0},
    ],
)
def test_examples_are_paired_by_problem(names: dict[str, object]):
    lines = [
        {"step": step, "accuracy": {"accuracy": 0.5, "examples": [{**names, "text": f"{step}"}]}}
        for step in (0, 9)
    ]
    pairs, first, last = read_pairs(read_evals(lines))
    assert [
        (pair.prompt, pair.question, pair.before.text, pair.after.text, pair.after.verdict) for pair in pairs
    ] == [("p7", "How many?", "0", "9", "right")]
    assert (first, last) == (0, 9)


def test_a_bin_lies_in_the_middle_of_its_positions():
    (step_context,) = read_evals(
        [
            {
                "step": 0,
                "agreement": {"kl_nats": 0.5, "by_position": [{"position": 8, "width": 4, "kl_nats": 0.5}]},
            }
        ]
    )
    (found,) = step_context.agreements["agreement"].bins
    assert (found.middle, found.positions) == (9.5, "8 to 11")


# --- searches along the path, and the spectra of the displacement


def test_searches_show_what_was_tried_and_where_it_ended():
    lines = [
        {
            "step": 2,
            "score": "accuracy",
            "here": 0.4,
            "tried": [{"multiple": 2, "score": 0.3}],
            "accepted": 0,
            "seconds": 2.0,
        },
        {
            "step": 1,
            "score": "accuracy",
            "here": 0.2,
            "accepted": 2,
            "delta_norm": 0.125,
            "tokens": 1234,
            "seconds": 1.5,
        }
        | {"tried": [{"multiple": 2, "score": 0.35}, {"multiple": 4, "score": None}]},
        {"no step": 1},
        {"step": 4, "here": None, "tried": "damaged", "accepted": 0},
    ]
    scores, jumps = search_charts(read_searches(lines))
    assert scores.rows[0] == ("1", "0.2", "2: 0.350, 4: –", "2", "0.125", "1,234", "1.5 s")
    assert [row[:4] for row in scores.rows[1:]] == [
        ("2", "0.4", "2: 0.300", "0"),
        ("4", "–", "nothing tried", "0"),
    ]
    before, ended = scores.spec["data"]
    assert (before["x"], before["y"]) == ([1, 2], [0.2, 0.4])
    assert (ended["x"], ended["y"]) == ([1, 2], [0.35, 0.4])
    assert jumps.spec["data"][0]["y"] == [2, 0, 0]
    assert search_charts(read_searches([])) == []


def test_spectra_are_drawn_by_step_and_alignment_is_with_the_last():
    def row(step: int, **more: object) -> dict[str, object]:
        return {
            "step": step,
            "accuracy": {"accuracy": 0.5},
            "foresight": {"rho": 0.3, "spectral_norm": 0.1 * step, **more},
        }

    lines = [
        {"step": 0, "foresight": {"rho": None, "spectral_norm": None, "alignment": {}}},
        row(10, effective_rank=9.0, top_norm_ratio=0.8, alignment={}),
        row(30, effective_rank=7.0, top_norm_ratio=0.9, alignment={"10": 0.7, "20": 0.9, "x": 1.0}),
        row(20, effective_rank=8.0, top_norm_ratio=0.85, alignment={"10": 0.8}),
    ]
    norm, rank, shares = foresight_charts(read_spectra(lines))
    assert (norm.spec["data"][0]["x"], norm.spec["data"][0]["y"]) == ([10, 20, 30], [1, 2, 3])
    assert rank.rows == [("10", "9"), ("20", "8"), ("30", "7")]
    assert [line["name"] for line in shares.spec["data"]][2] == "alignment with step 30"
    assert (shares.spec["data"][2]["x"], shares.spec["data"][2]["y"]) == ([10, 20], [0.7, 0.9])
    assert ("alignment with step 30", "20", "90.0 %") in shares.rows
    assert foresight_charts(read_spectra(lines[:1])) == []


def test_the_two_distances_of_training_are_two_lines_that_say_what_they_are_of() -> None:
    """One over all positions, one over those learnt from; a run that has one shows one."""
    from reflux.reports.curves import kl_chart

    both = read_metrics(
        [{"step": step, "kl_nats": 2.0 / step, "kl_nats_trained": 1.0 / step} for step in (1, 2)]
    )
    one = read_metrics([{"step": step, "kl_nats_trained": 1.0 / step} for step in (1, 2)])
    chart = kl_chart(both, [])
    assert [(label, value) for label, _, value in chart.rows] == [
        ("training attempts", "2.0000"),
        ("training attempts", "1.0000"),
        ("training attempts, trained positions", "1.0000"),
        ("training attempts, trained positions", "0.5000"),
    ]
    assert "every generated position, estimated from the sampled tokens" in chart.caption
    assert "positions with a non-zero weight" in chart.caption
    alone = kl_chart(one, [])
    assert {label for label, _, _ in alone.rows} == {"training attempts, trained positions"}
    assert "every generated position" not in alone.caption


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, ""),
        ({"version": 4}, "policy version 4"),
        ({"version": 4, "versions": [4, 4, 6]}, "policy versions 4 to 6"),
        ({"version": 4, "versions": ["<b>", None]}, "policy version 4"),
        ({"version": "<i>"}, "policy version <i>"),
    ],
)
def test_the_policy_versions_of_an_attempt(row: dict[str, Any], said: str) -> None:
    assert policy(row) == said
