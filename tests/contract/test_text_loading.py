"""A text model is loaded with exactly its own weights, or refused in a sentence that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.errors import ModelError
from reflux.models.cpu.precision import multiplies_natively
from reflux.models.folders import look_for_text
from reflux.models.sizes import size_of
from reflux.models.text import load_model


def llama(folder: Path, **changes: Any) -> Path:
    """A random LLaMA of two layers with a head of its own."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(character_tokenizer()), "eos_token_id": tiny.END, "bos_token_id": None}
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(**{**shape, **tokens, "max_position_embeddings": 64, **changes})
    return Path(tiny.save(transformers.LlamaForCausalLM(cfg), folder))


def rewrite(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the tensors of a folder; None drops one."""
    file = folder / "model.safetensors"
    kept = {new: value.clone() for old, value in load_file(file).items() if (new := rename(old)) is not None}
    save_file(kept, file, metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "teachers.main.model")
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_the_prefix_of_a_wrapper(tmp_path: Path, prefix: str) -> None:
    rewrite(llama(tmp_path), lambda key: prefix + key)
    said = refusal(tmp_path)
    assert "teachers.main.model" in said
    assert f"begin with {prefix}" in said


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_the_file_lacks(tmp_path: Path, lost: str) -> None:
    rewrite(llama(tmp_path), lambda key: None if key == lost else key)
    assert f"lack 1 tensors: {lost}" in refusal(tmp_path)


def test_more_layers_in_the_file_than_in_the_config(tmp_path: Path) -> None:
    reconfigure(llama(tmp_path), num_hidden_layers=1)
    said = refusal(tmp_path)
    assert "hold beside the model's own 9 tensors: model.layers.1." in said


def test_fewer_layers_in_the_file_than_in_the_config(tmp_path: Path) -> None:
    reconfigure(llama(tmp_path), num_hidden_layers=3)
    assert "lack 9 tensors: model.layers.2." in refusal(tmp_path)


def test_another_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    reconfigure(llama(tmp_path), intermediate_size=40)
    assert "down_proj.weight ([32, 48] in the file, [32, 40] by its config)" in refusal(tmp_path)


def test_a_lost_expert_of_a_mixture(tmp_path: Path) -> None:
    cfg = transformers.MixtralConfig(
        vocab_size=len(character_tokenizer()),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    tiny.save(transformers.MixtralForCausalLM(cfg), tmp_path)
    load_model(str(tmp_path), "m")
    rewrite(tmp_path, lambda key: None if "experts.2.w2" in key else key)
    assert "experts.down_proj" in refusal(tmp_path)


def test_two_different_matrices_are_kept_apart_where_the_config_ties_them(tmp_path: Path) -> None:
    reconfigure(llama(tmp_path), tie_word_embeddings=True)
    stored, model = load_file(tmp_path / "model.safetensors"), load_model(str(tmp_path), "m")
    assert torch.equal(model.net.lm_head.weight.cpu(), stored["lm_head.weight"])
    assert torch.equal(model.net.model.embed_tokens.weight.cpu(), stored["model.embed_tokens.weight"])
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert not model.net.config.tie_word_embeddings


def test_a_tied_head_that_is_not_stored_is_not_missing(tmp_path: Path) -> None:
    folder = llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(str(folder), "m")
    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight
    assert model.net.config.tie_word_embeddings


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.mtp.0.proj.weight", "mtp.fc.weight"]
)
def test_tables_of_older_versions_and_heads_further_ahead_are_left_out(tmp_path: Path, key: str) -> None:
    file = llama(tmp_path) / "model.safetensors"
    save_file({**load_file(file), key: torch.zeros(4)}, file, metadata={"format": "pt"})
    load_model(str(tmp_path), "m")


def test_a_layer_that_the_config_declares_as_predicting_further_ahead_is_left_out(tmp_path: Path) -> None:
    reconfigure(llama(tmp_path), num_hidden_layers=1, num_nextn_predict_layers=1)
    load_model(str(tmp_path), "m")
    reconfigure(tmp_path, num_hidden_layers=1, num_nextn_predict_layers=0)
    assert "model.layers.1." in refusal(tmp_path)


def test_the_text_model_of_a_larger_one_leaves_out_the_rest(tmp_path: Path) -> None:
    text = {
        "vocab_size": len(character_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 2,
    }
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    projected = {"projector_input_dim": 32, "projector_output_dim": 32}
    cfg = transformers.Llama4Config(text_config=text, vision_config={**sight, **size, **projected})
    tiny.save(transformers.Llama4ForConditionalGeneration(cfg), tmp_path)
    assert any("vision" in key for key in load_file(tmp_path / "model.safetensors"))
    load_model(str(tmp_path), "m")
    rewrite(
        tmp_path, lambda key: key.replace("language_model.model.layers.1", "language_model.model.layers.2")
    )
    assert "layers.1." in refusal(tmp_path)


def shards(folder: Path) -> list[Path]:
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (folder / "model.safetensors").write_text(text)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (pointer, "git lfs pull"),
    "cut": (lambda folder: cut(folder, -100), "Download it again"),
    "cut in its table": (lambda folder: cut(folder, 100), "not a whole safetensors file"),
    "empty": (lambda folder: cut(folder, 0), "not a whole safetensors file (0 bytes)"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "pickle": (only_pickle, "pytorch_model.bin is of another format"),
    "lost shard": (lambda folder: shards(folder)[1].unlink(), "lacks 1 of the"),
    "config": (lambda folder: (folder / "config.json").write_text('{"a": '), "JSON"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_files_that_are_not_whole_are_named_in_plan_and_on_loading(tmp_path: Path, harm: str) -> None:
    folder = llama(tmp_path / "model")
    harmed, words = HARMS[harm]
    harmed(folder)
    assert words in refusal(folder)
    with pytest.raises(ModelError, match=r"^learner\.model: ") as caught:
        size_of(str(folder), "learner.model")
    assert words in str(caught.value)


def test_a_second_copy_and_shards_count_once(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    expected = size_of(str(folder), "m").parameters
    assert expected == sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert size_of(str(folder), "m").parameters == expected
    assert len(shards(folder)) > 1
    assert size_of(str(folder), "m").parameters == expected


def other_kind(name: str) -> Any:
    size = {"vocab_size": len(character_tokenizer())}
    wide = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    both = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "d_model": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "BartForConditionalGeneration": ("BartConfig", both | heads),
        "T5ForConditionalGeneration": ("T5Config", {"d_model": 32, "num_layers": 1, "d_ff": 32, "d_kv": 16}),
        "BertForMaskedLM": ("BertConfig", wide),
        "BertLMHeadModel": ("BertConfig", wide | {"initializer_range": 0.5}),
        "XLNetLMHeadModel": (
            "XLNetConfig",
            {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "initializer_range": 0.5},
        ),
        "LlamaForSequenceClassification": ("LlamaConfig", wide | {"pad_token_id": 0}),
    }
    kind, shape = shapes[name]
    return getattr(transformers, name)(getattr(transformers, kind)(**size, **shape))


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("BartForConditionalGeneration", True),
        ("T5ForConditionalGeneration", True),
        ("BertForMaskedLM", True),
        ("LlamaForSequenceClassification", True),
        ("BertLMHeadModel", False),
        ("XLNetLMHeadModel", False),
    ],
)
def test_what_is_no_causal_language_model(tmp_path: Path, name: str, before: bool) -> None:
    """before: config.json alone tells. The last two are found by the logits, which see later tokens."""
    torch.manual_seed(0)
    folder = Path(tiny.save(other_kind(name), tmp_path))
    assert "causal language model" in refusal(folder)
    if before:
        with pytest.raises(ModelError, match="Give a causal language model"):
            look_for_text(str(folder), "m")


def test_a_quantised_student_is_refused_and_a_quantised_teacher_names_the_package(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    reconfigure(llama(tmp_path), quantization_config=settings)
    look_for_text(str(tmp_path), "teachers.main.model")
    with pytest.raises(ModelError, match=r"learner.model: the weights of .* are quantised \(bitsandbytes\)"):
        look_for_text(str(tmp_path), "learner.model", trained=True)
    assert "bitsandbytes" in refusal(tmp_path)


def test_attention_of_a_package_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"flash_attention_2"):
        load_model(str(llama(tmp_path)), "m", attention="flash_attention_2")
    with pytest.raises(ModelError, match=r"flashy"):
        load_model(str(tmp_path), "m", attention="flashy")


def test_the_shipped_models_load(student: str) -> None:
    for name in ("reflux:student", "reflux:novice", "reflux:reader", student):
        load_model(name, "m")


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    file = llama(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    said = refusal(tmp_path)
    assert "1 of its tensors hold NaN or infinity: model.layers.1.mlp.up_proj.weight" in said


def test_weights_of_no_rows_are_named(tmp_path: Path) -> None:
    """As training in shards leaves them where the shards were not gathered."""
    file = llama(tmp_path) / "model.safetensors"
    save_file({key: torch.zeros(0) for key in load_file(file)}, file, metadata={"format": "pt"})
    assert "lm_head.weight ([0] in the file, " in refusal(tmp_path)


@pytest.mark.parametrize(("kind", "named"), [("bfloat16", None), ("float16", None), ("bfloat16", "float16")])
def test_the_stored_dtype_is_that_of_the_config_or_else_of_the_files(
    tmp_path: Path, kind: str, named: str | None
) -> None:
    file = llama(tmp_path) / "model.safetensors"
    stored = {key: value.to(getattr(torch, kind)) for key, value in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    reconfigure(tmp_path, dtype=named)
    expected = getattr(torch, named or kind)
    assert load_model(str(tmp_path), "m", dtype="float32").stored_dtype == expected
    asked = expected if multiplies_natively(expected) else torch.float32
    assert load_model(str(tmp_path), "m", device="cpu").net.dtype == asked


@pytest.mark.parametrize("change", [{"num_hidden_layers": "two"}, {"hidden_act": "none"}])
def test_values_that_the_config_class_does_not_take_are_told(tmp_path: Path, change: dict[str, str]) -> None:
    folder = llama(tmp_path)
    reconfigure(folder, **change)
    said = refusal(folder)
    assert "cannot be loaded: " in said
    assert next(iter(change)) in said or "none" in said


def test_a_generation_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """transformers would leave out its end tokens."""
    (llama(tmp_path) / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read as JSON" in refusal(tmp_path)


def test_tied_weights_may_be_stored_under_either_name_but_not_under_none(tmp_path: Path) -> None:
    folder = llama(tmp_path, tie_word_embeddings=True)
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda key: "lm_head.weight" if "embed_tokens" in key else key)
    assert torch.equal(load_model(str(folder), "m").net.model.embed_tokens.weight.cpu(), rows)
    rewrite(folder, lambda key: None if "lm_head" in key else key)
    assert "lack 2 tensors: lm_head.weight, model.embed_tokens.weight" in refusal(folder)
