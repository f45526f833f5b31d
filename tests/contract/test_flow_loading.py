"""Loading a flow model: Stable Diffusion 3 from random numbers beside diffusers' own pipeline, types, the
hub's cache, and refusals.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_flow
from reflux.errors import ModelError
from reflux.models.flow import frozen
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.load import load_flow, load_net, outline_flow
from reflux.models.sizes import size_of

PROMPTS = ["a red cube", "two cats"]
HUB_ID = "someone/tiny-flow"


def clip(width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
        )
    )


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    return CLIPTokenizer(vocab={word: row for row, word in enumerate(words)}, merges=[], model_max_length=77)


def t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *[(piece, -2.0) for piece in "\u2581abcdefghijklmnopqrstuvwxyz"],
    ]
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    return encoder, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 of random numbers, saved by diffusers: the transformer in float16, its encoders in
    bfloat16, its decoder in float32.
    """
    torch.manual_seed(0)
    transformer = library().SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    )
    for value in transformer.parameters():
        torch.nn.init.normal_(value, 0, 0.1 if value.ndim == 1 else value[0].numel() ** -0.5)
    vae = library().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encoder, tokenizer_3 = t5()
    pipeline = library().StableDiffusion3Pipeline(
        transformer.half(),
        library().FlowMatchEulerDiscreteScheduler(shift=1.18),
        vae,
        clip(8).bfloat16(),
        clip_tokenizer(),
        clip(8).bfloat16(),
        clip_tokenizer(),
        encoder.bfloat16(),
        tokenizer_3,
    )
    folder = tmp_path_factory.mktemp("sd3") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_t5(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "small"
    shutil.copytree(sd3, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    return folder


def change_index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    index = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in index.items() if value != "absent"}))


def diffusers_pictures(folder: Path, noise: torch.Tensor, guidance: float, **absent: None) -> np.ndarray:
    """uint8 [2, height, width, 3] of the pipeline itself, in float32."""
    pipeline = library().StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPTS,
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=noise,
        output_type="np",
    )
    return (made.images * 255).round().astype(np.uint8)


def our_pictures(folder: Path, noise: torch.Tensor, guidance: float) -> np.ndarray:
    model = load_flow(str(folder), "here", device="cpu")
    assert model.shape(8) == tuple(noise.shape[1:])
    x_ND, t_S = noise.flatten(1), model.grid(3)
    with torch.no_grad():
        for t, dt in zip(t_S[:-1], np.diff(t_S), strict=True):
            x_ND = x_ND + float(dt) * model.velocity(x_ND, torch.full((2,), float(t)), PROMPTS, guidance)
    return np.stack(model.images(x_ND))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_of_the_ode_are_diffusers_own(sd3: Path, guidance: float) -> None:
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs, ours = diffusers_pictures(sd3, noise, guidance), our_pictures(sd3, noise, guidance)
    assert theirs.std() > 5
    assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("entry", ["absent", [None, None]])
def test_a_model_may_go_without_t5(without_t5: Path, tmp_path: Path, entry: Any) -> None:
    folder = Path(shutil.copytree(without_t5, tmp_path / "small"))
    change_index(folder, text_encoder_3=entry, tokenizer_3=entry)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs = diffusers_pictures(folder, noise, 4.0, text_encoder_3=None, tokenizer_3=None)
    assert np.abs(theirs.astype(int) - our_pictures(folder, noise, 4.0)).max() <= 1


def test_t5_that_is_named_and_not_there_is_refused(without_t5: Path) -> None:
    with pytest.raises(ModelError, match=r"the text encoders of .* cannot be loaded"):
        load_flow(str(without_t5), "here", device="cpu")


