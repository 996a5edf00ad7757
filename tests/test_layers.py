"""What may import what, and what must stay installable together."""

import ast
import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kernels

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "refimpl", "golden", "export"]
ABOVE_ALL = {*(ROOT / "refimpl" / "cli").glob("*.py"), ROOT / "refimpl" / "__main__.py"}
# Slow to import, and needed by one package alone.
ONLY_IN = {"torch": ["golden"], "transformers": ["golden"], "onnx": ["export"], "qai_hub": ["export"]}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    for path in sorted((ROOT / package).glob("**/*.py")):
        for name in imports(path):
            if name in ORDER and path not in ABOVE_ALL:
                assert ORDER.index(name) <= ORDER.index(package), f"{path} imports {name}"
            assert package in ONLY_IN.get(name, [package]), f"{path} imports {name}"


@pytest.mark.parametrize("package", ORDER)
def test_every_module_stands_in_its_package_s_readme(package):
    """A newcomer finds each file on the map."""
    told = (ROOT / package / "README.md").read_text()
    modules = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not [name for name in sorted(modules) if f"`{name}`" not in told]


def test_transformers_does_not_take_our_kernels_for_its_own():
    assert kernels.__version__ == "0.0.0"


def test_qai_hub_and_onnx_agree_on_protobuf():
    """qai-hub takes protobuf up to 6.31.1, newer onnx needs at least that: what is installed must satisfy both."""
    installed = importlib.metadata.version("protobuf")
    for package in ("qai-hub", "onnx"):
        for line in importlib.metadata.requires(package) or []:
            requirement = Requirement(line)
            if requirement.name == "protobuf" and requirement.marker is None:
                assert requirement.specifier.contains(installed), f"{package} needs {requirement}, {installed} is here"
