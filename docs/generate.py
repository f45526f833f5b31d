"""Writes docs/methods.md, docs/recipes.md and docs/configuration.md from the code: docstrings, fields,
comments, recipes, citations.

    python docs/generate.py

docs/notes.toml holds the texts that the code does not have: when to use a recipe, and the meaning of a field
without a comment. `tests/test_docs.py` fails if a page differs from the output of this script, or if a field
has no text.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent / "src"), str(DOCS.parent / "tests")]

from laws import bias  # noqa: E402
from reflux.config import registry  # noqa: E402
from reflux.config.bases import RECIPES, recipe_names  # noqa: E402
from reflux.config.citations import papers  # noqa: E402
from reflux.config.papers import GKD, Paper  # noqa: E402
from reflux.config.recipe import RunConfig, Track, load_recipe  # noqa: E402
from reflux.config.registry import PartOf  # noqa: E402
from reflux.config.thresholds import Health  # noqa: E402
from reflux.credit.group_advantage import group_advantages  # noqa: E402
from reflux.metrics.values import step_flops  # noqa: E402
from reflux.models.settings import Average, FlowLora, Lora, Merge  # noqa: E402
from reflux.rewards.oracle.faults import Faults  # noqa: E402
from reflux.storage.summary import method_of  # noqa: E402

NOTES: dict[str, Any] = tomllib.loads((DOCS / "notes.toml").read_text())
# Config tables that are not parts, by the path of their notes.
TABLES = {
    "": RunConfig,
    "track": Track,
    "health": Health,
    "learner.lora": Lora,
    "learners.flow.lora": FlowLora,
    "learners.flow.merge": Merge,
    "learners.flow.average": Average,
    "endpoints.local.faults": Faults,
}
# The place in a recipe where a part of each group is named.
WHERE = {
    "tasks": "`[task]`",
    "samplers": "`[sampler]`",
    "learners": "`[learner]`",
    "teachers": "`[teachers.NAME]`",
    "contexts": "`[teachers.NAME.context]`",
    "objectives": "`[[objectives]]`",
    "credit": "`[credit.NAME]`",
    "rewards": "`[rewards.NAME]`",
    "extrapolation": "`[extrapolation]`",
    "evals": "`[evals.NAME]`",
    "cluster": "`[cluster]`",
    "endpoints": "`[rewards.NAME.judge]`, `[rewards.NAME.teacher]` or `[task.teacher]`",
    "schedules": "the value of any key that takes a schedule",
}
MATHS = (
    "reflux.loss.divergences",
    "reflux.loss.baselines",
    "reflux.objectives.sampled_kl",
    "reflux.objectives.ratio",
    "reflux.models.flow.sde",
    "reflux.credit.log_ratio",
    "reflux.credit.change_point",
    "reflux.credit.margin",
    "reflux.credit.balance",
    "reflux.credit.share_credit",
    "reflux.contexts.peers",
    "reflux.extrapolation.extrapolate",
    "reflux.evals.spectra",
    "reflux.evals.prompt_difficulty",
    "reflux.loss.linear_divergence",
    "reflux.metrics.intervals",
    "reflux.metrics.ranking",
)
# The groups whose parts make up a method.
METHOD = ("objectives", "credit", "contexts", "extrapolation")
MADE = (
    "<!-- Written by docs/generate.py from the code. Do not edit: change the docstring, the comment or "
    "docs/notes.toml. -->\n"
)


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text)


def pages() -> dict[str, str]:
    made = {"methods.md": methods(), "recipes.md": recipes(), "configuration.md": configuration()}
    return {name: MADE + "\n" + "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


# --- methods.md


def methods() -> Iterator[str]:
    yield "# Methods: what each part does\n"
    yield NOTES["pages"]["methods"]
    for group in registry.GROUPS:
        kinds = registry.kinds(group)
        if not kinds:
            continue
        yield f"## {group}\n\nWritten as {WHERE[group]}.\n"
        for kind, dotted in kinds.items():
            cls = registry.part(group, kind)
            yield f"### {group} `{kind}`\n"
            yield f"`{dotted}`\n"
            yield f"{inspect.getdoc(cls)}\n"
            if group in METHOD and cls.when:  # type: ignore[attr-defined]
                yield f"When: {cls.when}\n"  # type: ignore[attr-defined]
    yield "## Bias of each estimator, measured\n"
    yield NOTES["pages"]["bias"]
    yield from bias.tables()
    yield "## The mathematics as plain functions\n"
    yield NOTES["pages"]["mathematics"]
    for module in MATHS:
        found = importlib.import_module(module)
        yield f"### `{module}`\n"
        yield f"{inspect.getdoc(found)}\n"
        yield from (_function(f) for f in vars(found).values() if _public_function(f, module))
    yield "### Elsewhere\n"
    yield from (_function(f, f.__module__) for f in (group_advantages, step_flops))
    yield "## Papers\n"
    yield "`reflux cite RECIPE` prints the BibTeX of the papers that a recipe uses.\n"
    yield from (
        f"- [{paper.title}](https://arxiv.org/abs/{paper.arxiv}) ({paper.year}; `{paper.key}`)"
        for paper in known_papers()
    )


def known_papers() -> list[Paper]:
    """Every paper that a shipped part can name, in the order of the groups."""
    modules = [
        dotted.partition(":")[0] for group in registry.GROUPS for dotted in registry.kinds(group).values()
    ]
    found = [
        value
        for module in (*modules, "reflux.objectives.ratio_rules")
        for value in vars(importlib.import_module(module)).values()
    ]
    return list({paper.key: paper for paper in (*found, GKD) if isinstance(paper, Paper)}.values())


def _public_function(value: object, module: str) -> bool:
    return (
        inspect.isfunction(value)
        and value.__module__ == module
        and not value.__name__.startswith("_")
        and bool(value.__doc__)
    )


def _function(function: Callable[..., Any], module: str = "") -> str:
    names = ", ".join(_parameter(p) for p in inspect.signature(function).parameters.values())
    doc = (inspect.getdoc(function) or "").replace("\n", "\n  ")
    return f"- `{module + '.' if module else ''}{function.__name__}({names})`: {doc}\n"


def _parameter(parameter: inspect.Parameter) -> str:
    return (
        parameter.name
        if parameter.default is inspect.Parameter.empty
        else f"{parameter.name}={parameter.default!r}"
    )


# --- recipes.md


def recipes() -> Iterator[str]:
    yield "# Recipes\n"
    yield NOTES["pages"]["recipes"]
    yield "| recipe | what it is | method |\n|---|---|---|"
    for name in recipe_names():
        yield (
            f"| [`{name}`](#{name}) | {_comment(RECIPES / f'{name}.toml')} | {method_of(load_recipe(name))} |"
        )
    yield "\n## Which objective\n"
    yield NOTES["pages"]["choose"]
    yield "| if | choose | because |\n|---|---|---|"
    yield from (
        f"| {row['if']} | `{shown}` | {row['why']} |"
        for row in NOTES["choose"]
        for shown in [row["set"].replace("'", '"')]
    )
    for name in recipe_names():
        path = RECIPES / f"{name}.toml"
        cited = ", ".join(
            f"[{paper.key}](https://arxiv.org/abs/{paper.arxiv})" for paper in papers(load_recipe(name))
        )
        yield f"\n## {name}\n\n{_comment(path)}\n\nWhen: {when(name)}\n\n```toml\n{_body(path)}\n```"
        yield f"\nDiffers from the paper: {NOTES['departures'][name]}" if name in NOTES["departures"] else ""
        yield f"\nPapers: {cited}." if cited else ""
    yield "\n# Bases: scale, apart from method\n"
    for path in sorted((RECIPES / "base").glob("*.toml")):
        yield f"## {path.stem}\n\n{_comment(path)}\n\n```toml\n{_body(path)}\n```\n"


def when(recipe: str) -> str:
    """When to use a recipe: its note, else the `when` of a part of its method. KeyError without either."""
    found = (
        part.when for _, group, part in registry.within(load_recipe(recipe)) if group in METHOD and part.when
    )
    return (
        NOTES["recipes"][recipe]
        if recipe in NOTES["recipes"]
        else next(found, "") or NOTES["recipes"][recipe]
    )


def _comment(path: Path) -> str:
    lines = path.read_text().split("\n")
    return " ".join(line.removeprefix("#").strip() for line in lines[: _first_key(lines)])


def _body(path: Path) -> str:
    lines = path.read_text().split("\n")
    return "\n".join(lines[_first_key(lines) :]).strip()


def _first_key(lines: list[str]) -> int:
    return next(place for place, line in enumerate(lines) if line and not line.startswith("#"))


# --- configuration.md


def configuration() -> Iterator[str]:
    yield "# Configuration: every key\n"
    yield NOTES["pages"]["configuration"]
    yield "## The top of a recipe\n"
    yield from _table("", RunConfig)
    yield "## `[track]`\n"
    yield f"{inspect.getdoc(Track)}\n"
    yield from _table("track", Track)
    yield "## `[health]`\n"
    yield f"{inspect.getdoc(Health)}\n"
    yield from _table("health", Health)
    for group in registry.GROUPS:
        yield (
            f"## {group}\n\nWritten as {WHERE[group]}."
            + ("" if registry.kinds(group) else " None ships yet.")
            + "\n"
        )
        for kind in registry.kinds(group):
            cls = registry.part(group, kind)
            yield f"### {group} `{kind}`\n"
            yield f"{inspect.getdoc(cls)}\n"
            yield from _table(f"{group}.{kind}", cls)
            for name, inner in registry.markers(cls).items():
                if isinstance(inner, type) and name in registry.field_names(cls):
                    yield f"#### {WHERE[group].replace(']', f'.{name}]')}\n"
                    yield f"{inspect.getdoc(inner)}\n"
                    yield from _table(next(path for path, table in TABLES.items() if table is inner), inner)


def _table(path: str, cls: type) -> Iterator[str]:
    fields = dataclasses.fields(cls)
    if not fields:
        yield "No keys.\n"
        return
    hints = typing.get_type_hints(cls, include_extras=True)
    yield "| key | type | default | |\n|---|---|---|---|"
    for field in fields:
        cells = (
            f"`{field.name.removesuffix('_')}`",
            in_words(hints[field.name]),
            _default(field),
            word(path, cls, field.name),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def word(path: str, cls: type, name: str) -> str:
    """The meaning of a field: its comment in the source, else its note, else "see above" if the class
    docstring names it. KeyError without any of them.
    """
    note = NOTES["fields"].get(f"{path}.{name}".lstrip("."))
    text = comments(cls).get(name) or note
    if text:
        return text
    if re.search(rf"\b{name.removesuffix('_')}\b", inspect.getdoc(cls) or ""):
        return "see above"
    raise KeyError(
        f"{cls.__module__}.{cls.__name__}.{name} has no comment, is not named in the docstring and has no "
        "note in docs/notes.toml"
    )


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment directly above it, for the class and its base classes."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        above: list[str] = []
        for line in textwrap.dedent(inspect.getsource(owner)).split("\n"):
            if (field := re.match(r"    (\w+): ", line)) and above:
                found[field[1]] = " ".join(above)
            above = [*above, line[6:]] if line.startswith("    # ") else []
    return found


def in_words(hint: Any) -> str:
    """A type in words, for a reader of TOML."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _annotated(inner[0], hint.__metadata__)
    if origin is typing.Literal:
        return ", ".join(f'`"{choice}"`' for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(choice) for choice in inner if choice is not type(None))
    if origin is tuple:
        return (
            f"list of {in_words(inner[0])}"
            if inner[-1] is ...
            else "[" + ", ".join(map(in_words, inner)) + "]"
        )
    if origin is dict:
        return "table"
    if dataclasses.is_dataclass(hint):
        return "table"
    return {str: "text", bool: "true, false", int: "whole number", float: "number"}.get(hint, str(hint))


def _annotated(hint: Any, metadata: tuple[Any, ...]) -> str:
    for entry in metadata:
        if isinstance(entry, PartOf):
            return _part_in_words(entry)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for entry in metadata
        for rule in getattr(entry, "metadata", [entry])
        for name, sign in _SIGNS
        if hasattr(rule, name)
    ]
    return " ".join([in_words(hint), *bounds])


_SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _part_in_words(marker: PartOf) -> str:
    if marker.group == "schedules":
        return "number or [schedule](#schedules)"
    many = {"": "a part of", "list": "list of", "table": "tables of"}[marker.many]
    return f"{many} {marker.group}"


def _default(field: dataclasses.Field[Any]) -> str:
    default: Any = field.default
    if type(default).__name__ == "FieldInfo":
        # a default of pydantic's Field
        made = default.default_factory() if getattr(default, "default_factory", None) else default.default
        return _value(made)
    if field.default_factory is not dataclasses.MISSING:
        return _value(field.default_factory())
    return "required" if default is dataclasses.MISSING else _value(default)


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'.replace("\\", "\\\\")
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in value) + "]`"
    return f"`{value}`" if value != {} else "none"


if __name__ == "__main__":
    main()
