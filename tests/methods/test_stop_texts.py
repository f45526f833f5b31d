"""Where a stop text ends, inside a token or across several."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from reflux.models.stop_texts import StopTexts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with some long tokens, among them "a\n\nQ"."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256,
        special_tokens=["<end>", "<tool>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["x"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    made.add_tokens([AddedToken("a\n\nQ", normalized=False), AddedToken("stop", normalized=False)])
    return made


def first_stop(tokenizer: Any, text: str, *stop: str) -> tuple[int, int] | None:
    """(number of tokens up to the one that ends a stop text, characters beyond it)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = StopTexts(tokenizer, stop)
    for count in range(1, len(ids) + 1):
        beyond = found.beyond(ids[:count])
        if beyond is not None:
            return count, beyond
    return None


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one.\ntwo", ["\n"], "one.\n"),
        ("xa\n\nQuestion", ["\n\n"], "xa\n\n"),
        ("xa\n\nQuestion", ["a"], "xa"),
        ("xa\n\nQuestion", ["Qu"], "xa\n\nQu"),
        ("a stop b", ["stop"], "a stop"),
        ("a stop b", ["top"], "a stop"),
        ("a stop b", ["p b", "to"], "a sto"),
        ("price: 5 €!", ["€"], "price: 5 €"),
        ("long" * 40 + "END" + "x", ["long" * 40 + "END"], "long" * 40 + "END"),
        ("no such text", ["zzz"], None),
    ],
)
def test_the_text_ends_where_the_stop_text_ends(
    tokenizer: Any, text: str, stop: list[str], kept: str | None
) -> None:
    found = first_stop(tokenizer, text, *stop)
    if kept is None:
        assert found is None
        return
    assert found is not None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: found[0]]
    decoded = tokenizer.decode(ids)
    assert decoded[: len(decoded) - found[1]] == kept
    # One token less does not have the stop text.
    assert not any(word in tokenizer.decode(ids[:-1]) for word in stop)


def test_a_special_token_as_stop_text_ends_the_answer(tokenizer: Any) -> None:
    assert first_stop(tokenizer, "ab<tool>cd", "<tool>") == (3, 0)
    assert first_stop(tokenizer, "ab<tool>cd", "x") is None
