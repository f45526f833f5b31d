"""A peft adapter as a text model: its base plus its product, or a refusal that names what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from device import here
from reflux.errors import ModelError
from reflux.models.folders import look_for_text
from reflux.models.sizes import size_of
from reflux.models.text import load_model, load_tokenizer


def adapter(base: str, folder: Path, **changes: Any) -> Path:
    """An adapter of random numbers on a base model."""
    net = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    shape = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(net, LoraConfig(**{**shape, **changes})).save_pretrained(str(folder))
    return folder


def reconfigure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retensor(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_the_weights_are_the_base_plus_the_scaled_product(student: str, tmp_path: Path) -> None:
    folder = adapter(student, tmp_path)
    base, factors = (
        AutoModelForCausalLM.from_pretrained(student).state_dict(),
        load_file(folder / "adapter_model.safetensors"),
    )
    model = load_model(str(folder), "m")
    for name, value in model.net.state_dict().items():
        root = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = base[name]
        if f"{root}A.weight" in factors:
            expected = expected + 3 * factors[f"{root}B.weight"] @ factors[f"{root}A.weight"]
            assert not torch.equal(value.cpu(), base[name])
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_the_tokenizer_is_the_adapters_own_or_else_that_of_the_base(student: str, tmp_path: Path) -> None:
    folder = adapter(student, tmp_path)
    assert len(load_tokenizer(str(folder))) == len(load_tokenizer(student))
    own = load_tokenizer(student)
    own.chat_template = "{{ 'mine' }}"
    own.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "{{ 'mine' }}"


def test_the_recipe_may_name_the_base(student: str, tmp_path: Path) -> None:
    expected = load_model(str(adapter(student, tmp_path)), "m").net.state_dict()
    reconfigure(tmp_path, base_model_name_or_path="/gone/model")
    with pytest.raises(
        ModelError, match=r"its base model /gone/model does not exist here.*teachers\.main\.base_model"
    ):
        load_model(str(tmp_path), "teachers.main.model")
    with pytest.raises(ModelError, match=r"Set learner\.base_model"):
        look_for_text(str(tmp_path), "learner.model")
    look_for_text(str(tmp_path), "learner.model", student)
    found = load_model(str(tmp_path), "m", base=student).net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ModelError, match=r"is no adapter, so it has no other base"):
        look_for_text(student, "learner.model", student)


def test_a_plan_counts_the_base(student: str, tmp_path: Path) -> None:
    whole, found = size_of(student, "m"), size_of(str(adapter(student, tmp_path)), "m")
    assert found.name == str(tmp_path)
    assert (found.parameters, found.stored_bytes) == (whole.parameters, whole.stored_bytes)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(A), "its file lacks 1 tensors: .*layers.0.self_attn.q_proj.lora_A"),
        (
            lambda tensors: tensors.update({A.replace("q_proj", "k_proj"): tensors[A] + 0}),
            "config does not use 1",
        ),
        (lambda tensors: tensors.update({A: tensors[A][:, :5].contiguous()}), r"size mismatch for .*q_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_named(student: str, tmp_path: Path, change: Any, words: str) -> None:
    folder = adapter(student, tmp_path)
    retensor(folder, change)
    with pytest.raises(ModelError, match=words):
        load_model(str(folder), "m")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_modules": ["query_key_value"]}, "query_key_value"),
        ({"peft_type": "PREFIX_TUNING"}, "has the type PREFIX_TUNING, and only LORA"),
    ],
)
def test_an_adapter_of_another_model_or_kind(student: str, tmp_path: Path, change: Any, words: str) -> None:
    reconfigure(adapter(student, tmp_path), **change)
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path), "m")


def test_files_that_are_not_whole_and_folders_with_a_model_beside(student: str, tmp_path: Path) -> None:
    folder = adapter(student, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors has"):
        look_for_text(str(folder), "m")
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        look_for_text(str(folder), "m")
    (folder / "adapter_model.bin").rename(file)
    file.write_bytes(whole)
    AutoModelForCausalLM.from_pretrained(student).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"holds a full model and an adapter"):
        load_model(str(folder), "m")
    (folder / "model.safetensors").unlink()
    load_model(str(folder), "m")


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_a_run_from_an_adapter_with_adapters_as_teachers(
    student: str, teacher: str, tmp_path: Path, tiny_run: Any, lora: dict[str, int] | None
) -> None:
    start = adapter(student, tmp_path / "start")
    taught = adapter(teacher, tmp_path / "taught")
    done = tiny_run(learner__model=str(start), teachers__main__model=str(taught), learner__lora=lora, steps=2)
    assert len(done.rows("metrics")) == 2
    exported = load_model(str(done.dir), "m").net.state_dict()
    began = load_model(str(start), "m").net.state_dict()
    assert exported.keys() == began.keys()
    moved = {name for name, value in began.items() if not torch.equal(exported[name], value)}
    # without LoRA all of its matrices are trained
    assert moved >= {name for name in began if lora is None and "proj" in name}
    assert moved


def with_tokens(base: str, folder: Path, save_head: bool = True) -> Any:
    """An adapter that was trained after two tokens were added, and the whole net that it was trained in."""
    net = AutoModelForCausalLM.from_pretrained(base)
    net.resize_token_embeddings(net.config.vocab_size + 2)
    torch.manual_seed(4)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(net, settings)
    wrapped.save_pretrained(str(folder), save_embedding_layers=True)
    if not save_head:
        retensor(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_tokens_of_its_own_resizes_its_base(tmp_path: Path, tied: bool) -> None:
    net = tiny.net(1)
    if not tied:
        net.config.tie_word_embeddings = False
        net.lm_head.weight = torch.nn.Parameter(torch.randn_like(net.lm_head.weight))
    base = tiny.save(net, tmp_path / "base")
    expected = with_tokens(base, tmp_path / "adapter").state_dict()
    model = load_model(str(tmp_path / "adapter"), "m")
    assert model.vocabulary == len(load_tokenizer(base)) + 2
    for name, value in model.net.state_dict().items():
        assert torch.equal(value.cpu(), expected[name]), name
    if not tied:
        with_tokens(base, tmp_path / "headless", save_head=False)
        with pytest.raises(ModelError, match=r"it holds no head of that size"):
            load_model(str(tmp_path / "headless"), "m")


@pytest.mark.parametrize(
    "places",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "use_dora": True,
            "alpha_pattern": {"q_proj": 9},
        },
    ],
)
def test_the_merged_model_gives_the_logits_of_the_adapter_on_its_base(
    student: str, tmp_path: Path, places: dict[str, Any]
) -> None:
    """Also where the adapter changes one of two matrices that are tied in the base."""
    net = AutoModelForCausalLM.from_pretrained(student)
    assert net.config.tie_word_embeddings
    torch.manual_seed(5)
    wrapped = get_peft_model(net, LoraConfig(r=2, init_lora_weights=False, **places))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                value.add_(torch.randn_like(value), alpha=0.1)
    wrapped.save_pretrained(str(tmp_path))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), str(tmp_path))(
            input_ids=ids
        ).logits
        model = load_model(str(tmp_path), "m")
        found = model.net(input_ids=here(ids)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tied = model.net.lm_head.weight is model.net.model.embed_tokens.weight
    assert model.net.config.tie_word_embeddings == tied


def test_an_adapter_of_the_hub_has_the_tokenizer_and_weights_of_its_base(
    student: str, tmp_path: Path
) -> None:
    """The hub cannot be reached; its cache holds the adapter and the base that the adapter names."""
    cache = tmp_path / "cache"
    for name, folder in (("some/base", Path(student)), ("some/adapter", adapter(student, tmp_path / "made"))):
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    expected = load_model(str(tmp_path / "made"), "m").net.state_dict()
    config = next(cache.glob("*adapter/snapshots/*/adapter_config.json"))
    named = {**json.loads(config.read_text()), "base_model_name_or_path": "some/base"}
    config.write_text(json.dumps(named))
    code = (
        "import sys, torch; from reflux.models.sizes import size_of; "
        "from reflux.models.text import load_model; "
        "torch.save((load_model('some/adapter', 'm').net.state_dict(), size_of('some/adapter', 'm')."
        "parameters), sys.argv[1])"
    )
    cached = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "found")], env=cached, check=True)
    found, parameters = torch.load(tmp_path / "found", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert parameters == size_of(student, "m").parameters
