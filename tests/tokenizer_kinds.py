"""Small tokenizers of the kinds that models have, trained in a moment on a few sentences."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Turns are opened and closed by added tokens, as most families do.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns are opened and closed by words, as Llama 2 and Vicuna do.
WORDED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TIGHT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = [
    "Ann has 12 pears and buys 7. How many? It is 19.\n2 + 3 = 5. \\boxed{5} #### 18",
    "user assistant system: [INST] hello world [/INST] the answer, héllo.",
] * 20
MARKS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finished(core: Tokenizer, template: str | None, begin: bool = True) -> Any:
    """A tokenizer of transformers, with the tokens of turns added. begin: <s> comes before every text."""
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def trained(core: Tokenizer, trainer: Any) -> Tokenizer:
    core.train_from_iterator(TEXTS, trainer)
    return core


def byte_level(template: str | None = None) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"initial_alphabet": alphabet, "special_tokens": MARKS, "show_progress": False}
    return finished(trained(core, trainers.BpeTrainer(vocab_size=380, **settings)), template, begin=False)


def prefixed_bytes(template: str | None = None) -> Any:
    """A byte-level BPE that adds a space before a text."""
    tokenizer = byte_level(template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def with_bytes(core: Tokenizer) -> Tokenizer:
    """The same BPE, with a token for each byte that no other token covers."""
    state = json.loads(core.to_str())["model"]
    vocabulary = state["vocab"]
    vocabulary |= {token: len(vocabulary) + place for place, token in enumerate(BYTES)}
    merges = [tuple(merge) for merge in state["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(MARKS)
    return made


def sentence_pieces(template: str | None = None, scheme: str | None = None) -> Any:
    """scheme None: the normalizer of Llama's first converters, which adds a space before every piece of text
    between added tokens. Else the scheme of Metaspace: "first", "always" or "never".
    """
    settings = {"vocab_size": 300, "special_tokens": MARKS, "show_progress": False}
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core = with_bytes(trained(core, trainers.BpeTrainer(**settings)))
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if scheme is None:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer, core.decoder = normalizers.Sequence(steps), decoders.Sequence(undo)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        core.decoder = decoders.Sequence(undo[: 3 if scheme == "never" else 4])
    return finished(core, template)


def unigram(template: str | None = None, scheme: str = "always") -> Any:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    settings = {"vocab_size": 120, "special_tokens": MARKS, "unk_token": "<unk>", "show_progress": False}
    return finished(trained(core, trainers.UnigramTrainer(**settings)), template)


def word_pieces(template: str | None = None) -> Any:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    settings = {"vocab_size": 200, "special_tokens": MARKS, "show_progress": False}
    return finished(trained(core, trainers.WordPieceTrainer(**settings)), template)


KINDS: dict[str, Callable[..., Any]] = {
    "byte-level": byte_level,
    "byte-level with a prefix space": prefixed_bytes,
    "Llama's first": sentence_pieces,
    "Metaspace first": functools.partial(sentence_pieces, scheme="first"),
    "Metaspace always": functools.partial(sentence_pieces, scheme="always"),
    "Metaspace never": functools.partial(sentence_pieces, scheme="never"),
    "Unigram always": unigram,
    "Unigram first": functools.partial(unigram, scheme="first"),
    "Unigram never": functools.partial(unigram, scheme="never"),
    "word pieces": word_pieces,
}
