"""Counts of the coupling between the parts of a checkout: python benchmarks/structure.py [CHECKOUT].

- files that take the run: source files with a parameter or a field of type `Run`;
- part classes in isinstance outside their package: names of shipped part classes (those of the registries)
  in isinstance or issubclass, in `type(x) is C`, and as keys of a table that is indexed with `type(x)`; and
  vars() or getattr() on a part of the config;
- frames from the command line: frames of the library on the stack where `reflux run` computes its first
  gradient, on one prompt of the embedded models, and at the deepest place of that step before it (the
  mathematics of the objective);
- places a method touches: files that name the class of a shipped method or that its recipe needs.

The checkout is not changed. NOTEBOOK.md holds the numbers before and after a change.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
# Parts that are separate methods, each with its recipe.
METHODS = {
    "reflux.credit.release:Release": "release",
    "reflux.credit.margin:Margin": "uni_opd",
    "reflux.contexts.peers:Peers": "peers",
    "reflux.extrapolation.extrapolate:Extrapolate": "effopd",
    "reflux.objectives.velocity_kl:VelocityKL": "flow",
    "reflux.samplers.teacher_samples:TeacherSamples": "flow_sft",
}
HOLDERS = {
    "cfg",
    "part",
    "task",
    "sampler",
    "learner",
    "teacher",
    "objective",
    "rule",
    "context",
    "reward",
    "extrapolation",
    "evaluation",
}
PROBE = """
import asyncio, json, os, sys, threading
import torch, torch._dynamo

def stack(frame):
    found = []
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCE):
            found.append(f"{name[len(SOURCE) + 1:]}:{frame.f_code.co_name}")
        frame = frame.f_back
    return found

DEEPEST = []

def profiled(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
        found = stack(frame)
        in_step = any(place.startswith("learners/") and place.endswith("step") for place in found)
        if len(found) > len(DEEPEST) and in_step:
            DEEPEST[:] = found

def first(*arguments, **named):
    sys.setprofile(None)
    print("FRAMES " + json.dumps([stack(sys._getframe(1)), DEEPEST]), flush=True)
    os._exit(0)

torch.autograd.grad = lambda *arguments, **named: first()
torch.Tensor.backward = lambda *arguments, **named: first()
from reflux.cli.main import main
SETTINGS = ["steps=1", "prompts_per_step=1", "sampler.max_tokens=4", "threads=1", *OFF]
sys.argv = ["reflux", "run", "full", *SETTINGS, "--out", OUT]
sys.setprofile(profiled)
threading.setprofile(profiled)
main()
"""


def main(checkout: Path) -> None:
    source = checkout / "src" / "reflux"
    taking = sorted(name for name, tree in trees(source) if takes_the_run(tree))
    tests = list(class_tests(source))
    probes = list(part_probes(source))
    print(f"files that take the run             {len(taking)}")
    naming = {name.partition(":")[0] for name, _ in tests}
    print(f"part classes in isinstance          {len(tests)}, in {len(naming)} files outside their package")
    print(f"vars() or getattr() on a part       {len(probes)}")
    stack, deepest = frames_to_gradient(checkout)
    print(
        f"frames from the command line        {len(stack)} to the gradient, {len(deepest)} at the deepest "
        "place of the step"
    )
    for which, places_of in (("gradient", stack), ("deepest", deepest)):
        print(f"    {which}: {' > '.join(reversed(places_of))}")
    for dotted, recipe in METHODS.items():
        found = places(checkout, dotted, recipe)
        print(f"places of {dotted.partition(':')[2]:12} {len(found):2}  {', '.join(found)}")
    for name, what in [*tests, *probes]:
        print(f"    {name}: {what}")


def trees(source: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(source.rglob("*.py")):
        yield str(path.relative_to(source)), ast.parse(path.read_text())


def takes_the_run(tree: ast.Module) -> bool:
    """True if a parameter or a field has the type `Run` or `Run | None`."""
    hints = [
        node.annotation
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None
    ]
    return any(isinstance(name, ast.Name) and name.id == "Run" for hint in hints for name in ast.walk(hint))


def part_classes(source: Path) -> dict[str, str]:
    """The dotted names of the shipped parts, and the package of each, from the registries. Schedules are left
    out, because they are numbers.
    """
    found = {}
    for path in sorted(source.glob("*/__init__.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            values = node.values if isinstance(node, ast.Dict) else []
            dotted = [
                v.value
                for v in values
                if isinstance(v, ast.Constant) and isinstance(v.value, str) and ":" in v.value
            ]
            found |= {name.replace(":", "."): path.parent.name for name in dotted}
    return found


def imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of every import from the library, anywhere in a file."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def class_tests(source: Path) -> Iterator[tuple[str, str]]:
    """(file, class) for each part class that a type test names outside the package of the class."""
    parts = part_classes(source)
    for name, tree in trees(source):
        known = {
            local: dotted
            for local, dotted in imported(tree).items()
            if dotted in parts and parts[dotted] != name.split("/")[0]
        }
        for node in ast.walk(tree):
            for tested in _tested(node):
                for inner in ast.walk(tested):
                    if isinstance(inner, ast.Name) and inner.id in known:
                        yield f"{name}:{node.lineno}", known[inner.id]  # type: ignore[attr-defined]


def _tested(node: ast.AST) -> list[ast.expr]:
    """The classes that this expression tests a value against."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
    ):
        return node.args[1:]
    if isinstance(node, ast.Compare) and any(_is_type(side) for side in (node.left, *node.comparators)):
        return [node.left, *node.comparators]
    if isinstance(node, ast.MatchClass):
        return [node.cls]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and any(_is_type(arg) for arg in node.args)
    ):
        return [
            key
            for inner in ast.walk(node.func.value)
            if isinstance(inner, ast.Dict)
            for key in inner.keys
            if key is not None
        ]
    return []


