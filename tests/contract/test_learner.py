"""The learner: what it refuses, what it publishes, what it exports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from device import here
from reflux.assets.characters import character_tokenizer
from reflux.config.schedules import Steps
from reflux.errors import ModelError, StepRefused
from reflux.models.settings import Lora
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.sampled_kl import SampledKL
from tiny import attempt, close, gradients, move, rollout, same

CHAT = {"kind": "outside:Chat"}


def batch(lengths: tuple[int, ...] = (3, 8, 5)) -> list[list[Any]]:
    teacher = as_model(tiny.net(2), character_tokenizer())
    return [[attempt(rollout(n, seed=n), teacher)] for n in lengths]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_is_refused_and_nothing_has_changed(bad: float) -> None:
    learner = tiny.learner(tiny.net(1), lr=0.1)
    # moments are not empty
    move(learner, batch(), [Divergence()])
    before = {name: torch.as_tensor(value).clone() for name, value in learner.state().items()}
    groups = batch()
    groups[1][0].target("main").h_TH[2] = bad
    with pytest.raises(
        StepRefused,
        match=r"step 5: .* the optimiser step was not made, and no weight has changed.*refused.jsonl",
    ):
        move(learner, groups, [Divergence()], step=4)
    assert same(before, dict(learner.state()))
    assert all(p.grad is None for p in learner.trained.values())
    # and the next good one goes on
    move(learner, batch(), [Divergence()])
    assert learner.version == 2


def test_a_refused_step_leaves_the_batch_on_disk_and_stops_the_run(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "hot"
    with pytest.raises(StepRefused, match="failed-batch-step-"):
        tiny_run("opd", out=folder, steps=6, task=CHAT, learner__lr=1e30, save_every=1)
    (path,) = folder.glob("failed-batch-step-*.jsonl")
    number = int(path.stem.split("-")[-1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["step"] == number and row["tokens"] and "loss" in row["why"] for row in rows)
    assert (
        max(json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines())
        == number - 1
    )


def test_versions_count_optimiser_steps_only(tiny_run: Callable[..., Any]) -> None:
    """Every weight 0 at steps 1 and 2: step + 1, version unchanged."""
    fade = {"kind": "steps", "values": [0.0, 1.0], "boundaries": [100]}
    silent = tiny_run("opd", steps=2, task=CHAT, credit={"position": {"weight": fade}})
    assert (silent.state["version"], [row["step"] for row in silent.rows("metrics")]) == (0, [1, 2])
    assert [row["tokens_trained"] for row in silent.rows("metrics")] == [0, 0]
    assert tiny_run("opd", steps=2, task=CHAT).state["version"] == 2


@pytest.mark.parametrize(("floor", "moved"), [(1e-4, 0), (0.0, 1)])
def test_rounding_alone_is_no_step(floor: float, moved: int) -> None:
    """A teacher that is the student: the gradient is rounding, which Adam would scale up to a full step."""
    home = as_model(tiny.net(1), character_tokenizer())
    learner = tiny.learner(tiny.net(1), lr=0.1, min_grad_norm=floor)
    stats = move(learner, [[attempt(rollout(n, seed=n), home)] for n in (3, 8)], [Divergence()])
    assert 0 < stats["grad_norm"].value < 1e-5
    assert (learner.version, stats["updates"].value) == (moved, moved)
    assert same(dict(learner.trained), dict(tiny.net(1).named_parameters())) == (not moved)


def test_a_gradient_norm_of_exactly_the_floor_is_no_step() -> None:
    """The floor belongs to what is rounding; the next number above it does not."""
    norm = move(tiny.learner(tiny.net(1)), batch(), [Divergence()])["grad_norm"].value
    for floor, moved in ((norm, 0), (np.nextafter(norm, 0.0), 1)):
        learner = tiny.learner(tiny.net(1), lr=0.1, min_grad_norm=float(floor))
        stats = move(learner, batch(), [Divergence()])
        assert stats["grad_norm"].value == norm
        assert (learner.version, stats["updates"].value) == (moved, moved)


def test_the_learning_rate_is_that_of_the_step_also_where_steps_made_no_update() -> None:
    """Two steps without anything to learn leave the version behind; Adam's first update then moves by the
    rate of step 2.
    """
    learner = tiny.learner(tiny.net(1), lr=Steps(values=(0.1, 0.01), boundaries=(2,)))
    silent = [[attempt(rollout(3), weight=0.0)]]
    for step in (0, 1):
        move(learner, silent, [NLL()], step)
    before = {name: value.detach().clone() for name, value in learner.trained.items()}
    stats = move(learner, [[attempt(rollout(3))]], [NLL()], step=2)
    assert (learner.version, stats["lr"].value) == (1, 0.01)
    moved = max(float((value - before[name]).abs().max()) for name, value in learner.trained.items())
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_clipping_bounds_the_gradient() -> None:
    plain, clipped = tiny.learner(tiny.net(1)), tiny.learner(tiny.net(1), clip=0.01)
    whole = gradients(plain, batch(), [Divergence()])
    small = gradients(clipped, batch(), [Divergence()])
    norm = torch.stack([value.norm() for value in whole.values()]).norm()
    assert norm > 0.1
    close(
        {name: value * (0.01 / norm) for name, value in whole.items()} | {"x": torch.ones(1)},
        small | {"x": torch.ones(1)},
        rtol=1e-4,
    )


def test_one_step_is_adamws() -> None:
    """Against torch's own AdamW, fed the same gradient."""
    learner, other = (
        tiny.learner(tiny.net(1), lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
        tiny.net(1),
    )
    optimiser = torch.optim.AdamW(other.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for step in range(3):
        stats = move(learner, batch(), [Divergence()], step)
        for mine, theirs in zip(learner.trained.values(), other.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        optimiser.step()
        assert stats["lr"].value == 0.05
    for mine, theirs in zip(learner.trained.values(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_follows_its_schedule(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=3, task=CHAT, learner__lr={"kind": "linear", "start": 1e-3, "stop": 0.0})
    assert [row["lr"] for row in done.rows("metrics")] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


@pytest.mark.parametrize("objective", [Divergence(), SampledKL(), NLL()])
def test_gradient_checkpointing_changes_no_gradient(objective: Any) -> None:
    plain, saving = (
        tiny.learner(tiny.net(1, layers=2)),
        tiny.learner(tiny.net(1, layers=2), gradient_checkpointing=True),
    )
    close(gradients(plain, batch(), [objective]), gradients(saving, batch(), [objective]), rtol=1e-6)


def test_gradient_checkpointing_really_recomputes() -> None:
    learner = tiny.learner(tiny.net(1, layers=2), gradient_checkpointing=True)
    calls = []
    learner.model.net.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(learner, batch((3,)), [NLL()])
    assert len(calls) == 2


def test_dropout_is_off_in_the_student_that_moves() -> None:
    net = tiny.net(1)
    net.model.layers[0].self_attn.attention_dropout = 0.5
    learner = tiny.learner(net.train())
    assert same(gradients(learner, batch(), [Divergence()]), gradients(learner, batch(), [Divergence()]))


# --- adapters


def adapted(**fields: Any) -> Any:
    learner = tiny.learner(tiny.net(1, layers=2), lr=0.05, lora=Lora(rank=2, alpha=8), **fields)
    for step in range(3):
        move(learner, batch(), [Divergence()], step)
    return learner


def test_only_adapters_are_trained_and_the_base_stays() -> None:
    learner = adapted()
    assert learner.trained
    assert all("lora_" in name for name in learner.trained)
    base = {
        name.replace(".base_layer", ""): p
        for name, p in learner.model.net.named_parameters()
        if "lora_" not in name
    }
    assert same(base, dict(tiny.net(1, layers=2).named_parameters()))


def test_published_weights_are_those_of_the_adapted_model() -> None:
    """Base plus product B A, under the model's own names; a plain model with them says the same."""
    learner = adapted()
    plain = tiny.net(1, layers=2)
    assert learner.weights.keys() == plain.state_dict().keys()
    ids = here(torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        wanted, before = learner.model.net(input_ids=ids).logits, plain(input_ids=ids).logits
        plain.load_state_dict(dict(learner.weights))
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 0.1
    layer = learner.model.net.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 2)
    torch.testing.assert_close(
        learner.weights["model.layers.0.self_attn.q_proj.weight"], layer.base_layer.weight + product
    )


def test_adapters_start_as_the_identity_and_from_the_runs_dice() -> None:
    one, other = (tiny.learner(tiny.net(1), lora=Lora(rank=2)) for _ in range(2))
    assert same(dict(one.weights), tiny.net(1).state_dict())
    assert same(one.state(), other.state())


def test_targets_that_are_no_regular_expression_are_refused() -> None:
    with pytest.raises(ModelError, match=r"learner\.lora\.targets: .*subpattern"):
        tiny.learner(tiny.net(1), lora=Lora(rank=2, targets="(q"))


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "q_proj"), ("lm_head", "embed_tokens")])
def test_an_adapter_on_a_matrix_shared_by_embeddings_and_head_is_refused(targets: tuple[str, ...]) -> None:
    """Merged, it would reach both in the sampler and one in the learner: two different students."""
    with pytest.raises(ModelError, match="shares one matrix"):
        tiny.learner(tiny.net(1), lora=Lora(rank=2, targets=targets))
    tiny.learner(tiny.net(1), lora=Lora(rank=2, targets=("q_proj",)))
    with pytest.raises(
        ModelError, match=r"learner\.lora\.targets: .*The model's linear modules are called .*k_proj"
    ):
        tiny.learner(tiny.net(1), lora=Lora(rank=2, targets=("no_such",)))


def test_adapters_learn() -> None:
    learner = tiny.learner(tiny.net(1), lr=0.02, lora=Lora(rank=8))
    losses = [float(move(learner, batch(), [Divergence()], step)["loss"].value) for step in range(12)]
    assert losses[-1] < 0.85 * losses[0]


# --- weights read and written


def test_names_are_those_of_the_model_without_buffers() -> None:
    """Two names of one shared matrix are both there; adapters are not."""
    plain = list(dict(tiny.net(1).named_parameters(remove_duplicate=False)))
    assert "lm_head.weight" in plain
    assert tiny.learner(tiny.net(1)).access.names == plain
    assert tiny.learner(tiny.net(1), lora=Lora(rank=2)).access.names == plain


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=8)])
def test_what_is_read_is_a_copy_of_the_merged_weights(lora: Any) -> None:
    learner = tiny.learner(tiny.net(1), lr=0.05, lora=lora)
    move(learner, batch(), [Divergence()])
    found, held = learner.access.read(learner.access.names), learner.access.base(learner.access.names)
    assert same(found, {name: learner.weights[name] for name in learner.access.names})
    assert all(
        value.dtype == torch.float32 and value.device.type == "cpu"
        for value in [*found.values(), *held.values()]
    )
    before = {name: value.clone() for name, value in learner.weights.items()}
    for value in [*found.values(), *held.values()]:
        value.fill_(9.0)
    assert same(before, dict(learner.weights))


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=8)])
def test_bases_go_back_bit_for_bit_and_plus_d_moves_the_full_weights_by_d(lora: Any) -> None:
    learner = tiny.learner(tiny.net(1), lr=0.05, lora=lora)
    for step in range(2):
        move(learner, batch(), [Divergence()], step)
    names = [name for name in learner.access.names if "mlp" in name or "embed" in name]
    before = {name: torch.as_tensor(value).clone() for name, value in learner.state().items()}
    weights = {name: value.clone() for name, value in learner.weights.items()}
    base = learner.access.base(names)
    learner.access.write({name: value + 0.5 for name, value in base.items()})
    for name, value in learner.weights.items():
        torch.testing.assert_close(
            value, weights[name] + 0.5 * (name in (*names, "lm_head.weight")), rtol=1e-6, atol=1e-6
        )
    assert [name for name in learner.state() if name.startswith("base/")] == (
        [f"base/{name}" for name in sorted(names)] if lora else []
    )
    learner.access.write(base)
    assert same(weights, dict(learner.weights))
    assert same(
        before, {name: value for name, value in learner.state().items() if not name.startswith("base/")}
    )
    assert learner.version == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_weights_kept_too_narrow_are_neither_read_nor_written(dtype: torch.dtype) -> None:
    learner = tiny.learner(tiny.net(1))
    home = learner.model.net.model.layers[0].mlp.up_proj
    del home._parameters["weight"]
    home.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=dtype), requires_grad=False)
    name = "model.layers.0.mlp.up_proj.weight"
    access = learner.access
    for ask in (
        lambda: access.read([name]),
        lambda: access.base([name]),
        lambda: access.write({name: torch.zeros(48, 32)}),
    ):
        with pytest.raises(
            ModelError, match=f"{name} is stored in {str(dtype).split('.')[1]}.*float32 master weights"
        ):
            ask()
    assert access.read(["model.norm.weight"]).keys() == {"model.norm.weight"}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
