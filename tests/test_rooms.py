"""Which room of the package may import which."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "projects" / "dfd"
# What the rooms of the method may import besides Python's own library.
METHOD = {"torch", "torchvision", "detectron2", "fvcore"} | {
    f"dfd.{room}" for room in ("distill", "losses", "weights", "errors", "ranges")
}


def imports(file):
    """Full names of the modules that a file imports, inside functions too."""
    parts = ("dfd", *file.relative_to(PACKAGE).with_suffix("").parts)
    package = parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            # "from .. import x" imports the module x where there is one.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_by(*rooms):
    for room in rooms:
        path = PACKAGE / room
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for module in imports(file):
                yield f"{file.relative_to(PACKAGE)}: {module}", module


def rooms_but(*others):
    return [path.name for path in PACKAGE.iterdir() if path.name not in {*others, "__pycache__"}]


def within(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("room", ["distill", "losses"])
def test_the_method_depends_on_torch_and_detectron2_alone(room):
    allowed = METHOD | sys.stdlib_module_names
    wrong = [where for where, module in imported_by(room) if not within(module, allowed)]
    assert not wrong


def test_nothing_depends_on_research():
    rest = rooms_but("research")
    assert not [w for w, module in imported_by(*rest) if within(module, ["dfd.research"])]


@pytest.mark.parametrize("room", ["weights", "modeling", "data"])
def test_models_and_data_know_nothing_of_the_engine(room):
    above = ["dfd.engine", "dfd.demo", "dfd.deploy", "dfd.research"]
    wrong = [where for where, module in imported_by(room) if within(module, above)]
    # Saved configs call the generated dataset by its old name.
    assert wrong == (["data/__init__.py: dfd.demo.generated_shapes"] if room == "data" else [])


def test_the_engine_knows_nothing_of_what_is_done_with_its_runs():
    above = ["dfd.demo", "dfd.deploy"]
    assert not [w for w, module in imported_by("engine") if within(module, above)]


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "losses" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "import timm.layers\nfrom ..engine import run\nfrom .. import data\n"
        "def f():\n    from ..research.page import table\n    from .base import X\n"
    )
    assert list(imports(file)) == [
        "timm.layers",
        "dfd.engine.run",
        "dfd.data",
        "dfd.research.page.table",
        "dfd.losses.base.X",
    ]