def _is_type(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"


def part_probes(source: Path) -> Iterator[tuple[str, str]]:
    """(file, call) for each vars() or getattr() with a fixed name on a variable with the name of a part."""
    for name, tree in trees(source):
        for node in ast.walk(tree):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("vars", "getattr", "hasattr") and isinstance(node, ast.Call) and node.args:
                names = {part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)}
                names |= {part.attr for part in ast.walk(node.args[0]) if isinstance(part, ast.Attribute)}
                last = node.args[0].attr if isinstance(node.args[0], ast.Attribute) else ""
                fixed = called == "vars" or (len(node.args) > 1 and isinstance(node.args[1], ast.Constant))
                if fixed and names & HOLDERS and last not in ("net", "config"):
                    yield f"{name}:{node.lineno}", ast.unparse(node)


def frames_to_gradient(checkout: Path) -> tuple[list[str], list[str]]:
    """The library's frames where the first gradient is computed, and at the deepest place before it,
    innermost first.
    """
    off = [f"evals.{name}=none" for name in ("accuracy", "agreement", "teacher_accuracy")]
    with tempfile.TemporaryDirectory() as scratch:
        values = (
            f"SOURCE, OUT, OFF = {str((checkout / 'src' / 'reflux').resolve())!r}, "
            f"{scratch + '/run'!r}, {off!r}\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str((checkout / "src").resolve()),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", values + PROBE],
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FRAMES ")]
    if not lines:
        raise SystemExit(f"the run computed no gradient:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("FRAMES "))


def places(checkout: Path, dotted: str, recipe: str) -> list[str]:
    """The files of a method: its module, its recipe, and the files that import or name it."""
    module, _, cls = dotted.partition(":")
    own = module.replace(".", "/") + ".py"
    found = {f"src/{own}"}
    for name, tree in trees(checkout / "src" / "reflux"):
        if f"{module}.{cls}" in imported(tree).values() or dotted in _texts(tree):
            found.add(f"src/reflux/{name}")
    found |= {str(path.relative_to(checkout)) for path in checkout.glob(f"src/reflux/recipes/{recipe}.toml")}
    notes = checkout / "docs" / "notes.toml"
    if notes.is_file() and any(line.startswith(f"{recipe} = ") for line in notes.read_text().splitlines()):
        found.add("docs/notes.toml")
    cite = checkout / "src/reflux/config/citations.py"
    if (
        f'kind_of("{module.split(".")[1]}"' in cite.read_text()
        or f'"{module.rpartition(".")[2]}"' in cite.read_text()
    ):
        found.add("src/reflux/config/citations.py")
    return sorted(found)


def _texts(tree: ast.Module) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)
