"""On a CPU vLLM packs the output head once, at start. Where the head is tied to the input embeddings, a new
set of weights changes the embeddings only, and the packed copy stays as it was. Here it is packed again.
"""

from __future__ import annotations

from typing import Any


def follow_tied_head() -> None:
    """Pack the head again at the end of each weight update."""
    from vllm.v1.worker.gpu_worker import Worker

    finish = Worker.finish_weight_update

    def finished(self: Any) -> None:
        finish(self)
        head = dict(self.get_model().named_modules()).get("lm_head")
        # A head of another pipeline stage has no weight here.
        if head is not None and head.weight.numel():
            head.quant_method.process_weights_after_loading(head)

    Worker.finish_weight_update = finished
