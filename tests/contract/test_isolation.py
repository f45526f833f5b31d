"""No part is known by its class outside its own package: what others must know of it is a property of its
group's protocol.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from contract import typed_parts
from reflux.config.groups import BASES
from reflux.config.registry import belongs, kinds, load, part

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "reflux"


@pytest.fixture(autouse=True)
def no_finalizers_while_sources_are_parsed() -> Iterator[None]:
    # CPython 3.11 raises SystemError where a finalizer that runs during ast.parse parses as well, as the
    # printing of a warning may.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def counting() -> ModuleType:
    """benchmarks/structure.py, which counts the same before and after a change."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = counting()


def test_no_shipped_part_class_is_tested_for_outside_its_package() -> None:
    assert list(structure.class_tests(SOURCE)) == []


def test_no_part_is_probed() -> None:
    assert list(structure.part_probes(SOURCE)) == []


PROBES = {
    "isinstance": "from reflux.credit.margin import Margin\nisinstance(rule, Margin)",
    "isinstance of several": "from reflux.credit.margin import Margin as M\nisinstance(rule, str | M)",
    "issubclass": "from reflux.samplers.hf import HF\nissubclass(kind, (int, HF))",
    "type is": "from reflux.tasks.mix import Mix\ntype(task) is Mix",
    "a table by type": "from reflux.tasks.mix import Mix\n{Mix: True}.get(type(task))",
    "imported late": "def f(task):\n    from reflux.tasks.mix import Mix\n    return isinstance(task, Mix)",
    "a match": "from reflux.tasks.mix import Mix\nmatch task:\n    case Mix():\n        pass",
}


@pytest.mark.parametrize("code", PROBES.values(), ids=PROBES)
def test_the_count_sees_a_test_of_a_class(tmp_path: Path, code: str) -> None:
    write(tmp_path, {"checks/mine.py": code})
    assert len(list(structure.class_tests(tmp_path))) == 1


def test_the_count_leaves_a_package_its_own_classes(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "credit/other.py": PROBES["isinstance"],
            "checks/mine.py": "from reflux.types import FlowRollout\nisinstance(x, FlowRollout)",
        },
    )
    assert list(structure.class_tests(tmp_path)) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('vars(teacher).get("model")', 1),
        ('getattr(cfg.learner, "lora", None)', 1),
        ('hasattr(self.sampler, "generate")', 1),
        ('getattr(net.config, "layer_types", ())', 0),
        ("vars(module)", 0),
        ("getattr(part.wants, name)", 0),
    ],
)
def test_the_count_sees_a_probe(tmp_path: Path, code: str, found: int) -> None:
    write(tmp_path, {"checks/mine.py": code})
    assert len(list(structure.part_probes(tmp_path))) == found


def write(folder: Path, files: dict[str, str]) -> None:
    """A source tree with the registries of the library and these files."""
    for group in ("credit", "samplers", "tasks"):
        (folder / group).mkdir()
        (folder / group / "__init__.py").write_text((SOURCE / group / "__init__.py").read_text())
    for name, code in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)


def test_every_shipped_part_inherits_its_groups_base_and_is_checked_by_types() -> None:
    tree = ast.parse(Path(typed_parts.__file__).read_text())
    named = {
        f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for group in BASES:
        assert set(kinds(group).values()) <= named, f"tests/contract/typed_parts.py lacks a part of {group}"
        assert all(belongs(part(group, kind), group) for kind in kinds(group))
        made = getattr(typed_parts, group)()
        assert {type(one) for one in made} == {load(dotted) for dotted in kinds(group).values()}
