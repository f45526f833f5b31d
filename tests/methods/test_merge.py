"""Means of models, and where a flow's student begins: from the definition, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_flow
from device import here
from reflux.errors import ModelError
from reflux.models import lora as plain
from reflux.models.flow.flow_adapters import Adapter, Factors, taken
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.merge import mean_factors, mean_products, mean_weights
from reflux.models.flow.start import start
from reflux.models.settings import FlowLora, Merge
from tiny_flow import TEXTS, save, save_adapter

# what tiny adapters are saved with
LORA = FlowLora(rank=2, alpha=4.0, targets=tiny_flow.ENDS)
SHAPES = {"first": (3, 5), "second": (4, 4), "third": (2, 6)}


def adapter(seed: int, ranks: dict[str, int], scales: dict[str, float]) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, rank in ranks.items():
        outputs, inputs = SHAPES[name]
        A, B = (
            torch.randn(*shape, generator=rng, dtype=torch.float64)
            for shape in ((rank, inputs), (outputs, rank))
        )
        made[name] = Factors(A, B, scales[name])
    return Adapter(made, f"a{seed}")


def alike(seed: int, scale: float = 2.0) -> Adapter:
    return adapter(seed, dict.fromkeys(SHAPES, 2), dict.fromkeys(SHAPES, scale))


def outputs(model: FlowModel) -> torch.Tensor:
    x_ND = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.velocity(x_ND, torch.tensor([1.0, 0.7, 0.4, 0.1]), TEXTS[:4]).cpu()


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- means


@given(
    tables=st.lists(
        st.dictionaries(
            st.sampled_from(sorted(SHAPES)),
            st.tuples(st.integers(1, 4), st.sampled_from([0.3, 1.0, 2.0])),
            min_size=1,
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=60)
def test_the_mean_of_products_is_exact(tables: list[dict[str, tuple[int, float]]]) -> None:
    """Any ranks, scales and modules; a module that an adapter leaves alone counts as moved by 0."""
    adapters = [
        adapter(i, {n: r for n, (r, _) in t.items()}, {n: s for n, (_, s) in t.items()})
        for i, t in enumerate(tables)
    ]
    mean = mean_products(adapters)
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for one in adapters:
        for name, factors in one.factors.items():
            expected[name] += factors.scale * factors.B @ factors.A / len(adapters)
    touched = {name for one in adapters for name in one.factors}
    assert set(mean.factors) == touched
    for name in touched:
        torch.testing.assert_close(mean.deltas()[name], expected[name], rtol=1e-12, atol=1e-13)
        assert mean.factors[name].rank == sum(
            one.factors[name].rank for one in adapters if name in one.factors
        )


def test_one_scale_stays_that_scale() -> None:
    """Then training goes on at the pace of the adapters."""
    assert {one.scale for one in mean_products([alike(1, 0.3), alike(2, 0.3)]).factors.values()} == {0.3}


def test_the_mean_of_factors_is_the_released_one_and_not_the_mean_of_products() -> None:
    """mean(B) mean(A) = (B1 A1 + B1 A2 + B2 A1 + B2 A2) / 4."""
    one, two = alike(1), alike(2)
    mean = mean_factors([one, two])
    for name in SHAPES:
        a, b = one.factors[name], two.factors[name]
        torch.testing.assert_close(mean.factors[name].A, (a.A + b.A) / 2)
        torch.testing.assert_close(mean.factors[name].B, (a.B + b.B) / 2)
        crossed = 2.0 * (a.B @ a.A + a.B @ b.A + b.B @ a.A + b.B @ b.A) / 4
        torch.testing.assert_close(mean.deltas()[name], crossed)
        gap = (mean.deltas()[name] - mean_products([one, two]).deltas()[name]).norm()
        assert gap > 0.3 * mean.deltas()[name].norm()
    for name, delta in mean_factors([one, one]).deltas().items():
        torch.testing.assert_close(delta, one.deltas()[name])


def test_the_mean_of_factors_has_no_meaning_for_adapters_of_different_origin() -> None:
    """The same delta in another basis of its factors changes that mean, and not the mean of the products."""
    one, two = alike(1), alike(2)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    turned = Adapter(
        {n: Factors(turn @ f.A, f.B @ turn.T, f.scale) for n, f in two.factors.items()}, "turned"
    )
    for name in SHAPES:
        torch.testing.assert_close(turned.deltas()[name], two.deltas()[name])
        torch.testing.assert_close(
            mean_products([one, turned]).deltas()[name], mean_products([one, two]).deltas()[name]
        )
        assert (
            mean_factors([one, turned]).deltas()[name] - mean_factors([one, two]).deltas()[name]
        ).abs().max() > 0.1


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (adapter(2, {"first": 2, "second": 2}, dict.fromkeys(SHAPES, 2.0)), "different modules"),
        (adapter(2, {"first": 2, "second": 2, "third": 3}, dict.fromkeys(SHAPES, 2.0)), "different ranks"),
        (
            adapter(2, dict.fromkeys(SHAPES, 2), {"first": 2.0, "second": 2.0, "third": 1.0}),
            "different scales",
        ),
    ],
)
def test_factors_that_do_not_match_have_no_mean(other: Adapter, why: str) -> None:
    with pytest.raises(ModelError, match=rf'a1 and a2 have {why}.*by = "weights"'):
        mean_factors([alike(1), other])
    mean_products([alike(1), other])


def test_the_mean_of_weights_is_the_definition() -> None:
    """All of them, prompt table and buffers included."""
    nets = [tiny_flow.model(seed).net for seed in (1, 2, 3)]
    mean = mean_weights([(f"m{i}", net) for i, net in enumerate(nets)], nets[0])
    states = [net.state_dict() for net in nets]
    assert mean.keys() == states[0].keys()
    assert "prompts.rows.weight" in mean
    for name, value in mean.items():
        torch.testing.assert_close(
            value, sum(state[name].double() for state in states) / 3, rtol=1e-14, atol=0
        )
    alone = mean_weights([("a", nets[0]), ("b", nets[0])], nets[0])
    assert all(torch.equal(value.float(), states[0][name]) for name, value in alone.items())
    assert all(
        torch.equal(net.state_dict()[name], value)
        for net, state in zip(nets, states, strict=True)
        for name, value in state.items()
    )


def test_models_built_otherwise_have_no_mean() -> None:
    net = tiny_flow.model(1).net
    with pytest.raises(
        ModelError, match=r"wide has another configuration than learner.model \(num_layers 3 instead of 2\)"
    ):
        mean_weights([("m", net), ("wide", tiny_flow.model(2, layers=3).net)], net)
    with pytest.raises(ModelError, match="m has learned other prompts"):
        mean_weights([("m", tiny_flow.model(2, texts=("", *reversed(TEXTS[1:]))).net)], net)


# --- the start of a student


def trained(model: FlowModel) -> set[str]:
    return {name for name, value in model.net.named_parameters() if value.requires_grad}


def begun(
    merge: Merge | None = None, adapter: str | None = None, lora: FlowLora | None = None, seed: int = 0
) -> FlowModel:
    # what is trained is for `start` to say
    model = frozen(tiny_flow.model(1))
    start(model, merge, adapter, lora, seed=seed)
    return model


def test_a_student_as_it_is_trains_all_its_weights() -> None:
    model = begun()
    close(outputs(model), outputs(tiny_flow.model(1)))
    assert trained(model) == set(dict(model.net.named_parameters()))
    assert "prompts.rows.weight" in trained(model)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained() -> None:
    """Its A comes from the seed alone, whatever torch's random numbers did before, and they go on as if
    nothing had been drawn.
    """
    models = [tiny_flow.model(1) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        rng = torch.get_rng_state()
        start(model, None, None, LORA, seed=seed)
        assert torch.equal(torch.get_rng_state(), rng)
        torch.rand(3)
    for model in models:
        assert torch.equal(outputs(model), outputs(frozen(tiny_flow.model(1))))
        assert all(".lora_" in name for name in trained(model))
        assert len(trained(model)) == 2 * len(tiny_flow.modules(model))
    first, again, other = (taken(model.net.transformer).factors for model in models)
    assert {(factors.rank, factors.scale) for factors in first.values()} == {(2, 2.0)}
    assert all(torch.equal(first[name].A, again[name].A) for name in first)
    assert not any(torch.equal(first[name].A, other[name].A) for name in first)
    with pytest.raises(ModelError, match="no linear layer of this transformer is called to_nowhere"):
        begun(lora=FlowLora(targets=("to_q", "to_nowhere")))


def frozen(model: FlowModel) -> FlowModel:
    """torch multiplies otherwise, in the last bits, by weights that are trained."""
    model.net.requires_grad_(False)
    return model


def deltas(folder: str) -> dict[str, torch.Tensor]:
    from reflux.models.flow.adapter_files import read_adapter

    return read_adapter(folder, tiny_flow.model(1).net.transformer, "here").deltas()


def moved(*by: dict[str, torch.Tensor]) -> FlowModel:
    """The tiny model with the mean of these added to its weights, by hand."""
    model = tiny_flow.model(1)
    with torch.no_grad():
        for name in by[0]:
            added = torch.stack([one[name] for one in by]).mean(0).float()
            model.net.transformer.get_submodule(name).weight += here(added)
    return model


def test_an_adapter_is_trained_on_under_lora_and_added_without(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", tiny_flow.model(1), 3)
    expected = moved(deltas(folder))
    weights = expected.net.state_dict()
    whole, under = begun(adapter=folder), begun(adapter=folder, lora=LORA)
    for model in (whole, under):
        close(outputs(model), outputs(expected))
        for name, value in plain.merged(model.net).items():
            torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-6)
    assert trained(whole) == set(dict(whole.net.named_parameters()))
    assert len(trained(under)) == 2 * len(tiny_flow.modules(under))
    assert all(".lora_" in name for name in trained(under))


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        (
            FlowLora(rank=4, alpha=4.0, targets=tiny_flow.ENDS),
            "has rank 4 and alpha 4, but .* has rank 2 and alpha 4",
        ),
        (FlowLora(rank=2, alpha=2.0, targets=tiny_flow.ENDS), "has rank 2 and alpha 4"),
        (
            FlowLora(rank=2, alpha=4.0, targets=tiny_flow.ENDS[1:]),
            "targets leaves out transformer_blocks.0.attn.to_q",
        ),
        (FlowLora(rank=2, alpha=4.0, targets=(*tiny_flow.ENDS, "proj_out")), "targets includes proj_out"),
    ],
)
def test_lora_describes_the_adapter_that_goes_on_or_is_refused(
    tmp_path: Path, lora: FlowLora, why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        begun(adapter=save_adapter(tmp_path / "a", tiny_flow.model(1), 3), lora=lora)


def test_a_merge_of_models_is_the_base_with_and_without_lora(tmp_path: Path) -> None:
    names = [save(tmp_path / f"m{seed}", seed) for seed in (2, 3)]
    merge = Merge(models=tuple(names))
    expected = tiny_flow.model(2)
    with torch.no_grad():
        for value, other in zip(
            expected.net.state_dict().values(), tiny_flow.model(3).net.state_dict().values(), strict=True
        ):
            value.copy_((value + other) / 2)
    for lora in (None, LORA):
        model = begun(merge=merge, lora=lora)
        for name, value in plain.merged(model.net).items():
            torch.testing.assert_close(value, expected.net.state_dict()[name], rtol=0, atol=1e-7)
        close(outputs(model), outputs(expected))
        assert all(".lora_" in name for name in trained(model)) == (lora is not None)


@pytest.mark.parametrize("by", ["weights", "factors"])
def test_a_merge_of_adapters_is_one_adapter(tmp_path: Path, by: Any) -> None:
    base = tiny_flow.model(1)
    names = [save_adapter(tmp_path / f"a{seed}", base, seed) for seed in (3, 4)]
    products = outputs(moved(*(deltas(name) for name in names)))
    merge, rank = Merge(models=tuple(names), by=by), 4 if by == "weights" else 2
    whole = begun(merge=merge)
    under = begun(merge=merge, lora=FlowLora(rank=rank, alpha=2.0 * rank, targets=tiny_flow.ENDS))
    close(outputs(whole), outputs(under))
    far = float((outputs(whole) - products).abs().max())
    assert far < 1e-5 if by == "weights" else far > 0.1
    assert {factors.rank for factors in taken(under.net.transformer).factors.values()} == {rank}
    assert all(".lora_" in name for name in trained(under))


def test_a_merge_is_of_one_kind_and_strict(tmp_path: Path) -> None:
    base = tiny_flow.model(1)
    one, whole = save_adapter(tmp_path / "a", base, 3), save(tmp_path / "m", 2)
    with pytest.raises(ModelError, match="is a full model and the others are adapters"):
        begun(merge=Merge(models=(one, whole)))
    with pytest.raises(ModelError, match='by = "factors" is for adapters'):
        begun(merge=Merge(models=(whole, whole), by="factors"))
    with pytest.raises(ModelError, match=r"learner.merge.models\[1\]: the adapter in .* does not fit"):
        begun(merge=Merge(models=(one, save_adapter(tmp_path / "b", tiny_flow.model(1, layers=3), 3))))
    with pytest.raises(ModelError, match=r"learner.merge.models\[1\]: the folder .* does not exist"):
        begun(merge=Merge(models=(whole, str(tmp_path / "nowhere"))))
