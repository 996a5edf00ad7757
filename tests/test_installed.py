"""What pip installs: every file that the packages need, and nothing called `kernels`, which is a package of others.

Hugging Face has a package `kernels`, for which transformers and bitsandbytes look. Our folder of that name holds the
package `refimpl_kernels`. These tests install both in fresh environments, without network: the other `kernels` is a
stand-in of one file, or the wheel that the variable KERNELS_WHEEL names (`.ci/run` downloads the real one).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

if not all(map(importlib.util.find_spec, ("pip", "setuptools"))):
    pytest.skip("pip and setuptools build and install here", allow_module_level=True)

ROOT = Path(__file__).parents[1]
PACKAGES = ("refimpl", "kernels", "golden", "export")
# Both are imported. Ours is where it was installed from, and gives what a person installs it for.
BOTH = """
import importlib.metadata, sys
from pathlib import Path
import kernels, refimpl_kernels, refimpl, golden, export
from refimpl_kernels import formats
where = Path(sys.argv[1])
assert where in Path(refimpl_kernels.__file__).parents, refimpl_kernels.__file__
assert Path(sys.prefix) in Path(kernels.__file__).parents, kernels.__file__
assert importlib.metadata.version("kernels") and callable(kernels.get_kernel)
assert refimpl.load().config.num_hidden_layers and len(formats.FORMATS) > 9
"""
LOOKS_FOR_KERNELS = "import transformers, bitsandbytes; from transformers import AutoModelForCausalLM"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is installed, in which a build may write."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A wheel of the distribution `kernels`."""
    if given := os.environ.get("KERNELS_WHEEL"):
        return Path(given)
    path = tmp_path_factory.mktemp("theirs") / "kernels-99.0-py3-none-any.whl"
    about = "kernels-99.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("kernels/__init__.py", "def get_kernel(name): ...\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in [*wheel.namelist(), f"{about}/RECORD"]))
    return path


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory) -> Path:
    """Our wheel."""
    folder = tmp_path_factory.mktemp("ours")
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    [wheel] = folder.glob("*.whl")
    return wheel


def run(*command: object, cwd: object = None) -> str:
    """What a program says. It finds no more than its own environment has."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=inherited)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(python: object, *arguments: object) -> str:
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def environment(folder: Path) -> Path:
    """A new environment's Python. It sees the packages of this one, but nothing that is installed here editable."""
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix"  # Python 3.10 has the second alone
    own = sysconfig.get_path("purelib", scheme, {"base": str(folder), "installed_base": str(folder)})
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(own, "of_this_environment.pth").write_text("\n".join(here))
    return python


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_both_packages_live_side_by_side(first, editable, source, ours, theirs, tmp_path):
    python = environment(tmp_path / "venv")
    order = [("--editable", source) if editable else (ours,), (theirs,)]
    for what in order if first == "ours" else order[::-1]:
        pip(python, "install", "--no-index", "--no-deps", "--no-build-isolation", *what)
    for cwd in (tmp_path, source):  # in a checkout, Python looks into the folder `kernels` first
        where = source if editable else tmp_path / "venv"
        run(python, "-c", BOTH, where, cwd=cwd)
        run(python, "-m", "refimpl", "demo", "--help", cwd=cwd)
    pip(python, "uninstall", "--yes", "kernels")
    run(python, "-c", "import refimpl_kernels.formats, refimpl", cwd=tmp_path)


def test_the_wheel_has_every_file_of_the_packages_and_no_other(ours):
    with zipfile.ZipFile(ours) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kept = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    files = kept.stdout.split() if kept.returncode == 0 else []
    if not files:
        pytest.skip("this is no checkout of git: which files belong to it is not known")
    files = {name.removeprefix("kernels/") for name in files if name != "kernels/README.md"}
    there = {name for name in files if (ROOT / name).exists() or (ROOT / "kernels" / name).exists()}
    assert installed == there
    assert not any(name.startswith("kernels/") for name in installed)


def test_libraries_that_look_for_kernels_do_not_stumble_over_the_folder(source, theirs, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    python = environment(tmp_path / "venv")
    pip(python, "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", source)
    alone = run(python, "-c", LOOKS_FOR_KERNELS, cwd=source)
    pip(python, "install", "--no-index", "--no-deps", theirs)
    for said in (alone, *(run(python, "-c", LOOKS_FOR_KERNELS, cwd=cwd) for cwd in (tmp_path, source))):
        assert "Traceback" not in said and str(source) not in said and "refimpl" not in said, said
