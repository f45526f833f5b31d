"""BibTeX of the methods a recipe uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reflux.accelerators.extrapolate import Extrapolate
from reflux.config import RunConfig
from reflux.contexts.peers import Peers
from reflux.contexts.privileged import Privileged
from reflux.evals.foresight import Foresight
from reflux.objectives.divergence import Divergence
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import SampledKL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.parts import kind_of
from reflux.samplers.drawn import Drawn, flow_sampler
from reflux.teachers.own import Own
from reflux.types import FlowRollout


@dataclass(frozen=True)
class Paper:
    key: str
    title: str
    arxiv: str
    year: int
    author: str | None
    used: Callable[[RunConfig], bool]

    @property
    def bibtex(self) -> str:
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.author,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{self.arxiv}",
        }
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items() if value)
        return f"@misc{{{self.key},\n{body}}}"


def _divergence(cfg: RunConfig, *names: str) -> bool:
    return any(isinstance(objective, Divergence) and objective.divergence in names for objective in cfg.objectives)


def _baseline(cfg: RunConfig, *names: str) -> bool:
    return any(isinstance(objective, SampledKL) and objective.baseline in names for objective in cfg.objectives)


def _ratio(cfg: RunConfig, name: str) -> bool:
    return any(isinstance(objective, SampledKL | Outcome | Divergence) and objective.ratio == name for objective in cfg.objectives)


def _credit(cfg: RunConfig, kind: str) -> bool:
    return any(kind_of("credit", rule) == kind for rule in cfg.credit.values())


def _lengths_vary(cfg: RunConfig) -> bool:
    return len({cfg.draw(step).length for step in range(cfg.steps)}) > 1


def _shows(cfg: RunConfig, test: Callable[[object], bool]) -> bool:
    return any(test(teacher.context) for teacher in cfg.teachers.values())


def _flows(cfg: RunConfig) -> bool:
    return cfg.learner.rollouts is FlowRollout


PAPERS = (
    Paper("prefix_opd", "Fast and Effective On-policy Distillation from Reasoning Prefixes", "2602.15260", 2026, None,
          lambda cfg: _credit(cfg, "prefix") or _lengths_vary(cfg)),
    Paper("release", "Prefix Teach, Suffix Fade: Local Teachability Collapse in Strong-to-Weak On-Policy Distillation", "2605.13643", 2026,
          None, lambda cfg: _credit(cfg, "release")),
    Paper("vopd", "KL for a KL: On-Policy Distillation with Control Variate Baseline", "2605.07865", 2026, None,
          lambda cfg: _baseline(cfg, "kl", "topk_kl")),
    Paper("uni_opd", "Uni-OPD", "2605.03677", 2026, None, lambda cfg: _credit(cfg, "margin") or _credit(cfg, "balance")),
    Paper("effopd", "Learning to Foresee: Unveiling the Unlocking Efficiency of On-Policy Distillation", "2605.11739", 2026, None,
          lambda cfg: isinstance(cfg.accelerator, Extrapolate) or any(isinstance(found, Foresight) for found in cfg.evals.values())),
    Paper("optimal_baseline", "The Optimal Reward Baseline for Gradient-Based Reinforcement Learning", "1301.2315", 2013,
          "Weaver, Lex and Tao, Nigel", lambda cfg: _baseline(cfg, "minimum_variance")),
    Paper("rloo", "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", "2402.14740", 2024,
          "Ahmadian, Arash and Cremer, Chris and Gall{\\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and others",
          lambda cfg: _baseline(cfg, "leave_one_out")),
    Paper("peers", "Multi-Rollout On-Policy Distillation via Peer Successes and Failures", "2605.12652", 2026, None,
          lambda cfg: _shows(cfg, lambda context: isinstance(context, Peers))),
    Paper("sdpo", "Reinforcement Learning via Self-Distillation", "2601.20802", 2026,
          "H{\\\"u}botter, Jonas and L{\\\"u}beck, Frederike and Behric, Lejs and Baumann, Anton and others",
          lambda cfg: _shows(cfg, lambda context: isinstance(context, Peers) and (context.successes, context.failures) == (1, 0))),
    Paper("opsd", "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models", "2601.18734", 2026,
          "Zhao, Siyan and Xie, Zhihui and Liu, Mengchen and Huang, Jing and Pang, Guan and others",
          lambda cfg: _shows(cfg, lambda context: isinstance(context, Privileged))),
    Paper("sdft", "Self-Distillation Enables Continual Learning", "2601.19897", 2026,
          "Shenfeld, Idan and Damani, Mehul and H{\\\"u}botter, Jonas and Agrawal, Pulkit",
          lambda cfg: _shows(cfg, lambda context: isinstance(context, Privileged) and context.show == "demonstration")),
    Paper("mean_teacher", "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning "
          "results", "1703.01780", 2017, "Tarvainen, Antti and Valpola, Harri",
          lambda cfg: any(isinstance(teacher, Own) and teacher.follow == "ema" for teacher in cfg.teachers.values())),
    Paper("gkd", "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "2306.13649", 2023,
          "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and others",
          lambda cfg: cfg.sampler.on_policy and bool(cfg.teachers)),
    Paper("distillm", "DistiLLM: Towards Streamlined Distillation for Large Language Models", "2402.03898", 2024,
          "Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
          lambda cfg: _divergence(cfg, "skew_reverse", "skew_forward")),
    Paper("fdistill", "f-Divergence Minimization for Sequence-Level Knowledge Distillation", "2307.15190", 2023,
          "Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili", lambda cfg: _divergence(cfg, "tv")),
    Paper("grpo", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300", 2024,
          "Shao, Zhihong and others", lambda cfg: _credit(cfg, "outcome") or _baseline(cfg, "group_mean")),
    Paper("ppo", "Proximal Policy Optimization Algorithms", "1707.06347", 2017,
          "Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg",
          lambda cfg: _ratio(cfg, "clip")),
    Paper("impala", "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures", "1802.01561", 2018,
          "Espeholt, Lasse and Soyer, Hubert and Munos, Remi and Simonyan, Karen and others",
          lambda cfg: cfg.max_lag > 0 and _ratio(cfg, "truncated")),
    Paper("lora", "LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", 2021,
          "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and others",
          lambda cfg: bool(getattr(cfg.learner, "lora", None))),
    Paper("flow_opd", "Flow-OPD: On-Policy Distillation for Flow Matching Models", "2605.08063", 2026,
          "Fang, Zhen and Huang, Wenxuan and Zeng, Yu and Zhao, Yiming and Chen, Shuang and others",
          lambda cfg: cfg.sampler.on_policy and any(isinstance(objective, VelocityKL) for objective in cfg.objectives)),
    Paper("flow_grpo", "Flow-GRPO: Training Flow Matching Models via Online RL", "2505.05470", 2025,
          "Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and others",
          lambda cfg: _flows(cfg) and cfg.sampler.on_policy),
    Paper("flow_matching", "Flow Matching for Generative Modeling", "2210.02747", 2022,
          "Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt",
          lambda cfg: isinstance(cfg.sampler, Drawn)),
    Paper("rectified_flow", "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", "2403.03206", 2024,
          "Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and M{\\\"u}ller, Jonas and others", _flows),
    Paper("guidance", "Classifier-Free Diffusion Guidance", "2207.12598", 2022, "Ho, Jonathan and Salimans, Tim",
          lambda cfg: (acting := flow_sampler(cfg)) is not None and acting.guidance != 1),
    Paper("gsm8k", "Training Verifiers to Solve Math Word Problems", "2110.14168", 2021,
          "Cobbe, Karl and others", lambda cfg: kind_of("tasks", cfg.task) == "gsm8k"),
)  # fmt: skip


def papers(cfg: RunConfig) -> list[Paper]:
    """The papers behind the parts in use."""
    return [paper for paper in PAPERS if paper.used(cfg)]
