"""The default sampler: limits, ends, stops, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from device import DEVICE, here
from laws.test_own_rng import PROMPTS, ask, sampled
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError, ModelError
from reflux.runtime.weights import InMemory
from reflux.types import Prompt, TopKTarget
from tiny import END

CHAT = {"kind": "outside:Chat"}


@pytest.fixture
def run_sampler(student: str, teacher: str, tmp_path: Path) -> Callable[..., Any]:
    numbers = count()

    def act(
        prompts: list[Prompt] = PROMPTS,
        n: int = 2,
        draw: SamplingParams = SamplingParams(0, "train", 25),
        **more: Any,
    ) -> list[Any]:
        cfg = tiny.config("opd", student, teacher, task=CHAT, **more)
        groups = sampled(cfg, tmp_path / f"run{next(numbers)}", lambda acting: ask(acting, prompts, n, draw))
        return [attempt.rollout for group in groups for attempt in group]

    return act


def test_an_answer_stops_at_the_end_token_or_at_its_limit(run_sampler: Callable[..., Any]) -> None:
    rollouts = run_sampler()
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        ends = np.flatnonzero(r.tokens_T == END).tolist()
        assert ends == ([r.length - 1] if r.finish == "stop" else [])
        assert r.finish == "stop" or r.length == 25
        assert r.mask_T.all()
        assert r.text == "".join(chr_of(r.tokens_T))
        assert r.messages == (*r.prompt.messages, {"role": "assistant", "content": r.text})


def chr_of(tokens_T: np.ndarray) -> list[str]:
    from reflux.assets.characters import character_tokenizer

    tokenizer = character_tokenizer()
    return [
        token
        for token in tokenizer.convert_ids_to_tokens(tokens_T.tolist())
        if token not in tokenizer.all_special_tokens
    ]


def test_samples_are_numbered_in_their_group(run_sampler: Callable[..., Any]) -> None:
    rollouts = run_sampler(n=3)
    assert [(r.prompt.id, r.sample) for r in rollouts] == [
        (prompt.id, s) for prompt in PROMPTS for s in range(3)
    ]


def test_a_stop_text_ends_an_answer_and_is_part_of_it(run_sampler: Callable[..., Any]) -> None:
    free = run_sampler()
    stopped = run_sampler(draw=SamplingParams(0, "train", 25, stop=("e", "P")))
    seen = 0
    for whole, cut in zip(free, stopped, strict=True):
        first = min((whole.text.find(word) for word in "eP" if word in whole.text), default=None)
        if first is not None:
            assert (cut.text, cut.finish) == (whole.text[: first + 1], "stop")
            seen += 1
        else:
            assert cut.text == whole.text
    assert seen > 2


def test_a_stop_text_may_be_several_tokens_long(run_sampler: Callable[..., Any]) -> None:
    free = run_sampler()
    text = max((r.text for r in free), key=len)
    for size in (3, 10):
        word = text[5 : 5 + size]
        for whole, cut in zip(
            free, run_sampler(draw=SamplingParams(0, "train", 25, stop=(word,))), strict=True
        ):
            found = whole.text.find(word)
            assert cut.text == (whole.text if found < 0 else whole.text[: found + size])


def test_the_window_bounds_the_answer(run_sampler: Callable[..., Any]) -> None:
    """512 positions: a prompt of 505 tokens leaves 7."""
    prompt = Prompt("long", ({"role": "user", "content": "x" * 503},))
    for r in run_sampler(prompts=[prompt], n=6, draw=SamplingParams(0, "train", 100)):
        assert len(r.prompt_tokens) == 505
        assert r.length <= 7


@pytest.mark.parametrize(
    ("text", "limit"), [("x" * 600, 0), ("x" * 510, 0), ("x" * 20, 10), ("x" * 600, 600)]
)
def test_a_prompt_that_is_too_long_is_refused_in_words(
    run_sampler: Callable[..., Any], text: str, limit: int
) -> None:
    prompt = Prompt("p7", ({"role": "user", "content": text},))
    with pytest.raises(
        DataError,
        match=rf"prompt p7 has {len(text) + 2} tokens, more than the {min(limit or 511, 511)} that fit",
    ):
        run_sampler(prompts=[prompt], sampler__max_prompt_tokens=limit)


def test_or_skipped_alone(run_sampler: Callable[..., Any]) -> None:
    prompts = [Prompt("p7", ({"role": "user", "content": "x" * 600},)), *PROMPTS[:2]]
    rollouts = run_sampler(prompts=prompts, n=1, sampler__long_prompts="skip")
    assert [r.finish == "error" for r in rollouts] == [True, False, False]
    assert rollouts[0].length == 0


def test_an_empty_prompt_is_a_turn_of_no_words(run_sampler: Callable[..., Any]) -> None:
    (r,) = run_sampler(prompts=[Prompt("e", ({"role": "user", "content": ""},))], n=1)
    assert len(r.prompt_tokens) == 2


def test_what_the_student_said_is_recorded_where_it_is_wanted(
    student: str, teacher: str, tmp_path: Path
) -> None:
    """Its own top-k, at temperature 1, nothing else."""
    import asyncio
    from dataclasses import replace

    from reflux.config.requirements import Requirements
    from reflux.loop import lasting, open_parts
    from reflux.training import Options, Run

    cfg = tiny.config("opd", student, teacher, task={"kind": "outside:Chat", "replies": 1})

    async def main() -> Any:
        run = Run.open(cfg, Requirements(behaviour=4), Options(tmp_path / "run"))
        async with (
            lasting(run),
            open_parts(replace(cfg, teachers={}), run.context, run.services) as (learner, acting, *_),
        ):
            groups = await ask(acting, PROMPTS, 1, SamplingParams(0, "train", 25, temperature=0.8))
            return [group[0].rollout for group in groups], learner.model.net

    rollouts, net = asyncio.run(main())
    for r in rollouts:
        assert isinstance(r.behaviour, TopKTarget)
        ids = here(np.concatenate([r.prompt_tokens, r.tokens_T]))[None]
        with torch.no_grad():
            rows_TV = net(input_ids=ids).logits[0, len(r.prompt_tokens) - 1 : -1].cpu()
            top = rows_TV.log_softmax(-1).topk(4)
        np.testing.assert_array_equal(r.behaviour.ids_TK[r.mask_T], top.indices[r.mask_T])
        np.testing.assert_allclose(r.behaviour.logp_TK[r.mask_T], top.values[r.mask_T], atol=1e-4)
        np.testing.assert_allclose(r.behaviour.logp_T, r.logp_raw_T, atol=0)


def wanted(
    cfg: Any, folder: Path, draw: SamplingParams, prompts: list[Prompt] = PROMPTS, **requirements: Any
) -> list[Any]:
    """Rollouts of a sampler of whom this is wanted."""
    import asyncio
    from dataclasses import replace

    from reflux.config.requirements import Requirements
    from reflux.loop import lasting, open_parts
    from reflux.training import Options, Run

    async def main() -> list[Any]:
        run = Run.open(cfg, Requirements(**requirements), Options(folder))
        async with (
            lasting(run),
            open_parts(replace(cfg, teachers={}), run.context, run.services) as (_, acting, *_),
        ):
            return [attempt.rollout for group in await ask(acting, prompts, 2, draw) for attempt in group]

    return asyncio.run(main())


@pytest.mark.parametrize("replies", [0, 2])
def test_which_characters_each_token_wrote_is_recorded_where_it_is_wanted(
    student: str, teacher: str, tmp_path: Path, replies: int
) -> None:
    """The shipped tokenizer has one character a token: that one, in the turns' texts one line apart; heard
    and special tokens none.
    """
    from reflux.assets.characters import character_tokenizer

    tokenizer = character_tokenizer()
    cfg = tiny.config("opd", student, teacher, task={"kind": "outside:Chat", "replies": replies})
    rollouts = wanted(cfg, tmp_path / "with", SamplingParams(0, "train", 60), spans=True)
    assert max(len(r.messages) for r in rollouts) == 2 + 2 * replies
    for r in rollouts:
        assert r.spans_T2.shape == (r.length, 2)
        pairs = zip(r.tokens_T, r.mask_T, strict=True)
        behaviour = [
            tokenizer.decode([token], skip_special_tokens=True) if chosen else "" for token, chosen in pairs
        ]
        assert [r.text[start:end] for start, end in r.spans_T2] == behaviour
        assert (np.diff(r.spans_T2.ravel()) >= 0).all()
    plain = wanted(cfg, tmp_path / "without", SamplingParams(0, "train", 60))
    assert [r.spans_T2 for r in plain] == [None] * len(plain)
    assert [r.text for r in plain] == [r.text for r in rollouts]
    assert all(
        r.spans_T2 is None for r in wanted(cfg, tmp_path / "eval", SamplingParams(0, "eval", 60), spans=True)
    )


@pytest.mark.parametrize("replies", [0, 2])
def test_special_tokens_are_recorded_where_it_is_wanted(
    student: str, teacher: str, tmp_path: Path, replies: int
) -> None:
    """The tiny student says any token: all that decoding leaves out is special, but for the end of a turn."""
    cfg = tiny.config("opd", student, teacher, task={"kind": "outside:Chat", "replies": replies})
    rollouts = wanted(cfg, tmp_path / "with", SamplingParams(0, "train", 60), specials=True)
    tokens_T, special_T = (
        np.concatenate([getattr(r, name) for r in rollouts]) for name in ("tokens_T", "special_T")
    )
    assert special_T.dtype == bool
    assert special_T.tolist() == [token < 6 and token != END for token in tokens_T]
    assert 0 < special_T.sum() < len(special_T)
    assert END in tokens_T
    plain = wanted(cfg, tmp_path / "without", SamplingParams(0, "train", 60))
    assert [r.special_T for r in plain] == [None] * len(plain)
    assert [r.tokens_T.tolist() for r in plain] == [r.tokens_T.tolist() for r in rollouts]
    assert all(
        r.special_T is None
        for r in wanted(cfg, tmp_path / "eval", SamplingParams(0, "eval", 60), specials=True)
    )


def test_special_tokens_of_given_answers_are_recorded_where_it_is_wanted(
    student: str, teacher: str, tmp_path: Path
) -> None:
    """The character tokenizer has no token for the accent: that is its unknown token, a special one. The end
    of the answer is none.
    """
    cfg = tiny.config("sft", student, teacher, task=CHAT)
    accent = [Prompt("p", ({"role": "user", "content": "x"},), "1", ("oké",))]
    (r, *_) = wanted(cfg, tmp_path / "with", SamplingParams(0, "train", 12), accent, specials=True)
    assert (r.tokens_T[-1], r.special_T.tolist()) == (END, [False, False, True, False])
    (r, *_) = wanted(cfg, tmp_path / "without", SamplingParams(0, "train", 12), accent)
    assert r.special_T is None


def test_given_answers_have_spans_of_what_their_tokens_say(
    student: str, teacher: str, tmp_path: Path
) -> None:
    """Of the cut text, which is what the student is taught; without the wish the whole answer stays in the
    record.
    """
    cfg = tiny.config("sft", student, teacher, task=CHAT)
    for limit, text in ((12, "ok"), (1, "o")):
        (r, *_) = wanted(cfg, tmp_path / f"with{limit}", SamplingParams(0, "train", limit), spans=True)
        assert (r.text, r.spans_T2.tolist()) == (text, [[0, 1], [1, 2], [2, 2]][:limit])
        (r, *_) = wanted(cfg, tmp_path / f"without{limit}", SamplingParams(0, "train", limit))
        assert (r.text, r.spans_T2) == ("ok", None)


@pytest.mark.parametrize(
    ("more", "short"),
    [({}, True), ({"sampler__attention": "eager"}, False), ({"sampler__dtype": "bfloat16"}, False)],
)
def test_the_short_decode_step_is_taken_where_it_is_known(
    student: str, teacher: str, tmp_path: Path, more: dict[str, Any], short: bool
) -> None:
    async def script(acting: Any) -> bool:
        return acting.decoder is not None

    taken = sampled(tiny.config("opd", student, teacher, task=CHAT, **more), tmp_path / "run", script)
    assert taken == (short and DEVICE == "cpu")


def test_publishing_waits_for_the_call_in_progress_and_then_counts(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    from reflux.samplers.hf_engine import HFSampler

    other, begun, generate = tiny.net(9).state_dict(), asyncio.Event(), HFSampler.generate

    async def generating(self: HFSampler, requests: Any) -> Any:
        begun.set()
        return await generate(self, requests)

    monkeypatch.setattr(HFSampler, "generate", generating)

    async def script(acting: Any) -> Any:
        asked = asyncio.ensure_future(ask(acting, PROMPTS, 2, SamplingParams(0, "train", 25)))
        await begun.wait()
        await acting.publish(InMemory.of(other, 7), 7)
        return await asked, await ask(acting, PROMPTS, 2, SamplingParams(0, "train", 25))

    cfg = tiny.config("opd", student, teacher, task=CHAT)
    before, after = sampled(cfg, tmp_path / "run", script)
    assert {a.rollout.version for g in before for a in g} == {0}
    assert {a.rollout.version for g in after for a in g} == {7}
    assert [a.rollout.tokens_T.tolist() for g in before for a in g] != [
        a.rollout.tokens_T.tolist() for g in after for a in g
    ]


@pytest.mark.parametrize("name", ["learner.model", "teachers.main.model"])
@pytest.mark.parametrize(
    ("where", "words"),
    [("missing", "does not exist"), ("empty", "has no config.json and no model_index.json")],
)
def test_a_model_folder_that_is_none_is_named(
    tiny_run: Callable[..., Any], tmp_path: Path, name: str, where: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ModelError, match=rf"{name}: the folder .*{where} {words}. Give a folder in Hugging Face format"
    ):
        tiny_run("opd", **{name.replace(".", "__"): str(tmp_path / where)})


def test_pickled_weights_are_not_loaded(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    folder = Path(tiny.save(tiny.net(1), tmp_path / "pickled"))
    torch.save(tiny.net(1).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"learner\.model"):
        tiny_run("opd", learner__model=str(folder))


def test_stored_needs_an_answer(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"prompt": "2+3?", "answer": "5", "id": "q1"}\n' * 1)
    task = {"kind": "jsonl", "path": str(tmp_path / "lines.jsonl"), "validation": 0.0}
    with pytest.raises(DataError, match=r"1 of 1 training prompts have none \(the first is q1\)"):
        tiny_run("sft", task=task, prompts_per_step=1)


def test_stored_answers_are_cut_by_the_limit_and_turn_about(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "lines.jsonl").write_text(
        '{"prompt": "2+3?", "references": ["abcdefgh", "xy"], "id": "q1"}\n'
    )
    task = {"kind": "jsonl", "path": str(tmp_path / "lines.jsonl"), "validation": 0.0}
    done = tiny_run(
        "sft", steps=1, task=task, prompts_per_step=1, group_size=3, sampler__generate__max_tokens=4
    )
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert [(len(row["tokens"]), row["finish"]) for row in rows] == [
        (4, "length"),
        (3, "stop"),
        (4, "length"),
    ]


@pytest.mark.parametrize("recipe", ["opd", "sft"])
@pytest.mark.parametrize(("turns", "inline"), [("together", True), ("ready", False)])
def test_model_calls_leave_the_loop_free_where_environments_answer_meanwhile(
    student: str, teacher: str, tmp_path: Path, recipe: str, turns: str, inline: bool
) -> None:
    """Also without staleness, and also where the sampler that plays the turns stands inside another one."""
    import threading

    async def script(acting: Any) -> bool:
        services = (acting if recipe == "opd" else acting.inner).services
        return await services.run_model(threading.get_ident) == threading.get_ident()

    where = {"opd": "sampler__turns", "sft": "sampler__generate__turns"}[recipe]
    assert (
        sampled(tiny.config(recipe, student, teacher, task=CHAT, **{where: turns}), tmp_path / "run", script)
        == inline
    )
