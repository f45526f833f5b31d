"""A recipe (TOML) -> one tree of frozen, validated values. The config is the program: nothing is forwarded by hand.

A recipe sets its own keys; the rest comes from its `base` (another recipe, a shipped base, or a file). Changing a table's kind drops
the old kind's keys of that table, but for a key whose value is "base": it takes the old table. What a shipped recipe needs on one scale
only stands in that scale, under `[methods.RECIPE]`. `key.path=value` overrides are merged last; the value is TOML, or else plain text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config import registry
from reflux.config.context import Numbers, PartContext, Placement
from reflux.config.overrides import merge, nest, split_override, unpack
from reflux.config.registry import STRICT, PartOf
from reflux.config.shares import without_shares
from reflux.credit.base import CreditRule
from reflux.errors import ConfigError, RunError
from reflux.evals.base import Eval
from reflux.extrapolation.base import Extrapolation
from reflux.learners.base import Learner
from reflux.objectives.base import Objective
from reflux.rewards.base import RewardFn
from reflux.samplers.base import Sampler
from reflux.tasks.base import Task
from reflux.teachers.base import Teacher
from reflux.types import Requirements, SamplingParams

RECIPES = Path(__file__).parents[1] / "recipes"

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Track:
    """Where metrics also go while the run lasts. Nothing is sent anywhere unless this table names a tracker."""

    kind: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    project: str = "reflux"
    name: str | None = None


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One run. Class defaults are the vetted setting."""

    task: Annotated[Task, PartOf("tasks")]
    sampler: Annotated[Sampler, PartOf("samplers", default="hf")]
    learner: Annotated[Learner, PartOf("learners", default="hf")]
    objectives: Annotated[tuple[Objective, ...], PartOf("objectives", many="list")]
    teachers: Annotated[dict[str, Teacher], PartOf("teachers", many="table", default="local")] = Field(default_factory=dict)
    credit: Annotated[dict[str, CreditRule], PartOf("credit", many="table")] = Field(default_factory=dict)
    rewards: Annotated[dict[str, RewardFn], PartOf("rewards", many="table")] = Field(default_factory=dict)
    extrapolation: Annotated[Extrapolation | None, PartOf("extrapolation")] = None
    evals: Annotated[dict[str, Eval], PartOf("evals", many="table")] = Field(default_factory=dict)
    track: Track = Track()
    recipe: str = "unnamed"
    steps: Annotated[int, Field(ge=0)] = 200
    prompts_per_step: Count = 64
    group_size: Count = 1
    max_staleness: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    loss_aggregation: Literal["token-mean-weighted", "token-mean", "seq-mean-token-mean"] = "token-mean-weighted"
    save_every: Count = 50
    eval_every: Count = 50
    keep_checkpoints: Count = 2
    log_variance: bool = False
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads of torch; 0: what torch finds
    deterministic: bool = False  # torch's deterministic algorithms, on a GPU

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives: at least one [[objectives]] table is needed, or nothing would be learnt")

    @property
    def training_positions(self) -> int:
        """The most positions an attempt of any optimiser step may have."""
        return max(self.sampler.draw(step).max_positions for step in range(max(1, self.steps)))

    @property
    def evaluation_positions(self) -> int:
        """The most positions an attempt of an evaluation, or of extrapolation's score, may have. No training cap changes it."""
        return self.sampler.evaluation_positions

    def draw(self, step: int) -> SamplingParams:
        """How the attempts of optimiser step `step` (from 0) are sampled."""
        return dataclasses.replace(self.sampler.draw(step), cohort=self.prompts_per_step)


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> RunConfig:
    """The validated config of a shipped recipe (by name) or a file, with overrides.

    Raises ConfigError whose text names the path of what is wrong.
    """
    changes = overrides.items() if isinstance(overrides, Mapping) else map(split_override, overrides)
    values = {path: unpack(value) for path, value in changes}
    table = resolve(read_recipe(name), values.pop("base", None), name)
    for path, value in sorted(values.items(), key=lambda change: not change[0].endswith("kind")):  # a new kind drops the old one's keys
        table = merge(table, nest(path.split("."), value, table))
    return from_table(table)


