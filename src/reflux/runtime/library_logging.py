"""Less noise from libraries on a terminal that shows our own progress."""

from __future__ import annotations


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets; their warnings stay."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
