"""Random Qwen3-shaped models with one made-up tokenizer, and prompts, for timing without a download. The
student has the shape of Qwen3-0.6B, the teacher that of Qwen3-1.7B.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

# (rows of the output head, tokens of the tokenizer)
VOCABULARY, TINY_VOCABULARY = (151_936, 151_669), (512, 500)
END, PAD = 1, 2
SHAPES: dict[str, dict[str, int]] = {
    "student": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "teacher": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def make_models(folder: Path, tiny: bool, names: tuple[str, ...] = ("student", "teacher")) -> None:
    """Write the models in bfloat16. tiny: toy shapes, to check a script on a CPU."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    rows, words = TINY_VOCABULARY if tiny else VOCABULARY
    vocabulary = {"<unk>": 0, "<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(3, words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    )
    for number, name in enumerate(names):
        shape: dict[str, Any] = (TINY | TINY_HEADS) if tiny else (SHAPES[name] | HEADS)
        ends = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": None}
        config = Qwen3Config(
            vocab_size=rows, max_position_embeddings=4096, tie_word_embeddings=True, **ends, **shape
        )
        torch.manual_seed(number)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            net: Any = Qwen3ForCausalLM(config)
        net.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_prompts(folder: Path, tiny: bool, count: int = 4096) -> Path:
    """Prompts of 60 to 130 tokens."""
    dice, words = random.Random(0), (TINY_VOCABULARY if tiny else VOCABULARY)[1]
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(f"w{dice.randrange(3, words)}" for _ in range(dice.randrange(60, 131)))
            file.write(json.dumps({"id": f"p{number}", "prompt": text}) + "\n")
    return path
