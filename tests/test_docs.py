"""What a stranger reads is true: generated pages are up to date, commands parse, code runs, links resolve."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from reflux import checks
from reflux.cli.main import app
from reflux.config import registry
from reflux.config.bases import RECIPES, recipe_names, resolve
from reflux.config.recipe import Track, from_table, load_recipe
from reflux.models.settings import Lora

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# no registry, no machine of ours
HOSTS = {"arxiv.org", "localhost"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = ("reflux ", "make ", "python ", "python3 ", ".venv/bin/", "pip ")


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in one of these languages."""
    return [
        (page.name, text)
        for page in PAGES
        for language, text in FENCE.findall(page.read_text())
        if language in languages
    ]


def shell_lines() -> Iterator[tuple[str, str]]:
    for name, text in blocks("sh"):
        yield from ((name, line) for line in text.splitlines() if line.strip())
    for page in PAGES:
        bare = FENCE.sub("", page.read_text())
        yield from (
            (page.name, line.strip())
            for line in re.findall(r"^    (\S.*)$", bare, re.MULTILINE)
            if line.startswith(COMMANDS)
        )
        yield from (
            (page.name, code) for code in re.findall(r"`([^`\n]+)`", bare) if code.startswith(COMMANDS)
        )


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- pages made from the code


def test_generated_pages_are_up_to_date() -> None:
    for name, text in generator().pages().items():
        assert (ROOT / "docs" / name).read_text() == text, (
            f"docs/{name} is out of date: run python docs/generate.py"
        )


def test_every_recipe_and_part_has_its_place_in_the_pages() -> None:
    made = generator().pages()
    assert all(f"\n## {name}\n" in made["recipes.md"] for name in recipe_names())
    for group in registry.GROUPS:
        for kind, dotted in registry.kinds(group).items():
            assert f"\n### {group} `{kind}`\n\n`{dotted}`" in made["methods.md"]
            assert f"\n### {group} `{kind}`\n" in made["configuration.md"]


def test_a_field_without_a_word_is_refused() -> None:
    from dataclasses import dataclass

    @dataclass
    class Wordless:
        """It does something."""

        # said here
        spoken: int = 0
        silent: int = 0

    assert generator().word("x", Wordless, "spoken") == "said here"
    with pytest.raises(KeyError, match="silent has no comment"):
        generator().word("x", Wordless, "silent")


def test_no_note_speaks_of_what_is_gone() -> None:
    notes = tomllib.loads((ROOT / "docs" / "notes.toml").read_text())
    known = {path: set(registry.field_names(cls)) for path, cls in generator().TABLES.items()}
    known |= {
        f"{g}.{k}": set(registry.field_names(registry.part(g, k)))
        for g in registry.GROUPS
        for k in registry.kinds(g)
    }
    # the others say when to use them on their parts; without either, the page fails
    assert set(notes["recipes"]) <= set(recipe_names())
    for key in notes["fields"]:
        path, _, name = key.rpartition(".")
        assert name in known.get(path, ()), f"docs/notes.toml [fields] {key}: there is no such key"


def test_a_recipe_that_departs_from_its_paper_says_so_and_the_sentence_is_true_of_it() -> None:
    notes = tomllib.loads((ROOT / "docs" / "notes.toml").read_text())["departures"]
    page = (ROOT / "docs" / "recipes.md").read_text()
    exact = ("prefix", "release", "effopd", "uni_opd")
    assert set(notes) == {*exact, "peers", "rubric", "gad"}
    for name, sentence in notes.items():
        recipe, (first, *others) = (RECIPES / f"{name}.toml").read_text(), load_recipe(name).objectives
        assert (
            f"\nDiffers from the paper: {sentence}\n"
            in page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        )
        if name in exact:
            assert "exact reverse KL" in sentence
            assert "exact reverse KL" in recipe
            assert (registry.kind_of("objectives", first), first.divergence, first.support) == (
                "divergence",
                "reverse",
                "full",
            )
        if name == "uni_opd":
            assert "0.28" in sentence
            assert "0.28" in recipe
            assert [registry.kind_of("objectives", other) for other in others] == ["policy_gradient"]
            assert others[0].clip == (0.2, 0.2)
        if name == "peers":
            assert "Jensen-Shannon" in sentence
            assert "Jensen-Shannon" in recipe
            assert first.divergence == "jsd"


def test_what_the_notes_choose_is_an_objective_and_the_recipes_they_name_ship() -> None:
    rows = tomllib.loads((ROOT / "docs" / "notes.toml").read_text())["choose"]
    for row in rows:
        table = tomllib.loads(f"x = {row['set']}")["x"]
        assert from_table(resolve({"base": "toy", "objectives": [table]})).objectives
        assert set(re.findall(r"[Rr]ecipe `(\w+)`", row["why"])) <= set(recipe_names())
    chosen = {tomllib.loads(f"x = {row['set']}")["x"]["kind"] for row in rows}
    assert chosen == set(registry.kinds("objectives")), (
        "docs/notes.toml [[choose]] has a row for every objective"
    )


