"""Turn off the progress bars of other libraries, because the command line shows its own progress."""

from __future__ import annotations

import os
import sys
from logging import ERROR, getLogger


def quiet_libraries() -> None:
    """Disable the progress bars of transformers and datasets, and stamina's note of every retry. Other
    warnings stay enabled.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Retries are counted in the metrics.
    getLogger("stamina").setLevel(ERROR)
    # The reader of GGUF files takes its bar from tqdm itself, which knows nothing of that switch.
    gguf.tqdm = logging.tqdm  # pyright: ignore[reportPrivateImportUsage]
    # datasets reads it when it is imported. Importing it takes a second, and few tasks need it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
