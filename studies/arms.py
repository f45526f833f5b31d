"""A study: one recipe in several arms, each on the same seeds. The file's form is that of `Study`;
studies/vopd.toml is an example.

This file has no command of its own. `python studies/run.py STUDY --out OUT` reads the study.
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

    # The number of independent batches of attempts at the same prompts.
    draws: Annotated[int, Field(ge=3)] = 64
    # The arm whose mean gradient gives the reference direction for the other arms.
    reference: str | None = None
    # "start", or "ARM@STEP" for a checkpoint of that arm's run on the first seed.
    students: tuple[str, ...] = ("start",)
    # Empty means all arms.
    arms: tuple[str, ...] = ()
    # Merged over every arm, because attempts and learner must be the same in all arms.
    common: Table = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Study:
    """Arms that are compared with `baseline`, seed by seed. ConfigError for a name that no arm has."""

    name: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    baseline: str
    # The changes of each arm. If an arm has a `base`, it replaces the common one.
    arms: dict[str, Table]
    # A recipe that is merged under every arm.
    common: Table = field(default_factory=dict)
    # The arms that run if the command names none. Empty means all arms.
    default: tuple[str, ...] = ()
    # For an arm, the arm whose final student it starts from, on the same seed.
    starts: dict[str, str] = field(default_factory=dict)
    # None if the arms of the study cannot share attempts.
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
        """The validated config of an arm: base < common < arm < `over` < key.path=value overrides. Parts that
        do not fit together are refused here.
        """
        self.check_arms([arm])
        table = merge(resolve(merge(self.common, self.arms[arm])), over or {})
        changes = sorted(map(split_override, overrides), key=lambda change: not change[0].endswith("kind"))
        for path, value in changes:
            # a new kind drops the keys of the old kind, so kinds are merged first
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
    """Read a study. Raises ConfigError with the path of the wrong key."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no study {path}; give a file such as studies/vopd.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return make(Study, table, path.stem)
