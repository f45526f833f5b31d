"""A GGUF file is a model like a folder: the same logits as the model it was made from, its own tokenizer and
ends, and a student that is saved as safetensors. Files that transformers would read wrongly are refused.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from peft import LoraConfig, get_peft_model

import tiny
import tiny_gguf
from reflux.config.context import StudentSpec
from reflux.config.recipe import load_recipe
from reflux.errors import ModelError
from reflux.inspection.plan import plan
from reflux.loop import train
from reflux.models.folders import look_for_flow, look_for_text
from reflux.models.generation_file import end_ids_of
from reflux.models.gguf_header import read_gguf
from reflux.models.gguf_kind import refuse_unread
from reflux.models.locations import local_folder, locate
from reflux.models.sizes import size_of
from reflux.models.text import load_model, load_tokenizer
from reflux.training import Options

IDS = torch.arange(3, 40)[None]


def dequantised(net: Any, kind: str) -> Any:
    """The net with its matrices rounded to a type of GGUF, which is what a file of this type holds."""
    form = GGMLQuantizationType[kind]
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim == 2:
                # The file has some rows in another order, but a block is a part of one row.
                rounded = quants.dequantize(quants.quantize(value.numpy(), form), form)
                value.copy_(torch.from_numpy(rounded.astype(np.float32)))
    return net


def logits(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(IDS).logits


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_logits_are_those_of_the_model_that_the_file_was_made_from(tmp_path: Path, kind: str) -> None:
    net = tiny_gguf.llama()
    file = tiny_gguf.write(tmp_path / "a.gguf", net, kind)
    model = load_model(file, "learner.model", dtype="float32", device="cpu")
    # float32 throughout, so only the order of sums may differ
    torch.testing.assert_close(logits(model.net), logits(dequantised(net, kind)), rtol=1e-4, atol=1e-4)
    assert model.net.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.net.parameters())


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    net = tiny_gguf.llama(tie_word_embeddings=False)
    model = load_model(tiny_gguf.write(tmp_path / "a.gguf", net), "learner.model", device="cpu")
    torch.testing.assert_close(logits(model.net), logits(net), rtol=1e-4, atol=1e-4)
    assert model.net.lm_head.weight is not model.net.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_1", "float32")]
)
def test_the_stored_dtype_is_that_of_plain_weights_and_float32_of_quantised_ones(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), kind)
    model = load_model(file, "teachers.main.model", device="cpu")
    assert model.stored_dtype == getattr(torch, dtype)
    assert [kind in note for note in model.notes if "dequantised" in note] == [True] * (kind == "Q4_1")


def test_tokenizer_template_and_ends_are_those_of_the_file(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama())
    tokenizer = load_tokenizer(file)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tiny_gguf.tokens())}
    assert tokenizer("the inn").input_ids == [tokenizer.get_vocab()[t] for t in ("the", "Ġ", "in", "n")]
    model = load_model(file, "learner.model", device="cpu")
    assert model.end_ids == (tiny_gguf.END,) == end_ids_of(StudentSpec(file), "learner.model", tokenizer)
    assert model.context_tokens == 256
    asked = model.renderer(None, None).text([{"role": "user", "content": "hi"}])
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_size_without_torch(tmp_path: Path) -> None:
    net = tiny_gguf.llama()
    file = tiny_gguf.write(tmp_path / "a.gguf", net, "Q4_1")
    found = size_of(file, "learner.model")
    assert found.parameters == net.num_parameters() == found.macs
    assert found.stored_bytes == 4 * net.num_parameters()
    assert found.context_tokens == 256
    assert found.architecture == "llama (GGUF)"
    code = (
        "import sys; from reflux.models.sizes import size_of;"
        "from reflux.models.folders import look_for_text;"
        f"look_for_text({file!r}, 'm', trained=True); size_of({file!r}, 'm');"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_run_with_a_student_and_a_teacher_in_gguf(tmp_path: Path) -> None:
    student = tiny_gguf.write(tmp_path / "s.gguf", tiny_gguf.llama(0), "Q8_0")
    teacher = tiny_gguf.write(tmp_path / "t.gguf", tiny_gguf.llama(1), "F32")
    heard = tiny.Heard()
    cfg = tiny.config("full", student, teacher, steps=2, task={"kind": "outside:Chat"})
    asyncio.run(train(cfg, Options(tmp_path / "run", watch=heard)))
    assert [note for note in heard.notes if "dequantised" in note] == [
        f"{student} is quantised (Q8_0). It is dequantised, and a student is saved in float32."
    ]
    again = load_model(str(tmp_path / "run"), "learner.model", device="cpu")
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    before = load_model(student, "learner.model", device="cpu")
    assert again.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == before.tokenizer.chat_template
    assert again.end_ids == before.end_ids
    assert not torch.equal(logits(again.net), logits(before.net))


def refusal(file: str) -> str:
    with pytest.raises(ModelError) as caught:
        look_for_text(file, "learner.model", trained=True)
    assert str(caught.value).startswith("learner.model: ")
    with pytest.raises(ModelError) as loaded:
        load_model(file, "learner.model", device="cpu")
    assert str(loaded.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"type_": "adapter"}, "is a LoRA adapter. Merge it"),
        ({"type_": "mmproj"}, "reads images"),
        ({"architecture": "clip"}, "reads images"),
        ({"more": {"split.count": 3}}, "one of 3 parts"),
        ({"more": {"{arch}.rope.scaling.type": "yarn", "{arch}.rope.scaling.factor": 4.0}}, "rotary"),
        ({"more": {"{arch}.rope.scale_linear": 2.0}}, "rotary"),
        ({"extra": {"rope_freqs.weight": np.ones(8, dtype=np.float32)}}, "rotary"),
    ],
)
def test_files_that_are_no_whole_model_or_are_read_wrongly(tmp_path: Path, made: Any, said: str) -> None:
    text = refusal(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), **made))
    assert said in text
    assert "a.gguf" in text


def test_rope_scaling_that_changes_nothing_is_read(tmp_path: Path) -> None:
    more = {"{arch}.rope.scaling.type": "none", "{arch}.rope.scaling.factor": 1.0}
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), more=more)
    look_for_text(file, "learner.model", trained=True)
    assert load_model(file, "learner.model", device="cpu").context_tokens == 256


def loading(file: str) -> str:
    """What is said on loading of a file whose header shows nothing wrong."""
    look_for_text(file, "learner.model", trained=True)
    with pytest.raises(ModelError) as caught:
        load_model(file, "learner.model", device="cpu")
    return str(caught.value)


def test_what_transformers_leaves_out_is_refused(tmp_path: Path) -> None:
    net = tiny_gguf.llama()
    windowed = tiny_gguf.write(tmp_path / "a.gguf", net, more={"{arch}.attention.sliding_window": 8})
    assert "does not read attention.sliding_window of" in loading(windowed)
    bias = {"blk.0.attn_k.bias": np.ones(32, dtype=np.float32)}
    more = loading(tiny_gguf.write(tmp_path / "b.gguf", net, extra=bias))
    assert f"holds {net.num_parameters() + 32} weights" in more
    assert f"has {net.num_parameters()}" in more


def test_settings_that_transformers_reads_otherwise(tmp_path: Path) -> None:
    net = tiny_gguf.llama()
    header = read_gguf(tiny_gguf.write(tmp_path / "a.gguf", net), "learner.model")
    refuse_unread(header, net.config, net.num_parameters(), "a", "learner.model")
    other = tiny_gguf.llama(rope_theta=10_000.0).config
    with pytest.raises(ModelError, match=r"does not read rope.freq_base of a \(llama\)"):
        refuse_unread(header, other, net.num_parameters(), "a", "learner.model")


def test_a_tensor_that_the_file_lacks(tmp_path: Path) -> None:
    net = tiny_gguf.llama()
    shorter = tiny_gguf.llama(num_hidden_layers=1)
    shorter.config.num_hidden_layers = 2
    assert net.config.num_hidden_layers == 2
    assert "lack 9 tensors: model.layers.1." in loading(tiny_gguf.write(tmp_path / "a.gguf", shorter))


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    said = loading(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), architecture="unheard"))
    assert "architecture unheard is not supported" in said
    assert "learner.model: the tokenizer of" in said


def test_damaged_files(tmp_path: Path) -> None:
    whole = Path(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama())).read_bytes()
    for number, (content, said) in enumerate(
        (
            (b"", "is not a GGUF file"),
            (b"PK" + whole[2:], "is not a GGUF file"),
            (whole[:5], "is not a whole GGUF file (5 bytes)"),
            (whole[:900], "is not a whole GGUF file (900 bytes)"),
            (whole[:-4], "is not a whole GGUF file"),
        )
    ):
        file = tmp_path / f"damaged{number}.gguf"
        file.write_bytes(content)
        assert said in refusal(str(file))
        with pytest.raises(ModelError, match="GGUF file"):
            size_of(str(file), "learner.model")


def test_names_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the file .*no\.gguf does not exist"):
        locate(str(tmp_path / "no.gguf"), "learner.model")
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama())
    with pytest.raises(ModelError, match=f"It holds a GGUF file: give {file}"):
        locate(str(tmp_path), "learner.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ModelError, match=r"Give the file a\.gguf itself"):
        size_of(str(tmp_path), "learner.model")
    assert local_folder(file) is None
    with pytest.raises(ModelError, match="is not a flow model"):
        look_for_flow(file, "learner.model", "hf")
    with pytest.raises(ModelError, match="no other base model"):
        look_for_text(file, "learner.model", base="other")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="Install it: pip install gguf"):
        size_of(file, "learner.model")


def test_a_plan(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), "Q8_0")
    found = plan(load_recipe("full", {"base": "toy", "learner.model": file, "teachers.main.model": file}))
    weights = tiny_gguf.llama().num_parameters()
    assert found.student.parameters == found.teachers["main"].parameters == weights
    # master weights, gradient and two moments; the sampler's copy; the teacher: each in float32
    assert found.memory_bytes == weights * 4 * (4 + 1 + 1)


def test_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    net = tiny_gguf.llama()
    file = tiny_gguf.write(tmp_path / "a.gguf", net)
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = wrapped(IDS).logits
    merged = load_model(str(tmp_path / "adapter"), "teachers.main.model", base=file, device="cpu")
    torch.testing.assert_close(logits(merged.net), wanted, rtol=1e-4, atol=1e-4)
    assert (
        size_of(str(tmp_path / "adapter"), "teachers.main.model", base=file).parameters
        == tiny_gguf.llama().num_parameters()
    )


@tiny_gguf.NEEDS_SMOLLM
@pytest.mark.timeout(1200)
def test_a_real_model_answers(tmp_path: Path) -> None:
    model = load_model(str(tiny_gguf.smollm()), "learner.model", device="cpu")
    assert (model.vocabulary, model.net.config.num_hidden_layers, model.net.config.hidden_size) == (
        49152,
        30,
        576,
    )
    ids = model.renderer(None, None).ids([{"role": "user", "content": "What is the capital of France?"}])
    answer = model.net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0][len(ids) :]
    assert "Paris" in model.tokenizer.decode(answer)
    assert int(answer[-1]) in model.end_ids
    model.net.save_pretrained(tmp_path)
