"""The tokenizer of a GGUF file splits a text into the pieces of its model's own tokenizer, before it merges
bytes.

The expected pieces are made with the package regex from the patterns that define the models' tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import regex
from transformers.convert_slow_tokenizer import bytes_to_unicode

import tiny_gguf
from reflux.errors import ModelError
from reflux.models.text import load_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
TEXTS = (
    "123 + 45 = 168",
    "Total:\n\n12 apples at $3.50 each,  100 in all.\n\n5",
    "It's 1995's IT'S; we'll see 1234567",
    "  x = 4\t½ ٣٤  \r\n\r\n  end ",
    "2²³ Ⅷ 七十二",
    "",
)


def digits(text: str) -> list[str]:
    """Every numeric character on its own, and GPT-2's pieces of what is between them."""
    between = [part for part in regex.split(r"(\p{N})", text) if part]
    return [piece for part in between for piece in regex.findall(GPT2, part)]


def pieces(tokenizer: Any, text: str) -> list[str]:
    """The pieces in which the tokenizer merges, as text."""
    byte = {letter: value for value, letter in bytes_to_unicode().items()}
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(byte[letter] for letter in piece).decode() for piece, _ in split]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", lambda text: regex.findall(GPT2, text)),
        ("smollm", digits),
        ("starcoder", digits),
        ("llama-bpe", lambda text: regex.findall(LLAMA3, text)),
        ("qwen2", lambda text: regex.findall(QWEN2, text)),
    ],
)
def test_pieces_are_those_of_the_definition(tmp_path: Path, pre: str, expected: Any) -> None:
    tokenizer = load_tokenizer(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), pre=pre))
    assert [pieces(tokenizer, text) for text in TEXTS] == [expected(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        # GPT-2 keeps the last white space before a digit apart from the white space before it.
        ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "12"]),
        ("smollm", ["a", "ĊĊ", "1", "2", "Ġ", "1", "2"]),
        ("llama-bpe", ["a", "ĊĊ", "12", "Ġ", "12"]),
        ("qwen2", ["a", "ĊĊ", "1", "2", "Ġ", "1", "2"]),
    ],
)
def test_tokens_and_a_saved_tokenizer(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    tokenizer = load_tokenizer(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), pre=pre))
    assert tokenizer.tokenize("a\n\n12 12") == tokens
    assert tokenizer.decode(tokenizer("a\n\n12 12").input_ids) == "a\n\n12 12"
    tokenizer.save_pretrained(tmp_path / "saved")
    # AutoTokenizer needs to know what the model is.
    tiny_gguf.llama().config.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_piece_that_is_a_token_and_is_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_gguf.tokens()
    whole[-1] = "xyz"
    monkeypatch.setattr(tiny_gguf, "tokens", lambda: whole)
    monkeypatch.setattr(tiny_gguf, "MERGES", tiny_gguf.MERGES[:-1])
    file = tmp_path / "a.gguf"
    plain, llama3 = (
        load_tokenizer(tiny_gguf.write(file, tiny_gguf.llama(), pre=pre)).tokenize("xyz")
        for pre in ("gpt-2", "llama-bpe")
    )
    assert (plain, llama3) == (["x", "y", "z"], ["xyz"])


def test_characters_are_composed_where_the_model_does(tmp_path: Path) -> None:
    apart = "cafe\N{COMBINING ACUTE ACCENT}"
    for pre, composed in (("qwen2", True), ("smollm", False)):
        tokenizer = load_tokenizer(tiny_gguf.write(tmp_path / f"{pre}.gguf", tiny_gguf.llama(), pre=pre))
        assert (
            tokenizer(apart).input_ids == tokenizer("caf\N{LATIN SMALL LETTER E WITH ACUTE}").input_ids
        ) is composed


@pytest.mark.parametrize(
    ("pre", "said"),
    [("unheard", "has the tokenizer unheard"), (None, "does not say how its tokenizer splits")],
)
def test_a_split_that_is_not_known(tmp_path: Path, pre: str | None, said: str) -> None:
    file = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.llama(), pre=pre)
    with pytest.raises(
        ModelError, match=rf"^learner\.model: .*a\.gguf {said} .*Give the model in safetensors"
    ):
        load_tokenizer(file, "learner.model")


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
    "▁ab",
]


def sentencepiece(writer: Any, prefix: bool | None) -> None:
    """The settings of a sentencepiece tokenizer, in place of those of the byte-level one."""
    for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
        del writer.kv_data[0][key]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(place) for place in range(len(PIECES))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)


@pytest.mark.parametrize(
    ("architecture", "prefix", "said"),
    [
        ("llama", True, None),
        ("llama", None, None),
        ("llama", False, "puts no space before a text .* would put one"),
        ("gemma2", False, None),
        ("gemma2", None, None),
        ("gemma2", True, "puts a space before a text .* would put none"),
    ],
)
def test_a_space_before_a_text_is_that_of_the_file_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, prefix: bool | None, said: str | None
) -> None:
    settings = tiny_gguf.settings

    def changed(writer: Any, net: Any, pre: str | None) -> None:
        settings(writer, net, pre)
        sentencepiece(writer, prefix)

    monkeypatch.setattr(tiny_gguf, "settings", changed)
    net = tiny_gguf.llama(vocab_size=len(PIECES), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    file = tiny_gguf.write(tmp_path / "a.gguf", net, architecture=architecture)
    if said is None:
        first = "▁ab" if architecture == "llama" else "ab"
        assert load_tokenizer(file, "learner.model").tokenize("ab a") == [first, "▁a"]
    else:
        with pytest.raises(ModelError, match=rf"^learner\.model: .*a\.gguf has a tokenizer that {said}"):
            load_tokenizer(file, "learner.model")


@tiny_gguf.NEEDS_SMOLLM
def test_a_real_tokenizer() -> None:
    tokenizer = load_tokenizer(str(tiny_gguf.smollm()))
    # ids that HuggingFaceTB/SmolLM2-135M-Instruct gives
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer("  multiple   spaces").input_ids == [216, 2701, 256, 5600]
    assert tokenizer.tokenize("123 + 45.\n\n6") == ["1", "2", "3", "Ġ+", "Ġ", "4", "5", ".", "ĊĊ", "6"]
