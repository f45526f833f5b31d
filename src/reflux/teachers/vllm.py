"""A teacher in a running server: vLLM, or SGLang. Nothing of its model but the tokenizer, and for the full
distribution the output head, is loaded here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.context import StudentSpec
from reflux.config.registry import STRICT, PartOf
from reflux.contexts.base import Context
from reflux.contexts.same import Same
from reflux.models.folders import look_for_text
from reflux.models.placement import Device
from reflux.teachers.base import TeacherPart
from reflux.types import GivenTarget, HiddenTarget, Rollout, SampledTarget, Target, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services

OFFERS: dict[str, tuple[type[Target], ...]] = {
    "hidden": (HiddenTarget,),
    "student_topk": (GivenTarget, SampledTarget),
    "teacher_topk": (TopKTarget,),
    "sampled": (SampledTarget,),
}


@dataclass(frozen=True, config=STRICT)
class VLLM(TeacherPart):
    """A frozen model with the student's token map, in one or several servers that run already. The server
    reads the student's exact token ids.

    `gives` says what it is asked for at each position. hidden: the last hidden states, which go through the
    output head in this process and give the full distribution, as with a local teacher. The server needs the
    plugin of this package. student_topk: log-probs at the student's own most likely tokens when it sampled,
    as many as the objective's k, and at the sampled token. The tail is exact: 1 - sum exp of these log-probs.
    vLLM 0.32 answers this on a GPU; on a CPU it needs the plugin. teacher_topk: the teacher's `k` most likely
    tokens and the sampled token; every vLLM server can do it. The teacher's log-probs at the student's other
    tokens are then unknown. sampled: the sampled token alone. An attempt of an evaluation has no list of the
    student's, so student_topk gives it the sampled token.

    What a server can do is measured when it is opened, and the log-probs of several servers are compared.
    A failed request is sent again. An attempt whose answer is incomplete, uniform or not a number has no
    target and is counted.

    routes: only prompts with one of these routes are scored. alias: the name that several tables with routes
    share.
    """

    when: ClassVar[str] = (
        "The teacher is too large for this machine, or several runs share it. docs/running.md says how to "
        "start the server."
    )
    instead_of: ClassVar[str] = "local"
    rollouts: ClassVar[type[Rollout]] = TokenRollout
    in_process: ClassVar[bool] = False

    # A folder or hub id of the model in the server. Only its tokenizer is loaded.
    model: str
    # The address of the server: scheme, host and port.
    url: str | None = None
    # The addresses of several servers with the same weights, instead of `url`. Requests are spread over them.
    urls: tuple[str, ...] = ()
    # What the teacher is asked for at each position: hidden states, log-probs at the student's most likely
    # tokens, at its own most likely tokens, or at the sampled token.
    gives: Literal["hidden", "student_topk", "teacher_topk", "sampled"] = "student_topk"
    # Under "teacher_topk": the number of tokens. A vLLM server allows 20 unless it was started with a larger
    # --max-logprobs.
    k: Annotated[int, Field(ge=1)] = 20
    # Under "hidden": a folder or hub id with the output head. Not set: `model`. Of a hub model only the file
    # with the head is downloaded.
    head: str | None = None
    # The language of the server. SGLang takes one list of tokens a request, so "student_topk" sends the union
    # over all positions there, which costs much more.
    dialect: Literal["vllm", "sglang"] = "vllm"
    # The name of a LoRA adapter that the server has loaded.
    adapter: str | None = None
    # The teacher's log-probs are taken at this temperature. Another than 1 needs gives = "hidden".
    temperature: Annotated[float, Field(gt=0)] = 1.0
    # The NAME of the environment variable that holds the server's token. The token itself is never written.
    token_variable: str | None = None
    # Requests in flight for each server.
    concurrency: Annotated[int, Field(ge=1)] = 32
    # Seconds that a request may wait for data. Then it is sent again.
    read_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    # Seconds for which a failing request is sent again, for example while the server restarts.
    patience_s: Annotated[float, Field(ge=0)] = 300.0
    # Positions scored by one request. A longer answer takes several, and each reads the text before it again.
    max_rows: Annotated[int, Field(ge=1)] = 8192
    # The run stops when the attempts without a usable answer exceed this share of all attempts asked.
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    # A folder in which answers are kept. They are used again where model, weights and tokens are the same.
    cache: str | None = None
    context: Annotated[Context, PartOf("contexts")] = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()
    # Under "hidden": the device of the output head.
    device: Device = "auto"
    trust_remote_code: bool = False
    # System prompt. Used only for contexts that change the messages.
    system: str | None = None
    # Chat-template arguments. Used only for contexts that change the messages.
    template: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.url is None) == (not self.urls):
            raise ValueError('give the address of the server as url = "http://HOST:PORT", or several as urls')
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError("urls names a server twice")
        if self.temperature != 1 and self.gives != "hidden":
            raise ValueError(
                f'temperature = {self.temperature:g} needs the full distribution: use gives = "hidden", or '
                "temperature = 1, because a server scores given texts at temperature 1"
            )
        if self.dialect == "sglang" and self.gives == "hidden":
            raise ValueError('SGLang gives no hidden states here. Use gives = "student_topk"')
        if self.head is not None and self.gives != "hidden":
            raise ValueError('head is the output head for gives = "hidden". Remove it')

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.urls if self.url is None else (self.url,)

    @property
    def offers(self) -> tuple[type[Target], ...]:
        return OFFERS[self.gives]

    @property
    def at_ids(self) -> bool:
        return self.gives in ("hidden", "student_topk")

    @property
    def paths(self) -> tuple[str, ...]:
        return ("model", "head", "cache")

    @property
    def follows(self) -> bool:
        return False

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        later = [name for name, rule in cfg.credit.items() if rule.requirements.now_candidates]
        if later and self.gives == "student_topk":
            yield (
                f"credit.{later[0]} needs log-probs at the current student's tokens after {where} was asked, "
                f'and {where}.gives = "student_topk" gives them at the tokens of the policy that sampled. '
                f'Use credit.{later[0]}.candidates = "behaviour", or {where}.gives = "hidden".'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.dialect == "sglang" and self.gives == "student_topk":
            yield (
                f"{where}: SGLang scores one list of tokens a request, so every position is scored at the "
                "union of all positions' tokens. Answers are then many times as large as vLLM's. A smaller "
                "max_rows makes the union smaller."
            )

    def inputs(self, where: str) -> None:
        from reflux.clients.http import checked_url, token_header

        for url in self.addresses:
            checked_url(url)
        token_header(self.token_variable)
        look_for_text(self.model, f"{where}.model")

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        return StudentSpec(
            self.model, self.system, self.template, student.prompt_suffix, self.trust_remote_code
        )

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.teachers.vllm_engine import VLLMTeacher

        return VLLMTeacher.opened(self, context, services)