# --- types


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoders_and_decoder_have_a_type_of_their_own(sd3: Path, dtype: str) -> None:
    model = load_flow(str(sd3), "here", dtype=dtype, device="cpu")
    assert (model.net.dtype, model.stored_dtype) == (getattr(torch, dtype), torch.float16)
    tokens_BLJ, pooled_BP = model.encode(["a cat"])
    assert (tokens_BLJ.dtype, pooled_BP.dtype) == (torch.float32, torch.float32)
    assert model.decode is not None
    assert model.decode(torch.zeros(1, 4, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "encoders", "decoder"),
    [("cpu", torch.float32, torch.float32), ("cuda", torch.bfloat16, torch.float16)],
)
def test_on_a_gpu_they_are_as_stored(
    sd3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    encoders: torch.dtype,
    decoder: torch.dtype,
) -> None:
    folder = Path(shutil.copytree(sd3, tmp_path / "model"))
    library().AutoencoderKL.from_pretrained(folder / "vae").half().save_pretrained(folder / "vae")
    asked: dict[str, torch.dtype] = {}

    class Loaded:
        class config:
            block_out_channels = (1, 1)

        def to(self, _: Any) -> Loaded:
            return self

        def requires_grad_(self, _: bool) -> Loaded:
            return self

    def recorder(name: str) -> Any:
        return lambda *_, torch_dtype, **__: asked.update({name: torch_dtype}) or Loaded()

    monkeypatch.setattr(library().StableDiffusion3Pipeline, "from_pretrained", recorder("encoders"))
    monkeypatch.setattr(frozen, "load_part", lambda *told: asked.update({"decoder": told[-1]}) or Loaded())
    frozen.load_encoders(str(folder), "here", device)
    frozen.load_decoder(str(folder), "here", device)
    assert asked == {"encoders": encoders, "decoder": decoder}


@pytest.mark.parametrize("loads", [load_flow, load_net])
def test_an_unknown_type_is_refused_by_name(tmp_path: Path, loads: Any) -> None:
    with pytest.raises(ModelError, match=r"dtype = 'fp16'\. Choose auto, float32, bfloat16, float16\."):
        loads(tiny_flow.save(tmp_path, 0), "here", dtype="fp16")


# --- weights that are not the model's


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NET = "transformer/diffusion_pytorch_model.safetensors"
PROJECTION = "transformer_blocks.1.attn.to_q.weight"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (NET, lambda tensors: tensors.pop(PROJECTION), f"lack 1 tensors: {PROJECTION}"),
        (NET, lambda tensors: tensors.update({"module.x": torch.zeros(1)}), "begin with module"),
        (NET, lambda tensors: tensors.update({PROJECTION: torch.zeros(3, 16)}), "another shape 1 tensors"),
        (
            "text_encoder_2/model.safetensors",
            lambda tensors: tensors.pop(min(tensors)),
            r"\(text_encoder_2\).*lack 1 tensors",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            lambda tensors: tensors.pop(min(tensors)),
            r"\(vae\).*lack 1 tensors",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    sd3: Path, tmp_path: Path, file: str, change: Any, words: str
) -> None:
    folder = Path(shutil.copytree(sd3, tmp_path / "model"))
    rewrite(folder / file, change)
    with pytest.raises(ModelError, match=words):
        load_flow(str(folder), "learner.model", device="cpu")


@pytest.mark.parametrize("part", ["transformer", "prompts"])
def test_files_that_are_not_whole_are_refused_in_plan_too(tmp_path: Path, part: str) -> None:
    name = tiny_flow.save(tmp_path, 0)
    (file,) = (tmp_path / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    for look in (load_flow, size_of):
        with pytest.raises(ModelError, match=rf"learner\.model: .*{part}"):
            look(name, "learner.model")


def test_a_table_of_prompts_of_another_shape_is_refused(tmp_path: Path) -> None:
    name = tiny_flow.save(tmp_path, 0)
    rewrite(
        tmp_path / "prompts" / "prompts.safetensors",
        lambda tensors: tensors.update({"rows.weight": tensors["rows.weight"][1:].contiguous()}),
    )
    with pytest.raises(ModelError, match=r"learner\.model: the flow model .* cannot be loaded"):
        load_flow(name, "learner.model", device="cpu")


# --- where it is


def test_a_student_names_its_encoders_from_anywhere(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sd3.parent)
    load_flow(os.path.relpath(sd3), "here", device="cpu").save(tmp_path / "run" / "student")
    monkeypatch.chdir(tmp_path)
    again = load_flow("run", "here", device="cpu")
    assert again.source == str(sd3.resolve())
    assert again.encode(["a"])[0].shape == (1, 77 + 256, 24)
    assert outline_flow("run", "here").source == again.source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, folder: Path) -> Path:
    """`folder` as the hub's cache holds a model."""
    place = cache / f"models--{HUB_ID.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(folder, place / "snapshots" / ("a" * 40)))


