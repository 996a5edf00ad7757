"""What may import what, and what must stay installable together."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {"refimpl_kernels": ROOT / "kernels" / "refimpl_kernels"} | {
    name: ROOT / name for name in ("refimpl", "golden", "export")
}
# Each may import what stands before it, packages and the rooms inside them. A room's name ends with a dot; a file that
# stands between rooms has its own name; what is left of a package then has the package's.
ORDER = [
    "refimpl_kernels",
    "refimpl_kernels.formats.",
    "refimpl_kernels.fast.",
    "refimpl",
    "refimpl.text.",
    "refimpl.checkpoint.",
    "refimpl.forward",
    "refimpl.windows",
    "refimpl.generation",
    "refimpl.loss",
    "refimpl.grids.",
    "refimpl.blocks.",
    "refimpl.gradients.",
    "refimpl.model",
    "refimpl.info",
    "refimpl.bench.",
    "refimpl.pages.",
    "golden",
    "golden.make.",
    "golden.cost.",
    "export",
    "export.graphs.",
    "export.run.",
    "export.files.",
    "export.phone.",
    "export.preflight.",
    "export.folder.",
    "export.hub.",
    "export.measure.",
    "export.causes.",
    "export.verdict.",
    "export.search.",
    "refimpl.serve.",
    "refimpl.conformance.",
    "refimpl.learn.",
    "refimpl.cli.",
]
# Slow to import, and needed by one package alone.
ONLY_IN = {"torch": ["golden"], "transformers": ["golden"], "onnx": ["export"], "qai_hub": ["export"]}


def modules() -> dict[str, Path]:
    """name -> file, of everything that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Every module that `name` imports: at the top, inside functions, and for types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inner & MODULES.keys()
            found |= submodules | ({node.module} if inner - submodules else set())
    return found


def floor(name: str) -> int:
    """The place of a module in ORDER."""
    return max(ORDER.index(room) for room in ORDER if f"{name}.".startswith(room if room[-1] == "." else f"{room}."))


def test_rooms_import_what_stands_below_them():
    wrong = []
    for name in MODULES.keys() - {f"{package}" for package in FOLDERS} - {"refimpl.__main__"}:
        above = [other for other in imports(name) & MODULES.keys() if floor(other) > floor(name)]
        wrong += [f"{name} imports {other}" for other in above]
    assert not sorted(wrong)


@pytest.mark.parametrize("package", FOLDERS)
def test_slow_packages_are_imported_by_one_package_alone(package):
    for name in MODULES:
        if name.split(".")[0] == package:
            for other in imports(name):
                assert package in ONLY_IN.get(other.split(".")[0], [package]), f"{name} imports {other}"


def test_no_circle_of_files():
    """A module that is reached from itself shows only when files are imported in another order."""
    inside = {name: imports(name) & MODULES.keys() - {name} for name in MODULES}
    while leaves := [name for name, others in inside.items() if not others & inside.keys()]:
        for name in leaves:
            del inside[name]
    assert not {name: sorted(others & inside.keys()) for name, others in inside.items()}


@pytest.mark.parametrize("package", FOLDERS)
def test_every_module_stands_in_a_readme(package):
    """A newcomer finds each file on the map of its room, or of its package."""
    lost = []
    for name, path in MODULES.items():
        if name.split(".")[0] == package and path.name not in ("__init__.py", "__main__.py"):
            top = ROOT / "kernels" if package == "refimpl_kernels" else FOLDERS[package]
            maps = [folder / "README.md" for folder in {path.parent, top} if (folder / "README.md").is_file()]
            lost += [name] * (not any(f"`{path.name}`" in map.read_text() for map in maps))
    assert not lost


def test_qai_hub_and_onnx_agree_on_protobuf():
    """qai-hub takes protobuf up to 6.31.1, newer onnx needs at least that: what is installed must satisfy both."""
    installed = importlib.metadata.version("protobuf")
    for package in ("qai-hub", "onnx"):
        for line in importlib.metadata.requires(package) or []:
            requirement = Requirement(line)
            if requirement.name == "protobuf" and requirement.marker is None:
                assert requirement.specifier.contains(installed), f"{package} needs {requirement}, {installed} is here"


def test_the_lowest_versions_that_ci_tries_are_those_that_are_declared():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tried = dict(line.split("==") for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if "==" in line)
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)
    tests = re.search(r"^test = \[(.*?)\]", project, re.M | re.S)
    declared = [Requirement(said) for said in re.findall(r'"([^"]+)"', needed[1] + tests[1])]
    assert {one.name for one in declared} == tried.keys()
    for one in declared:
        (floor,) = (spec.version for spec in one.specifier if spec.operator == ">=")
        assert f"{tried[one.name]}.".startswith(f"{floor}."), one