def read_recipe(name: str | Path, base: bool = False) -> dict[str, Any]:
    """The raw table of a recipe file, or of a shipped recipe by name."""
    path = Path(name)
    if not path.suffix:
        scale = RECIPES / "base" / f"{name}.toml"
        path = scale if base and scale.exists() else RECIPES / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        known = bases() if base else recipe_names()
        if path.parent != RECIPES:
            raise ConfigError(f"there is no file {path}. Shipped recipes go by their names: {', '.join(known)}.") from None
        raise ConfigError(
            f"no {'base' if base else 'recipe'} '{name}'{registry.did_you_mean(str(name), known, '.')} Shipped: {', '.join(known)}. "
            f"A recipe of your own: give its path, ending in .toml."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    if not base:
        table.setdefault("recipe", path.stem)
    return table


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def bases() -> list[str]:
    """What `base` may name: a scale, or a recipe to build on."""
    return [*sorted(path.stem for path in (RECIPES / "base").glob("*.toml")), *recipe_names()]


def resolve(table: dict[str, Any], scale: object = None, name: str | Path = "") -> dict[str, Any]:
    """A recipe merged over its bases, the nearest last. `scale` takes the place of the last base of the chain.

    `[methods.RECIPE]` of a base is merged over the shipped recipe of that name, wherever it stands in the chain. `name` is the recipe's
    name or path; a `base` that is a path is looked up from the folder of the file that names it. ConfigError where a table or a scale
    would change nothing.
    """
    layers = _chain(str(name), table)
    if scale is not None and len(layers) == 1:
        raise ConfigError(f'base: this recipe builds on no base that "{scale}" could replace. Every key is its own; set those that differ.')
    if scale is not None:
        below = _named(scale, "base")
        layers[-1:] = _chain(below, read_recipe(below, base=True))
    for other in _methods(*layers[0]).keys() - {shipped_name(where) for where, _ in layers}:  # a base's are for other recipes, too
        raise ConfigError(
            f'methods.{other}: this recipe does not build on "{other}", so nothing reads that table. Write the keys themselves.'
        )
    methods: dict[str, Any] = {}
    for where, layer in reversed(layers):
        methods = merge(methods, _methods(where, layer))
    resolved: dict[str, Any] = {}
    for where, layer in reversed(layers):
        resolved = merge(resolved, {key: value for key, value in layer.items() if key not in ("base", "methods")})
        resolved = merge(resolved, methods.get(shipped_name(where), {}))
    return resolved


def shipped_name(recipe: str) -> str:
    """The name of a shipped recipe or base that `recipe` is the path of, else `recipe` as it is."""
    path = Path(recipe)
    shipped = path.suffix and path.resolve().parent in (RECIPES.resolve(), (RECIPES / "base").resolve())
    return path.stem if shipped else recipe


def _chain(name: str, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, raw table) of a recipe and of what it builds on, down to the scale. ConfigError where a base leads back to itself."""
    layers = [(name, table)]
    while "base" in layers[-1][1]:
        where, layer = layers[-1]
        below = _named(layer["base"], f"{where}: base" if where else "base")
        if Path(below).suffix and Path(where).suffix:
            below = str(Path(where).parent / below)
        if shipped_name(below) in [shipped_name(known) for known, _ in layers]:
            raise ConfigError(f'base: "{below}" builds on itself: {" -> ".join([*(where for where, _ in layers if where), below])}')
        layers.append((below, read_recipe(below, base=True)))
    return layers


def _named(base: object, where: str) -> str:
    if not isinstance(base, str):
        raise ConfigError(f"{where}: expected the name of a recipe or a base, or the path of a file, got {base!r}")
    return base


def _methods(where: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """What a base says of recipes, by their names. ConfigError for a name that no shipped recipe has, and for what is no table."""
    methods = layer.get("methods", {})
    if not isinstance(methods, Mapping):
        raise ConfigError(f"{where}: methods: expected tables such as [methods.rl], got {methods!r}")
    for recipe, table in methods.items():
        if recipe not in recipe_names():
            raise ConfigError(
                f"{where}: methods.{recipe}: no shipped recipe is named so{registry.did_you_mean(recipe, recipe_names(), '.')}"
            )
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: methods.{recipe}: expected a table [methods.{recipe}], got {table!r}")
    return dict(methods)


def from_table(table: Mapping[str, Any]) -> RunConfig:
    """Validate a resolved table."""
    if "reward" in table:
        raise ConfigError('reward: rewards are named tables. Write [rewards.verifier] for the one of kind "verifier", and no key `reward`.')
    for key in ("task", "sampler", "learner", "objectives"):
        if key not in table:
            raise ConfigError(f'{key}: this table is missing. Set base = "toy" or base = "hub", or write a [{key}] table.')
    steps = table.get("steps", 200)
    table = without_shares(table)
    return registry.make(RunConfig, table, "", steps=steps if isinstance(steps, int) else 0)


def saved_table(folder: Path) -> dict[str, Any]:
    """The resolved table in a run's config.toml. RunError where it is damaged."""
    path = folder / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it, or begin a new run.") from error
    if missing := [name for name in ("task", "sampler", "learner", "steps") if name not in table]:
        raise RunError(f"{path} is damaged: it has no {' and no '.join(missing)}. Restore it, or begin a new run.")
    return table


def to_table(cfg: RunConfig) -> dict[str, Any]:
    """The table that gives this config again (law 10), every default written out."""
    return registry.fields_of(cfg)


def to_toml(cfg: RunConfig) -> str:
    return tomli_w.dumps(to_table(cfg))


def config_hash(cfg: RunConfig) -> str:
    """12 hex digits over everything but the tracker: two runs with one hash do the same work."""
    table = {key: value for key, value in to_table(cfg).items() if key != "track"}
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=6).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """One line per key in which two tables differ."""
    lines = []
    for key in sorted({*old, *new}):
        where, before, after = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{where}.")
        elif before != after:
            lines.append(f"{where}: was {before!r}, is {after!r}")
    return lines


def part_context(cfg: RunConfig, requirements: Requirements, name: str, run_folder: Path) -> PartContext:
    """The context of the part `name` of a run in `run_folder`."""
    return PartContext(
        name=name,
        seed=cfg.seed,
        requirements=requirements,
        student=cfg.learner.student,
        task=cfg.task,
        generation=cfg.sampler.generation,
        numbers=Numbers(
            cfg.steps, cfg.prompts_per_step, cfg.group_size, cfg.max_staleness, cfg.training_positions, cfg.evaluation_positions
        ),
        folder=run_folder / "parts" / name,
        teachers=cfg.teachers,
        placement=Placement(cfg.threads, cfg.deterministic),
    )