def test_every_recipe_begins_with_one_comment_that_says_what_it_is() -> None:
    for path in RECIPES.rglob("*.toml"):
        first, second = path.read_text().split("\n")[:2]
        assert first.startswith("# "), path.name
        assert first.endswith("."), path.name
        assert not second.startswith("#"), path.name


def test_the_rooms_of_the_design_are_those_of_the_contract() -> None:
    """docs/design.md lists the layers of .importlinter in their order, and no folder is without a room."""
    section = (ROOT / "docs" / "design.md").read_text().partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    contract = (ROOT / ".importlinter").read_text().partition("layers =\n")[2].partition("\nignore")[0]
    layers = [sorted(re.findall(r"reflux\.(\w+)", line)) for line in contract.splitlines()]
    assert [sorted(re.findall(r"`(\w+)`", row)) for row in rows] == layers
    rooms = {name for layer in layers for name in layer}
    folders = {path.parent.name for path in (ROOT / "src" / "reflux").glob("*/__init__.py")}
    assert folders <= rooms


# --- commands


def test_there_are_commands_to_test() -> None:
    assert len(list(shell_lines())) > 25


@pytest.mark.parametrize(("page", "line"), sorted(set(shell_lines())))
def test_every_command_parses(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(str(ROOT / value))
    tool, given = words[0].removeprefix(".venv/bin/"), words[1:]
    if tool == "reflux":
        check_reflux(given)
    elif tool == "make":
        assert re.search(rf"^{given[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            f"no make target {given[0]}"
        )
    elif tool in ("python", "python3"):
        check_python(given)
    elif tool == "torchrun":
        check_torchrun(given)
    else:
        assert tool == "pip", f"do not know how to check: {line}"
        assert given[0] == "install"


def check_reflux(words: list[str]) -> None:
    """The words parse; a recipe with overrides that names a real one resolves and fits together."""
    click_group = typer.main.get_command(app)
    if not words or words in (["--help"], ["..."]):
        return
    context = click_group.make_context("reflux", words[:1], resilient_parsing=True)
    _, command, _ = click_group.resolve_command(context, words[:1])  # type: ignore[attr-defined]
    assert command is not None, f"no command {words[0]}"
    given = [word for word in words[1:] if word != "..."]
    if not given:
        # a command by its name alone
        return
    found = command.make_context(words[0], given).params
    recipe = found.get("recipe")
    if recipe is None or recipe.isupper():
        return
    path = ROOT / recipe
    overrides = [text for text in found.get("overrides") or [] if not text.isupper()]
    checks.join(load_recipe(path if path.suffix == ".toml" else recipe, overrides))


def check_torchrun(words: list[str]) -> None:
    """It starts the module of the command line in every process."""
    place = words.index("-m")
    assert words[place + 1] == "reflux.cli.main"
    check_reflux(words[place + 2 :])


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
        words = words[2:]
    else:
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
    for word in words:
        if "/" in word and word.endswith(".py"):
            assert (ROOT / word).is_file(), f"no file {word}"


@pytest.mark.parametrize(("script", "option"), [("loss_memory", "--cases"), ("loss_gpu", "--sides")])
def test_a_benchmark_refuses_what_it_does_not_know_and_explains_itself(script: str, option: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py")]
    refused = subprocess.run([*command, option, "trl,nonsense,full"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "'nonsense'" in refused.stderr
    # the choices
    assert "reflux" in refused.stderr or "plain_full" in refused.stderr
    told = subprocess.run([*command, "--help"], capture_output=True, text=True)
    first = ast.get_docstring(ast.parse(Path(command[1]).read_text()))
    assert first is not None
    assert first in told.stdout


def keys_of(section: str) -> set[str]:
    """The recipe keys in the second column of the tables: `a.b` or `a.b=value`."""
    cells = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ") and " | " in line]
    spans = {code for cell in cells for code in re.findall(r"`([a-z_][\w.]*(?:=\w+)?)`", cell)}
    return {span.partition("=")[0] for span in spans if "." in span}


def test_the_keys_of_the_page_for_users_of_other_trainers_are_keys() -> None:
    text = (ROOT / "docs" / "from_other_trainers.md").read_text()
    groups = {"task": "tasks", "sampler": "samplers", "learner": "learners"}
    found = keys_of(text)
    assert len(found) > 30
    for key in found:
        head, *rest = key.split(".")
        if head == "track":
            assert rest[0] in registry.field_names(Track), key
            continue
        group = groups.get(head, head)
        # the number of an objective, or the name of a table
        name = rest[0] if head in groups else rest[1]
        fields = {
            field
            for kind in registry.kinds(group)
            for field in registry.field_names(registry.part(group, kind))
        }
        assert name in {"kind", *fields}, key
        if name == "lora":
            assert rest[1] in registry.field_names(Lora), key


# --- code


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_every_python_block_is_in_the_code_or_compiles(page: str, text: str) -> None:
    first, _, rest = text.partition("\n")
    quoted = re.fullmatch(r"# ((?:src|examples)/\S+\.py)(, abridged)?", first)
    if quoted is None:
        check_imports(compile(text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST))
        return
    source = (ROOT / quoted[1]).read_text()
    if not quoted[2]:
        assert rest in source, f"{quoted[1]} holds no such passage"
        return
    place = 0
    for line in filter(str.strip, rest.splitlines()):
        found = source.find(line + "\n", place)
        assert found >= 0, f"{quoted[1]} holds no such line after the ones before: {line}"
        place = found + len(line)


def check_imports(tree: ast.AST) -> None:
    """Every name a block imports is there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)


def test_python_overrides_in_the_readme_resolve() -> None:
    """Each `reflux.run(...)` of the pages names a recipe that fits together."""
    calls = [
        node
        for _, text in blocks("python")
        if "reflux.run(" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "reflux.run"
    ]
    assert calls
    for call in calls:
        checks.join(load_recipe(*map(ast.literal_eval, call.args)))


def test_the_readme_tells_what_the_quickstart_and_its_models_are() -> None:
    from reflux.models.locations import locate
    from reflux.models.sizes import size_of

    cfg = load_recipe("quickstart")
    text = " ".join((ROOT / "README.md").read_text().split())
    sizes = [
        size_of(locate(model), "model").parameters
        for model in (cfg.learner.model, cfg.teachers["main"].model)
    ]
    student, teacher = (f"{(count or 0) / 1e6:.2f} M" for count in sizes)
    assert f"trains `{cfg.learner.model}` ({student} parameters)" in text
    assert f"with `{cfg.teachers['main'].model}` ({teacher}) as its teacher" in text
    assert f"the exact {cfg.objectives[0].divergence} KL over the whole vocabulary, at every token" in text
    evals = cfg.evals
    assert (
        f"accuracy on {evals['accuracy'].problems} {evals['accuracy'].split} problems every {cfg.eval_every} "
        "steps" in text
    )
    assert f"teacher on {evals['test_accuracy'].problems} {evals['test_accuracy'].split} problems" in text


def test_the_readme_has_a_row_for_every_recipe_with_its_evidence() -> None:
    """Evidence is a link to the studies, the table of the quickstart, or the words "not studied yet"."""
    section = (ROOT / "README.md").read_text().partition("\n## Choosing a method\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert sorted(name.strip("`") for name, *_ in rows) == sorted(recipe_names())
    for name, *_, evidence in rows:
        linked = re.fullmatch(r"\[.+\]\(docs/studies\.md#[\w-]+\)", evidence)
        assert linked or evidence in ("not studied yet", "the table above"), name


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_metric_of_a_step_is_explained(tiny_run: Callable[..., Any]) -> None:
    """docs/running.md names every key that a step writes; objectives and options add some to these."""
    section = (ROOT / "docs" / "running.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    (row,) = tiny_run("full", steps=1).rows("metrics")
    named = set(re.findall(r"`(\w+)`", section))
    assert set(row) - named == set()


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_every_recipe_in_the_pages_parses(page: str, text: str) -> None:
    table = tomllib.loads(text)
    if "base" in table and "objectives" in table:
        from_table(resolve(table))


def test_the_data_of_the_readme_is_data(tmp_path: Path) -> None:
    from reflux.tasks.jsonl import Jsonl

    ((_, text),) = blocks("json")
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    task = Jsonl(path=str(path), validation=0.0)
    stream = task.prompts("train", 0)
    found = {prompt.messages[-1]["content"]: prompt for prompt in (next(stream) for _ in range(3))}
    assert {prompt.answer for prompt in found.values()} == {"19", "5", None}
    assert task.verify(found["2 + 3?"], "It is 5.") == 1.0


# --- links, paths


def anchors(text: str) -> set[str]:
    """As the usual hosts make them from headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            assert target.split("/")[2] in HOSTS, f"{page.name} links to {target}"
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(found.read_text()), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in re.findall(
        r"`((?:src|tests|docs|examples|benchmarks|studies|\.ci)/[\w./*-]*)`", page.read_text()
    ):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_a_machine_and_no_other_host(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?<![\w:/.<])/(?:home|root|tmp|opt|usr|mnt|var|Users)\b\S*", text)
    assert set(re.findall(r"https?://([\w.-]+)", text)) <= HOSTS
