"""A small tokenizer with a chat template, and prompts of unequal lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|turn|>", "<|end|>"
TEMPLATE = (
    f"{{% for message in messages %}}{START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{END}\n"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)
TOKENS = 320


def tokenizer() -> Any:
    """Bytes and some merges of them."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["user assistant", *(question(i) for i in range(40))], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=PAD)
    made.chat_template = TEMPLATE
    return made


def question(number: int) -> str:
    """The greater the number modulo 5, the longer the question."""
    return f"Add {number} and {number + 1}." + " Show your work." * (number % 5)


def write_prompts(path: Path, count: int) -> Path:
    rows = ({"id": f"q{i}", "prompt": question(i), "answer": 2 * i + 1} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
