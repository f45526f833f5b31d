"""The header of a GGUF file gives `plan` the same shape as the model's own config and tensors."""

from __future__ import annotations

from pathlib import Path

from reflux.models.sizes import size_of
from reflux.models.text_shape import shape_of
from tiny_gguf import llama, write


def test_a_header_gives_the_shape_of_its_model(tmp_path: Path) -> None:
    net = llama()
    found = size_of(write(tmp_path / "tiny.gguf", net, "Q4_0"), "learner.model").shape
    assert found is not None
    assert found == shape_of(net.config.to_dict(), net.state_dict())
    assert (found.keys, found.vocabulary) == (32, net.config.vocab_size)
