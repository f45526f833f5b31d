"""docs/what_runs.md: the table of outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from architectures.outcome import REFUSED, RIGHT, UNTRIED, WRONG, Outcome
from architectures.parity import ROWS, TOLERANCE
from architectures.runs import STEPS

PAGE = Path(__file__).parents[2] / "docs" / "what_runs.md"

TEXT = """# What runs

One row for each model type that transformers {transformers} offers for causal language models, its
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, and some rows for settings that change how a type computes. The type of a
model is `model_type` in its config.json. A type for images or sound was tried as text only. Each was
tried with random models of a few layers, in float32 on a CPU, with torch {torch}. `make test-models` tries
all of them again and fails where a row has changed. `make golden-models` writes this page.

Nothing here was tried on a GPU, in 16 bits or with quantised weights. In the notes MODEL stands for the
folder of the tiny model, and N for a number.

A type is right where all of these numbers are at most {tolerance} nats:

- the log-probs that the sampler recorded, against the model of transformers on the same tokens, one text at a
  time and without a cache. The prompts have {prompts} tokens, and the answers end at different places;
- the log-probs of the learner's batch, padded on the right, against the same;
- those of the model itself on the first half of each text, against the whole text;
- the loss of the first step of a run (recipe `full`), against the mean reverse KL from two models of
  transformers;
- the log-probs of the exported student after {steps} steps, loaded by transformers, against the weights that
  the learner ended with.

`reflux eval` must give an accuracy on the run directory. The column "LoRA" says the same of training with
adapters on all linear modules: sampler and exported student against the learner, with random adapters.

"Refused" means an error before the first step that says why. "Not tried" means that no tiny model could be
made here, and the note says why. A random model shows whether the library computes what transformers does.
It does not show how well a type learns.

{counts}.

| type | outcome | LoRA | note |
|---|---|---|---|
{rows}
"""


def page(rows: Sequence[Outcome]) -> str:
    counts = Counter(row.verdict for row in rows)
    words = [
        f"{counts[verdict]} {verdict}" for verdict in (RIGHT, REFUSED, UNTRIED, WRONG) if counts[verdict]
    ]
    return TEXT.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        tolerance=TOLERANCE,
        prompts=", ".join(str(length) for length, _ in ROWS[:-1]) + f" and {ROWS[-1][0]}",
        steps=STEPS,
        counts=", ".join(words),
        rows="\n".join(row.line for row in rows),
    )


def recorded() -> dict[str, Outcome]:
    """The rows of the page by name."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: Outcome(*row) for row in cells[1:]}