def test_the_exported_student_is_the_student(tiny_run: Callable[..., Any], lora: Any) -> None:
    """from_pretrained loads it, and it says what the last weights say: the loss before and after more steps
    continues.
    """
    more = {"learner__lora": lora, "learner__lr": 0.02} if lora else {"learner__lr": 0.02}
    done = tiny_run("full", steps=2, task=CHAT, **more)
    loaded = AutoModelForCausalLM.from_pretrained(done.dir / "student")
    tokenizer = AutoTokenizer.from_pretrained(done.dir / "student")
    assert tokenizer.get_vocab() == character_tokenizer().get_vocab()
    assert "lora" not in "".join(loaded.state_dict())
    if lora is None:
        saved = {name.removeprefix("weight/"): value for name, value in done.weights.items()}
        assert same(saved, dict(loaded.named_parameters()))
    # an earlier run directory is a model
    again = tiny_run("full", steps=1, task=CHAT, learner__model=str(done.dir), learner__lr=0.0)
    ids = torch.arange(5, 25)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(again.dir / "student")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, reloaded(input_ids=ids).logits)


def test_the_export_has_the_type_the_files_had(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    half = tiny.save(tiny.net(1).bfloat16(), tmp_path / "half")
    done = tiny_run("full", steps=1, task=CHAT, learner__model=half)
    # master weights
    assert {value.dtype for value in done.weights.values()} == {torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(done.dir / "student", dtype="auto")
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}


def test_observe_gives_the_student_of_now(student: str, teacher: str) -> None:
    """Top-k of now, and the log-probs of now at what was said then; nothing where nothing is wanted."""
    from dataclasses import replace

    from reflux.config.requirements import Requirements
    from reflux.types import TopKTarget

    net = tiny.net(1)
    learner = tiny.learner(net)
    # the attempts are of an older student
    learner.version = 1
    spoken = rollout(6, seed=1)
    ids = np.concatenate([spoken.prompt_tokens, spoken.tokens_T])
    with torch.no_grad():
        logp_TV = (
            net(input_ids=here(ids)[None]).logits[0, len(spoken.prompt_tokens) - 1 : -1].log_softmax(-1).cpu()
        )
    listed = np.random.default_rng(0).integers(0, 102, (6, 4))
    behaviour = TopKTarget(
        teacher="behaviour", ids_TK=listed, logp_TK=np.zeros((6, 4), np.float32), logp_T=spoken.logp_T
    )
    for requirements, ids_TK in (
        (Requirements(now_topk=3), logp_TV.topk(3).indices),
        (Requirements(now_at_behaviour=True, behaviour=4), torch.from_numpy(listed)),
        # a teacher is asked at the student's own tokens, and as many are compared as were listed
        (
            Requirements(now_at_behaviour=True, behaviour=4, now_topk=3, now_candidates=3),
            logp_TV.topk(4).indices,
        ),
    ):
        made = attempt(replace(spoken, behaviour=behaviour) if requirements.now_at_behaviour else spoken)
        learner.context = tiny.context(requirements)
        failed, empty = attempt(rollout(3, finish="error")), attempt(rollout(0))
        nothing, now, none = asyncio.run(learner.observe([[failed], [made, empty]]))
        assert (nothing, none, made.now) == (None, None, None)
        np.testing.assert_array_equal(now.ids_TK, ids_TK)
        np.testing.assert_allclose(now.logp_TK, logp_TV.gather(-1, ids_TK), atol=1e-4)
        np.testing.assert_allclose(now.logp_T, logp_TV[range(6), spoken.tokens_T], atol=1e-4)
    learner.context = tiny.context()
    assert asyncio.run(learner.observe([[attempt(spoken)], [attempt(spoken)]])) == [None, None]
