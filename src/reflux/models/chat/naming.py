"""The prompt that an error is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from reflux.errors import ModelError


@contextmanager
def about_prompt(prompt_id: str) -> Iterator[None]:
    """A ModelError raised inside names the prompt."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"prompt {prompt_id}: {error}") from error
