"""What a part may say about itself. Every part inherits this, and overrides what it has to say; the defaults
say nothing.

A rule that one part can know stands on that part; `checks/` keeps the rules that join several. All methods
are asked before anything heavy is loaded, so a module that defines parts imports no torch at its top.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from reflux.config.papers import Paper


class Part(Protocol):
    """An interface with defaults.

    `where` is the path of the part's table in the recipe, such as "credit.prefix" or "objectives[0]". `cfg`
    is the whole `RunConfig`, `recorded` a `reports.recorded.Recorded`, and a diagnostic a
    `reports.chart.Chart`. A part that overrides a method names these types. They are not named here: a recipe
    holds parts, so this module lies below them.
    """

    # when to use it, in a sentence or two, for docs/recipes.md
    when: ClassVar[str] = ""

    def refusals(self, where: str, cfg: Any) -> Iterable[str]:
        """Why this run cannot be what its user means: sentences with the remedy. Any one of them refuses the
        run.
        """
        return ()

    def advice(self, where: str, cfg: Any) -> Iterable[str]:
        """What works but is seldom meant: sentences that are printed before the run."""
        return ()

    def papers(self, cfg: Any) -> Iterable[Paper]:
        """The papers behind the part with these settings; `reflux cite` collects them."""
        return ()

    def inputs(self, where: str) -> None:
        """Look whether the files that the part reads are there, without loading them. Raises ModelError or
        DataError where they are not.
        """

    def diagnostics(self, name: str, recorded: Any) -> Iterable[Any]:
        """What the report shows of this part, from the files of the run directory. name: that of its table,
        such as "prefix".
        """
        return ()
