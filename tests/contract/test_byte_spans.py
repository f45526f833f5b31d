"""Which characters tokens of single bytes wrote, also bytes that are no text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from reflux.models.byte_rows import units_of
from reflux.models.spans import CharacterSpans
from tokenizer_kinds import sentence_pieces


def row(tokenizer: Any, raw: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw])


def written(tokenizer: Any, ids: list[int]) -> list[str]:
    spans = CharacterSpans(tokenizer)
    text = spans.decode(ids)
    return [text[start:end] for start, end in spans(ids)]


def decoded_tokens(tokenizer: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of tokens that are decoded to find the spans of `ids`."""
    spans, read = CharacterSpans(tokenizer), []
    text, decode = spans.decode(ids), spans.decode
    monkeypatch.setattr(spans, "decode", lambda part: read.append(len(part)) or decode(part))
    found = spans(ids, text)
    assert len(found) == len(ids)
    assert found[-1, 1] == len(text)
    return sum(read)


RAW = {
    "no characters": b"\xe6" * 2000,
    "any bytes": bytes(random.Random(1).randrange(256) for _ in range(2000)),
    "characters and half of one": "漢字🙂".encode() * 200 + b"\xe6",
    "white space, then no character": b" \n" * 1000 + b"\xff",
    "letters, then no character": b"A" * 2000 + b"\xff",
}


@pytest.mark.parametrize("scheme", [None, "always", "never"])
@pytest.mark.parametrize("raw", RAW)
def test_the_work_grows_with_the_length_whatever_the_bytes_are(
    raw: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentence_pieces(scheme=scheme)
    words = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    ids = [*words, *row(tokenizer, RAW[raw]), *words]
    assert decoded_tokens(tokenizer, ids, monkeypatch) < 12 * len(ids)
    spaces = tokenizer.convert_tokens_to_ids(["▁"]) * 2000
    assert decoded_tokens(tokenizer, [*ids, *spaces, *words], monkeypatch) < 24 * (len(ids) + 2000)


def test_a_decoder_that_looks_far_back_reads_a_long_text_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = sentence_pieces()
    decode = type(tokenizer).decode

    def capitals(self: Any, ids: Any, **settings: Any) -> str:
        text = decode(self, ids, **settings)
        return text.upper() if len(ids) > 1 and ids[0] == ids[1] else text

    monkeypatch.setattr(type(tokenizer), "decode", capitals)
    ids = tokenizer("hello the answer ", add_special_tokens=False)["input_ids"] * 200
    ids = [ids[0], *ids]
    assert decoded_tokens(tokenizer, ids, monkeypatch) < 150 * len(ids)


def test_bytes_have_the_span_of_their_character() -> None:
    tokenizer = sentence_pieces()
    words = tokenizer("hello", add_special_tokens=False)["input_ids"]
    found = written(tokenizer, [*words, *row(tokenizer, "é🙂".encode()), *words])
    assert found == ["hello", *["é"] * 2, *["🙂"] * 4, " hello"]
    # One replacement character for each byte of a row that is no text.
    broken = written(tokenizer, [*words, *row(tokenizer, b"\xc3\xa9\xf0\x9f"), *words])
    assert broken[len(words) : len(words) + 4] == ["\ufffd"] * 4


def test_tokens_that_decoding_leaves_out_do_not_divide_a_row() -> None:
    tokenizer = sentence_pieces()
    end, first, last = tokenizer.eos_token_id, *row(tokenizer, b"\xc3\xa9")
    left_out = CharacterSpans(tokenizer).left_out
    assert units_of(tokenizer, left_out, [end, first, end, end, last, end]) == [
        [None],
        [0xC3, None, None, 0xA9],
        [None],
    ]
    assert written(tokenizer, [end, first, end, last, end]) == ["", "é", "é", "é", ""]
    found = written(tokenizer, [first, last, end, first, last])
    assert found == ["é", "é", "", "é", "é"]
