"""Every part that ships is what the protocol of its group says: read by pyright, which runs over this file
(`make check`).

`test_isolation.py` sees to it that no part is missing here.
"""

from __future__ import annotations

from reflux.cluster.base import Cluster
from reflux.cluster.ray import Ray
from reflux.contexts.base import Context
from reflux.contexts.peers import Peers
from reflux.contexts.privileged import Privileged
from reflux.contexts.replay import Replay
from reflux.contexts.same import Same
from reflux.credit.balance import Balance
from reflux.credit.base import CreditRule
from reflux.credit.discrepancy import Discrepancy
from reflux.credit.freshness import Freshness
from reflux.credit.group_advantage import GroupAdvantage
from reflux.credit.margin import Margin
from reflux.credit.position import Position
from reflux.credit.prefix import Prefix
from reflux.credit.release import Release
from reflux.credit.sign_gate import SignGate
from reflux.credit.unlikely import Unlikely
from reflux.engines.endpoints.base import Endpoint
from reflux.engines.endpoints.openai_api import OpenAI
from reflux.evals.accuracy import Accuracy
from reflux.evals.agreement import Agreement
from reflux.evals.base import Eval
from reflux.evals.foresight import Foresight
from reflux.evals.teacher_accuracy import TeacherAccuracy
from reflux.evals.test_accuracy import ReportedAccuracy
from reflux.extrapolation.base import Extrapolation
from reflux.extrapolation.extrapolate import Extrapolate
from reflux.learners.base import Learner
from reflux.learners.flow import Flow as FlowLearner
from reflux.learners.fsdp import FSDP
from reflux.learners.hf import HF as HFLearner
from reflux.objectives.base import Objective
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import SampledKL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.rewards.base import RewardFn
from reflux.rewards.discriminator import DiscriminatorReward
from reflux.rewards.environment_reward import EnvironmentReward
from reflux.rewards.judge import JudgeReward
from reflux.rewards.oracle.rule_server import RuleServer
from reflux.rewards.recorded_reward import RecordedReward
from reflux.rewards.rubric import RubricReward
from reflux.rewards.verifier import Verifier
from reflux.samplers.base import Sampler
from reflux.samplers.flow import Flow as FlowSampler
from reflux.samplers.hf import HF as HFSampler
from reflux.samplers.imported import Imported
from reflux.samplers.references import References
from reflux.samplers.teacher_samples import TeacherSamples
from reflux.samplers.vllm import VLLM as VLLMSampler
from reflux.tasks.answered import Answered
from reflux.tasks.base import Task
from reflux.tasks.calculator import Calculator
from reflux.tasks.chains import Chains
from reflux.tasks.glyphs import Glyphs
from reflux.tasks.gsm8k import Gsm8k
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.ledger import Ledger
from reflux.tasks.mix import Mix
from reflux.tasks.shopping import Shopping
from reflux.tasks.verifiers import Verifiers
from reflux.tasks.word_problems import WordProblems
from reflux.teachers.base import Teacher
from reflux.teachers.flow import Flow as FlowTeacher
from reflux.teachers.local import Local
from reflux.teachers.self_teacher import SelfTeacher
from reflux.teachers.vllm import VLLM as VLLMTeacher


def samplers() -> list[Sampler]:
    return [
        HFSampler(),
        References(),
        Imported("attempts.jsonl"),
        FlowSampler(),
        TeacherSamples(),
        VLLMSampler(),
    ]


def teachers() -> list[Teacher]:
    return [Local("m"), SelfTeacher(), FlowTeacher("m"), VLLMTeacher("m", url="http://localhost:8000")]


def contexts() -> list[Context]:
    return [Same(), Peers(), Privileged(), Replay()]


def objectives() -> list[Objective]:
    return [SampledKL(), Divergence(), NLL(), PolicyGradient(), VelocityKL()]


def credit() -> list[CreditRule]:
    given: list[CreditRule] = [Prefix(9), Position(1.0), GroupAdvantage(), Release(), Margin(), Balance()]
    return [*given, Freshness(), Discrepancy(), SignGate(), Unlikely()]


def rewards() -> list[RewardFn]:
    judged: list[RewardFn] = [RubricReward(RuleServer()), JudgeReward(RuleServer())]
    return [Verifier(), EnvironmentReward(), RecordedReward(), DiscriminatorReward(), *judged]


def endpoints() -> list[Endpoint]:
    return [RuleServer(), OpenAI("http://localhost:8000/v1", "m")]


def learners() -> list[Learner]:
    return [HFLearner("m"), FlowLearner("m"), FSDP("m")]


def extrapolation() -> list[Extrapolation]:
    return [Extrapolate()]


def tasks() -> list[Task]:
    answered = Answered(WordProblems(), RuleServer(), "answers.jsonl")
    stories: list[Task] = [WordProblems(), Chains(), Gsm8k(), Jsonl("p.jsonl"), Mix({"a": WordProblems()})]
    return [*stories, Shopping(), Calculator(), Ledger(), Verifiers("t"), Glyphs(), answered]


def cluster() -> list[Cluster]:
    return [Ray(samplers=1)]


def evals() -> list[Eval]:
    return [Accuracy(), Agreement(), Foresight(), ReportedAccuracy(), TeacherAccuracy()]
