"""A paper and its BibTeX entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One paper on arXiv. author: the authors in BibTeX's form, or None if they are not recorded here."""

    key: str
    title: str
    arxiv: str
    year: int
    author: str | None = None

    @property
    def bibtex(self) -> str:
        """The BibTeX entry, of type misc."""
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


EFFOPD = Paper(
    "effopd",
    "Learning to Foresee: Unveiling the Unlocking Efficiency of On-Policy Distillation",
    "2605.11739",
    2026,
)


PREFIX_OPD = Paper(
    "prefix_opd", "Fast and Effective On-policy Distillation from Reasoning Prefixes", "2602.15260", 2026
)


GKD = Paper(
    "gkd",
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "2306.13649",
    2023,
    "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and others",
)


GRPO = Paper(
    "grpo",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2402.03300",
    2024,
    "Shao, Zhihong and others",
)


RLOO = Paper(
    "rloo",
    "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    "2402.14740",
    2024,
    "Ahmadian, Arash and Cremer, Chris and Gall{\\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and "
    "others",
)
