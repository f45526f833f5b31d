"""Token ids as pieces of text with their numbers and their level on the colour scale, and its legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from reflux.reports.attempts import ShownAttempt
from reflux.reports.formatting import visible
from reflux.reports.reading import items, number, whole
from reflux.reports.units import chance, signed

# The values of |log q - log p| at which the colour gets deeper. Ratios have heavy tails, so each edge is
# about three times the one before.
EDGES_NATS = (0.1, 0.3, 1.0, 3.0)
# The number of tokens shown of the head and of the tail of a longer attempt.
HEAD_TOKENS, TAIL_TOKENS = 800, 200


@dataclass(frozen=True)
class Token:
    """One token as it is shown. level: -4 .. 4, None without a ratio. words: its numbers, one per line.
    chosen: True if the student sampled it.
    """

    piece: str
    level: int | None
    words: str
    chosen: bool

    @property
    def css(self) -> str:
        if not self.chosen:
            return "given"
        return "unknown" if self.level is None else f"{'n' if self.level < 0 else 'p'}{abs(self.level)}"


def open_tokenizer(path: Path, notes: list[str]) -> Tokenizer | None:
    """The tokenizer in a file. None, with a note, if the file is missing or damaged."""
    if not path.is_file():
        notes.append(
            "student/tokenizer.json is missing, so attempts are shown as text, without their tokens."
        )
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        notes.append(
            f"student/tokenizer.json cannot be read ({visible(str(error))}), so attempts are shown as text."
        )
        return None


def shown_tokens(shown: ShownAttempt, tokenizer: Tokenizer) -> tuple[list[Token], list[Token], int]:
    """The tokens at the head and at the tail of an attempt, and the number of tokens between them that are
    not shown.
    """
    ids = [-1 if (found := whole(value)) is None else found for value in items(shown.acted.get("tokens"))]
    if len(ids) <= HEAD_TOKENS + TAIL_TOKENS:
        return _tokens(shown, pieces(ids, tokenizer), ids, 0), [], 0
    head, tail = ids[:HEAD_TOKENS], ids[-TAIL_TOKENS:]
    first = len(ids) - TAIL_TOKENS
    return (
        _tokens(shown, pieces(head, tokenizer), head, 0),
        _tokens(shown, pieces(tail, tokenizer), tail, first),
        first - HEAD_TOKENS,
    )


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds. A token that ends inside a character is shown as its bytes; the token
    that completes the character is shown with the whole character.
    """
    stream, out, pending = DecodeStream(skip_special_tokens=False), [], False
    for token in ids:
        raw = tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        if raw is None:
            out.append(f"⟨id {token}⟩")
            continue
        try:
            piece = stream.step(tokenizer, token)
        except Exception:
            # The stream fails on bytes that complete no character, with the base class of all exceptions.
            stream = DecodeStream(skip_special_tokens=False)
            piece = stream.step(tokenizer, token)
        out.append(_raw(raw) if piece is None else piece.lstrip("\ufffd") if pending else piece)
        pending = piece is None
    return out


def _raw(raw: str) -> str:
    """A vocabulary entry with part of a character, as bytes: "<0xE2>" or byte-level letters -> "⟨0xE2⟩"."""
    if raw.startswith("<0x"):
        return f"⟨{raw[1:-1]}⟩"
    alphabet = _byte_alphabet()
    return "⟨" + " ".join(f"0x{alphabet[char]:02X}" if char in alphabet else char for char in raw) + "⟩"


def _byte_alphabet() -> dict[str, int]:
    """The byte of each letter of a byte-level tokenizer: printable Latin-1 bytes are written as themselves
    and the others as U+0100, U+0101 and so on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def level(ratio_nats: float) -> int:
    """The level on the colour scale, -4 .. 4. 0 if the log-ratio is within the first edge."""
    depth = sum(abs(ratio_nats) >= edge for edge in EDGES_NATS)
    return depth if ratio_nats >= 0 else -depth


def legend() -> list[tuple[str, str]]:
    """Pairs (css class, range of log q - log p in nats), from the lowest to the highest range."""
    pairs, last = list(pairwise(EDGES_NATS)), EDGES_NATS[-1]
    above = [*(f"{low:g} to {high:g}" for low, high in pairs), f"over {last:g}"]
    below = [*(f"−{low:g} to −{high:g}" for low, high in pairs), f"under −{last:g}"]
    up = [(f"p{index}", text) for index, text in enumerate(above, 1)]
    down = [(f"n{index}", text) for index, text in enumerate(below, 1)]
    return [*reversed(down), ("p0", f"within {EDGES_NATS[0]:g}"), *up]


def _tokens(shown: ShownAttempt, texts: list[str], ids: list[int], first: int) -> list[Token]:
    return [
        _token(shown, text, token, first + index)
        for index, (text, token) in enumerate(zip(texts, ids, strict=True))
    ]


def _token(shown: ShownAttempt, text: str, token: int, position: int) -> Token:
    student, teacher = _at(shown.student_logp, position), _at(shown.teacher_logp, position)
    weight, offset = (
        _at(shown.learned.get("weight"), position),
        _at(shown.learned.get("advantage_offset"), position),
    )
    chosen = _at(shown.acted.get("mask"), position) != 0
    ratio = None if student is None or teacher is None else teacher - student
    quoted = visible(text).replace("\n", "↵").replace("\t", "⇥")
    lines = [f"“{quoted}”  token {token}, position {position}"]
    if not chosen:
        lines.append("not sampled by the student")
    else:
        lines.append("student log p " + _nats(student))
        lines.append("teacher log q " + _nats(teacher))
        lines.append("log q − log p " + ("not known" if ratio is None else f"{signed(ratio)} nats"))
        lines += (
            [f"KL(p, q) {kl:.3g} nats"] if (kl := _at(shown.learned.get("kl"), position)) is not None else []
        )
        lines += [f"weight {weight:.3g}"] if weight is not None else []
        lines += [f"advantage offset {signed(offset)} nats"] if offset is not None else []
    return Token(_shown_piece(text), None if ratio is None else level(ratio), "\n".join(lines), chosen)


def _shown_piece(text: str) -> str:
    return visible(text).replace("\n", "↵\n") or "∅"


def _nats(logp: float | None) -> str:
    return "not known" if logp is None else f"{signed(logp)} nats ({chance(logp)})"


def _at(values: object, position: int) -> float | None:
    found = items(values)
    value = found[position] if position < len(found) else None
    return float(value) if isinstance(value, bool) else number(value)
