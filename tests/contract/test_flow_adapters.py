"""Adapters on disk and on a transformer: what is read is what peft and diffusers wrote, and nothing is lost
in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_flow
from reflux.errors import ModelError
from reflux.models import lora as plain
from reflux.models.flow.adapter_files import read_adapter, write_adapter
from reflux.models.flow.adapter_folders import DIFFUSERS, PEFT, adapter_folder
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_adapters import Adapter, Factors, add, attach, layers_of, switch_off, taken
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.row_adapters import row_adapters
from tiny_flow import TEXTS, factors, modules, save_adapter


def adapter(of: FlowModel, seed: int, scale: float = 2.0, **fields: Any) -> Adapter:
    return Adapter(
        {name: Factors(A, B, scale) for name, (A, B) in factors(of, seed, **fields).items()}, f"seed {seed}"
    )


def outputs(model: FlowModel) -> torch.Tensor:
    rng = torch.Generator().manual_seed(9)
    x_ND = torch.randn(4, 16, generator=rng)
    with torch.no_grad():
        return model.velocity(x_ND, torch.tensor([1.0, 0.7, 0.4, 0.1]), TEXTS[:4]).cpu()


def frozen(model: FlowModel) -> FlowModel:
    model.net.requires_grad_(False)
    return model


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def by_hand(model: FlowModel, deltas: dict[str, torch.Tensor]) -> FlowModel:
    """The model with these added to its weights."""
    with torch.no_grad():
        for name, delta in deltas.items():
            model.net.transformer.get_submodule(name).weight += delta.float()
    return model


# --- what is read


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_what_is_on_disk_is_the_formula(tmp_path: Path, format: str) -> None:
    """W + alpha / rank * B A, in float64 from the numbers themselves; rank 3 and alpha 4, so the scale is no
    power of two.
    """
    model = tiny_flow.model(1)
    folder = save_adapter(tmp_path / "a", model, 5, format=format, rank=3, alpha=4.0)
    read = read_adapter(folder, model.net.transformer, "here")
    expected = {
        name: 4.0 / 3.0 * (B.double() @ A.double()) for name, (A, B) in factors(model, 5, rank=3).items()
    }
    assert read.deltas().keys() == expected.keys()
    for name, delta in read.deltas().items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-12, atol=1e-15)
    attach(model.net.transformer, read, "one")
    close(outputs(model), outputs(by_hand(tiny_flow.model(1), expected)))
    assert (outputs(model) - outputs(tiny_flow.model(1))).abs().max() > 0.1


def test_without_an_alpha_diffusers_scale_is_one(tmp_path: Path) -> None:
    model = tiny_flow.model(1)
    file = Path(save_adapter(tmp_path, model, 5, format="diffusers")) / DIFFUSERS
    save_file({key: value for key, value in load_file(file).items() if not key.endswith(".alpha")}, file)
    assert {
        one.scale for one in read_adapter(str(tmp_path), model.net.transformer, "here").factors.values()
    } == {1.0}


@pytest.mark.parametrize(
    "special",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"0.attn.to_q": 3}, "alpha_pattern": {"1.attn.to_k": 9}},
        {"target_modules": r".*\.0\.attn\.(to_q|to_k)"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["add_q_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_saves_is_read_as_peft_means_it(tmp_path: Path, special: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    saved = tiny_flow.model(1)
    config = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": list(tiny_flow.ENDS), **special})
    wrapped: Any = get_peft_model(saved.net.transformer, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.5)
    wrapped.save_pretrained(str(tmp_path))
    model = tiny_flow.model(1)
    attach(model.net.transformer, read_adapter(str(tmp_path), model.net.transformer, "here"), "read")
    close(outputs(model), outputs(saved))
    assert len(list(layers_of(model.net.transformer))) == len(list(layers_of(saved.net.transformer)))


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_what_is_written_is_read_again_and_by_diffusers(tmp_path: Path, scale: float) -> None:
    """Ranks that differ and a module called as the end of others (proj_out) included."""
    model = tiny_flow.model(1)
    made = adapter(model, 3, scale)
    mixed = {
        **made.factors,
        "proj_out": adapter(model, 4, 1.5, rank=3, ends=["proj_out"]).factors["proj_out"],
    }
    write_adapter(Adapter(mixed, "made"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [DIFFUSERS]
    back = read_adapter(str(tmp_path), model.net.transformer, "here")
    assert back.factors.keys() == mixed.keys()
    for name, one in back.factors.items():
        assert torch.equal(one.A, mixed[name].A)
        assert torch.equal(one.B, mixed[name].B)
        assert one.scale == pytest.approx(mixed[name].scale, rel=1e-15)
    theirs = tiny_flow.model(1)
    parts = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    scheduler = library().FlowMatchEulerDiscreteScheduler()
    pipeline = library().StableDiffusion3Pipeline(theirs.net.transformer, scheduler, **dict.fromkeys(parts))
    pipeline.load_lora_weights(str(tmp_path))
    attach(model.net.transformer, back, "ours")
    close(outputs(model), outputs(theirs))


# --- what is lost, or does not belong


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_no_key_may_be_missing(tmp_path: Path, format: str) -> None:
    """Each one in turn is left out, and named."""
    model = tiny_flow.model(1)
    file = Path(save_adapter(tmp_path, model, 5, format=format)) / (PEFT if format == "peft" else DIFFUSERS)
    whole = load_file(file)
    for lost in [key for key in whole if ".lora_" in key]:
        save_file({key: value for key, value in whole.items() if key != lost}, file)
        with pytest.raises(ModelError, match=r"LoRA matrices that are missing \(1\)") as refused:
            read_adapter(str(tmp_path), model.net.transformer, "teachers.x.adapter")
        assert lost.removesuffix(".weight").split(".", 1)[1].removeprefix("model.") in str(refused.value)
        assert str(refused.value).startswith("teachers.x.adapter: ")


def test_no_module_that_the_config_targets_may_be_missing(tmp_path: Path) -> None:
    model = tiny_flow.model(1)
    file = Path(save_adapter(tmp_path, model, 5)) / PEFT
    lost = "transformer_blocks.1.attn.to_v"
    save_file({key: value for key, value in load_file(file).items() if lost not in key}, file)
    with pytest.raises(ModelError, match=rf"LoRA matrices that are missing \(1\): {lost}"):
        read_adapter(str(tmp_path), model.net.transformer, "here")
    save_adapter(tmp_path, model, 5, ends=["to_q"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["to_q", "to_nowhere"]})
    )
    with pytest.raises(ModelError, match="targets to_nowhere, which its base model does not have"):
        read_adapter(str(tmp_path), model.net.transformer, "here")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["to_k"]}))
    with pytest.raises(
        ModelError, match=r"missing \(2\): .*to_k.*; modules that its config does not target \(2\): .*to_q"
    ):
        read_adapter(str(tmp_path), model.net.transformer, "here")


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_every_key_belongs_somewhere(tmp_path: Path, format: str) -> None:
    model = tiny_flow.model(1)
    file = Path(save_adapter(tmp_path, model, 5, format=format)) / (PEFT if format == "peft" else DIFFUSERS)
    whole, prefix = load_file(file), "base_model.model." if format == "peft" else "transformer."
    strangers = (
        f"{prefix}transformer_blocks.7.attn.to_q.lora_A.weight",
        f"{prefix}transformer_blocks.0.attn.to_q.lora_magnitude_vector",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        f"{prefix}transformer_blocks.0.attn.to_q.lora.down.weight",
        *([f"{prefix}transformer_blocks.0.attn.to_q.alpha"] if format == "peft" else []),
    )
    for stranger in strangers:
        save_file({**whole, stranger: torch.zeros(2, 16)}, file)
        with pytest.raises(
            ModelError, match=r"keys that match no linear layer of this transformer \(1\)"
        ) as refused:
            read_adapter(str(tmp_path), model.net.transformer, "here")
        assert stranger in str(refused.value)


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, format: str) -> None:
    model, larger = tiny_flow.model(1), tiny_flow.model(1, layers=3)
    folder = save_adapter(tmp_path / "larger", larger, 5, format=format)
    with pytest.raises(ModelError, match="does not fit its base model"):
        read_adapter(folder, model.net.transformer, "here")
    folder = save_adapter(tmp_path / "other", model, 5, format=format)
    file = Path(folder) / (PEFT if format == "peft" else DIFFUSERS)
    whole = load_file(file)
    key = next(key for key in whole if "lora_B" in key)
    save_file({**whole, key: torch.zeros(17, 2)}, file)
    with pytest.raises(ModelError, match=r"shapes that do not fit \(1\): .*B \(17, 2\), expected \(16, 2\)"):
        read_adapter(folder, model.net.transformer, "here")


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "has the type LOHA"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(tmp_path: Path, table: dict[str, Any], why: str) -> None:
    model = tiny_flow.model(1)
    save_adapter(tmp_path, model, 5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **table}))
    with pytest.raises(ModelError, match=why):
        read_adapter(str(tmp_path), model.net.transformer, "here")


def test_an_adapter_of_a_layer_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    """A convolution: rows of one batch with different adapters are defined for linear layers."""
    model = tiny_flow.model(1)
    save_adapter(tmp_path, model, 5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["pos_embed.proj"]})
    )
    with pytest.raises(ModelError, match=r"targets pos_embed\.proj, which its base model does not have"):
        read_adapter(str(tmp_path), model.net.transformer, "here")
    config["target_modules"] = r".*pos_embed\.proj|.*\.to_q"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit its base model"):
        read_adapter(str(tmp_path), model.net.transformer, "here")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    model = tiny_flow.model(1)
    save_adapter(tmp_path, model, 5)
    (tmp_path / PEFT).write_bytes((tmp_path / PEFT).read_bytes()[:-100])
    with pytest.raises(ModelError, match="may be incomplete"):
        read_adapter(str(tmp_path), model.net.transformer, "here")
    (tmp_path / PEFT).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="only safetensors files are read"):
        read_adapter(str(tmp_path), model.net.transformer, "here")
    with pytest.raises(ModelError, match=r"there is no adapter in .*: give a folder"):
        read_adapter(str(tmp_path / "nowhere"), model.net.transformer, "here")
    (tmp_path / "whole" / "student").mkdir(parents=True)
    (tmp_path / "whole" / "student" / "model_index.json").write_text("{}")
    for name in ("whole", "whole/student"):
        with pytest.raises(
            ModelError,
            match=rf"here: there is no adapter in .*{name}: it holds a full model, which is given as",
        ):
            read_adapter(str(tmp_path / name), model.net.transformer, "here")
    save_file({}, tmp_path / DIFFUSERS)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="it is empty"):
        read_adapter(str(tmp_path), model.net.transformer, "here")


def test_the_adapter_of_an_earlier_run_is_its_students(tmp_path: Path) -> None:
    model = tiny_flow.model(1)
    save_adapter(tmp_path / "run" / "student", model, 5)
    found = [
        read_adapter(str(tmp_path / name), model.net.transformer, "here") for name in ("run", "run/student")
    ]
    assert found[0].deltas().keys() == found[1].deltas().keys() == set(modules(model))
    assert all(torch.equal(found[0].deltas()[name], delta) for name, delta in found[1].deltas().items())
    # to a merge it is the model
    assert adapter_folder(str(tmp_path / "run"), "here") is None


# --- on a transformer


def test_one_of_several_speaks_as_it_does_alone() -> None:
    """In any order; where none does, the base does bit for bit. All frozen: torch multiplies otherwise by
    weights that are trained.
    """
    model, base = tiny_flow.model(1), outputs(frozen(tiny_flow.model(1)))
    frozen(model)
    alone = {}
    for seed in (3, 4):
        fresh = tiny_flow.model(1)
        attach(fresh.net.transformer, adapter(fresh, seed), "only")
        alone[f"a{seed}"] = outputs(frozen(fresh))
        attach(model.net.transformer, adapter(model, seed), f"a{seed}")
    assert not torch.equal(alone["a3"], alone["a4"])
    switch_off(model.net.transformer)
    layers = [layer for _, layer in layers_of(model.net.transformer)]
    for name in ("a3", "a4", None, "a3", None, "a4", "a4"):
        with row_adapters(layers, [name] * 4):
            found = outputs(model)
        close(found, base if name is None else alone[name])
        assert torch.equal(outputs(model), base)
        assert not any(p.requires_grad for n, p in model.net.named_parameters() if ".lora_" in n)


def test_adapters_of_other_modules_stay_silent() -> None:
    model, alone = tiny_flow.model(1), tiny_flow.model(1)
    attach(model.net.transformer, adapter(model, 3, ends=["to_q"]), "one")
    attach(model.net.transformer, adapter(model, 4, ends=["to_k", "proj_out"]), "two")
    attach(alone.net.transformer, adapter(alone, 4, ends=["to_k", "proj_out"]), "two")
    switch_off(model.net.transformer)
    with row_adapters([layer for _, layer in layers_of(model.net.transformer)], ["two"] * 4):
        close(outputs(frozen(model)), outputs(frozen(alone)))


def test_taken_factors_are_those_that_were_attached() -> None:
    model = tiny_flow.model(1)
    # 3 * 0.1 / 3 is not 0.1
    made = adapter(model, 3, 0.1, rank=3)
    attach(model.net.transformer, made, "one")
    back = taken(model.net.transformer, "one")
    assert back.factors.keys() == made.factors.keys() == modules(model).keys()
    for name, one in back.factors.items():
        assert torch.equal(one.A, made.factors[name].A)
        assert torch.equal(one.B, made.factors[name].B)
        assert one.scale == 0.1


def test_an_added_adapter_is_the_attached_one() -> None:
    attached, added = tiny_flow.model(1), tiny_flow.model(1)
    made = adapter(attached, 3)
    attach(attached.net.transformer, made, "default")
    add(added.net.transformer, made)
    close(outputs(attached), outputs(added))
    merged = plain.merged(attached.net)
    state = added.net.state_dict()
    assert merged.keys() == state.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-6)
    assert plain.base_parameters(attached.net).keys() == dict(added.net.named_parameters()).keys()
