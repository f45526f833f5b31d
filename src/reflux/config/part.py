"""The methods by which a part of a recipe (such as a sampler, a teacher or a credit rule) describes itself.
Every part inherits these methods and overrides those that it needs. The defaults return nothing.

A rule that concerns one part is a method of that part. `checks/` contains the rules that concern several
parts. All methods are called before weights are loaded, so a module that defines parts imports no torch at
its top.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from reflux.config.papers import Paper


class Part(Protocol):
    """The base class of all parts, with a default for each method.

    `where` is the path of the part's table in the recipe, such as "credit.prefix" or "objectives[0]". `cfg`
    is the whole `RunConfig`, `recorded` a `reports.recorded.Recorded`, and a diagnostic a
    `reports.chart.Chart`. A part that overrides a method annotates these types. Here they are `Any`, because
    this module must not import the modules of recipes and reports, which lie above it.
    """

    # when to use the part, in one or two sentences, for docs/recipes.md
    when: ClassVar[str] = ""
    # The kind whose work this kind does by other means. Where a table changes from one of them to the
    # other, it keeps the keys that both have.
    instead_of: ClassVar[str] = ""
    # True if the part takes verdicts of the task's `verify`
    verifies: ClassVar[bool] = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The fields that may name files or folders, as far as the part has them. "merge.models" is a field
        of an inner table. config.toml of a run has absolute paths there.
        """
        return ("model", "adapter", "merge.models", "path")

    def refusals(self, where: str, cfg: Any) -> Iterable[str]:
        """Reasons why this run cannot work, each a sentence with the remedy. Any reason refuses the run."""
        return ()

    def advice(self, where: str, cfg: Any) -> Iterable[str]:
        """Settings that work but are rarely intended, each a text that is printed before the run."""
        return ()

    def papers(self, cfg: Any) -> Iterable[Paper]:
        """The papers behind the part with these settings; `reflux cite` collects them."""
        return ()

    def inputs(self, where: str) -> None:
        """Check that the files which the part reads exist, without loading the files. Raises ModelError or
        DataError if one is missing.
        """

    def diagnostics(self, name: str, recorded: Any) -> Iterable[Any]:
        """The charts of this part in the report, made from the files of the run directory. name: the key of
        the part in the recipe, such as "prefix" for [credit.prefix]. recorded: the reader of these files
        (`reflux.reports.recorded.Recorded`): `recorded.rows("evals")` gives the lines of evals.jsonl as
        dicts.
        """
        return ()
