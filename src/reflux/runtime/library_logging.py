"""Turn off the progress bars of other libraries, because the command line shows its own progress."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Disable the progress bars of transformers and datasets. Their warnings stay enabled."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