def test_a_model_of_the_hub_is_known_by_its_stored_type_and_its_id(cache: Path, sd3: Path) -> None:
    snapshot = put(cache, sd3)
    # a second copy, first by name
    extra = snapshot / "transformer" / "diffusion_pytorch_model.a_fp16.safetensors"
    library().SD3Transformer2DModel.from_pretrained(sd3, subfolder="transformer").float().save_pretrained(
        cache / "copy"
    )
    shutil.copy(cache / "copy" / "diffusion_pytorch_model.safetensors", extra)
    model = load_flow(HUB_ID, "here", device="cpu")
    assert (model.stored_dtype, model.net.dtype, model.source) == (torch.float16, torch.float32, HUB_ID)
    assert model.encode(["a"])[1].shape == (1, 16)
    assert outline_flow(HUB_ID, "here").source == HUB_ID


def test_a_table_of_prompts_comes_from_the_hub_too(cache: Path, tmp_path: Path) -> None:
    put(cache, Path(tiny_flow.save(tmp_path / "made", 0, torch.bfloat16)))
    model = load_flow(HUB_ID, "here", device="cpu")
    assert model.stored_dtype == torch.bfloat16
    assert model.net.prompts is not None
    assert model.net.prompts.texts == tiny_flow.TEXTS


def test_only_what_is_needed_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, sd3: Path, tmp_path: Path
) -> None:
    """The outline takes no weights, the model no second copies and nobody a pickle."""
    files = [
        *(
            "model_index.json",
            "scheduler/scheduler_config.json",
            "transformer/config.json",
            "vae/config.json",
            "README.md",
        ),
        *(
            "transformer/diffusion_pytorch_model.safetensors",
            "transformer/diffusion_pytorch_model.fp16.safetensors",
        ),
        *(
            "text_encoder/model.safetensors",
            "text_encoder/model.fp16.safetensors",
            "text_encoder/pytorch_model.bin",
        ),
        *(
            "text_encoder_3/model-00001-of-00002.safetensors",
            "text_encoder_3/model.safetensors.index.json",
            "tokenizer_3/spiece.model",
        ),
        *(
            "text_encoders/t5xxl_fp8.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "sd3.safetensors",
        ),
    ]
    given: list[set[str]] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        given.append(
            set(
                huggingface_hub.utils.filter_repo_objects(
                    files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                )
            )
        )
        return str(sd3)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    outline_flow(HUB_ID, "here")
    load_flow(HUB_ID, "here", device="cpu")
    outline, model, encoders, decoder = given
    assert outline == set(files[:3])
    assert model == outline | {"transformer/diffusion_pytorch_model.safetensors"}
    assert encoders == decoder == {files[0], files[2], files[3], files[7], *files[10:13], files[14]}


@pytest.mark.parametrize("loads", [load_flow, load_net, outline_flow])
def test_a_model_the_hub_does_not_give_is_refused_in_a_sentence(cache: Path, loads: Any) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"here: the flow model someone/tiny-flow cannot be loaded: "
            r".*If the model is gated, .* log in .*login"
        ),
    ):
        loads(HUB_ID, "here")


def test_a_proxy_that_refuses_is_no_traceback(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> str:
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="403 Forbidden"):
        outline_flow(HUB_ID, "here")


@pytest.mark.parametrize("loads", [load_flow, outline_flow])
def test_a_repository_that_is_no_pipeline_is_refused(cache: Path, tmp_path: Path, loads: Any) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    put(cache, folder)
    with pytest.raises(ModelError, match=r"is not a flow model: .* no model_index\.json"):
        loads(HUB_ID, "here")


# --- schedulers


@pytest.mark.parametrize(
    "fields", [{"use_dynamic_shifting": True}, {"invert_sigmas": True}, {"shift_terminal": 0.02}]
)
@pytest.mark.parametrize("loads", [load_flow, outline_flow])
def test_a_scheduler_with_other_times_is_refused_by_its_field(
    tmp_path: Path, fields: dict[str, Any], loads: Any
) -> None:
    folder = tiny_flow.save(tmp_path, 0)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(
        ModelError, match=f"here: the scheduler of .* sets {next(iter(fields))} = .*not supported"
    ):
        loads(folder, "here")


def test_an_outline_without_a_transformer_is_refused(tmp_path: Path) -> None:
    folder = tiny_flow.save(tmp_path, 0)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(ModelError, match=r"here: the flow model .* cannot be loaded"):
        outline_flow(folder, "here")
