"""A study: one recipe in several arms, each on the same seeds. The file's form is that of `Study`;
studies/vopd.toml is an example.

No command of its own: `python studies/run.py STUDY --out OUT` reads it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux import checks
from reflux.config.bases import resolve
from reflux.config.overrides import merge, nest, split_override, unpack
from reflux.config.recipe import RunConfig, from_table, to_table
from reflux.config.registry import STRICT, make
from reflux.errors import ConfigError

Table = dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class Variance:
    """Repeated draws of whole gradients (see gradient_variance.py)."""

    # independent batches of attempts at the same prompts
    draws: Annotated[int, Field(ge=3)] = 64
    # the arm whose mean gradient the others' are compared with in direction
    reference: str | None = None
    # "start", or "ARM@STEP": a checkpoint of that arm's run on the first seed
    students: tuple[str, ...] = ("start",)
    # none: all
    arms: tuple[str, ...] = ()
    # merged over every arm: attempts and learner must be the same in all
    common: Table = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Study:
    """Arms that are compared with `baseline`, seed by seed. ConfigError where a name is used that no arm
    has.
    """

    name: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    baseline: str
    # what each changes; its `base`, where it has one, takes the place of the common one
    arms: dict[str, Table]
    # a recipe, merged under every arm
    common: Table = field(default_factory=dict)
    # arms that run where none is named; none: all
    default: tuple[str, ...] = ()
    # arm: the arm whose student it begins with, on the same seed
    starts: dict[str, str] = field(default_factory=dict)
    # without it the study has no arms that could share attempts
    variance: Variance | None = None

    def __post_init__(self) -> None:
        self.check_arms([self.baseline, *self.default, *self.starts, *self.starts.values()])
        if self.variance:
            self.check_arms(
                [*self.variance.arms, *([self.variance.reference] if self.variance.reference else [])]
            )

    def check_arms(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - self.arms.keys())
        if unknown:
            raise ConfigError(
                f"{self.name}: there is no arm {', '.join(unknown)}. Arms: {', '.join(self.arms)}."
            )

    def config(
        self, arm: str, overrides: Iterable[str] = (), over: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """The validated config of an arm: base < common < arm < `over` < key.path=value overrides. Joined, so
        a misfit is refused here.
        """
        self.check_arms([arm])
        table = merge(resolve(merge(self.common, self.arms[arm])), over or {})
        changes = sorted(map(split_override, overrides), key=lambda change: not change[0].endswith("kind"))
        for path, value in changes:
            # a new kind drops the old one's keys, so kinds come first
            table = merge(table, nest(path.split("."), unpack(value), table))
        cfg = from_table({**table, "recipe": f"{self.name}_{arm}"})
        checks.join(cfg)
        return cfg

    def hash(self, overrides: Iterable[str] = ()) -> str:
        """12 hex digits over the resolved configs of all arms and the seeds."""
        tables = {arm: to_table(self.config(arm, overrides)) for arm in self.arms}
        return hashlib.blake2b(
            json.dumps([list(self.seeds), tables], sort_keys=True).encode(), digest_size=6
        ).hexdigest()


def load_study(path: Path) -> Study:
    """Raises ConfigError with the path of what is wrong."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no study {path}; give a file such as studies/vopd.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return make(Study, table, path.stem)
