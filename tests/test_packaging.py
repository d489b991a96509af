"""Imports between packages, and the contents of the wheel."""
import ast
import importlib
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = {"beartype", "einops", "flax", "hnet", "jax", "jaxlib", "jaxtyping", "layers", "numpy"}
MAY_IMPORT = {"layers": LIGHT - {"hnet"}, "hnet": LIGHT}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_layers_and_hnet_name_only_light_packages(package):
    """Imports run one way, layers <- hnet <- experiments, and neither package needs a data stack or orbax."""
    for path in (ROOT / package).rglob("*.py"):
        for name in _imported(path):
            top = name.split(".")[0]
            assert top in MAY_IMPORT[package] | sys.stdlib_module_names, f"{path.name} imports {name}"


# Floors of `layers`, from the bottom: a folder imports itself and those before it.
FLOORS = ("array_types", "arrays", "nn", "chunking", "recurrences", "attention", "selection", "cache", "memory",
          "mixers")


def _imported(path: Path) -> list[str]:
    """Lists the dotted names of all modules that a file imports, at any place in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


LAYERS = sorted((ROOT / "layers").glob("*/**/*.py"))


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_of_layers_imports_only_the_floors_below_it(path):
    floor = path.relative_to(ROOT / "layers").parts[0]
    for name in _imported(path):
        if name.startswith("layers."):
            below = name.split(".")[1]
            assert below in FLOORS[:FLOORS.index(floor) + 1], f"layers/{floor} must not import {name}"
        assert name != "layers" and not name.startswith(("hnet", "experiments")), f"layers must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem)
def test_configs_import_only_config_dataclasses(path):
    allowed = ("hnet", "layers", "configs", "dataclasses", "experiments.config", "experiments.tasks.config")
    for name in _imported(path):
        assert name.startswith(allowed), f"{path.name} imports {name}; a config is data"


@pytest.mark.parametrize("package", ["layers", "hnet", "experiments"])
def test_no_function_hides_a_module_of_its_own_name(package):
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        if "pallas" in found.name or found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        parent, _, leaf = found.name.rpartition(".")
        assert getattr(sys.modules[parent], leaf) is module, f"{parent}.{leaf} is no longer the module"


def test_importing_them_works_where_the_training_stack_is_missing():
    program = (
        "import sys\n"
        "blocked = ('optax', 'orbax', 'grain', 'tensorflow_datasets', 'tensorboardX', 'experiments', 'configs')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"  # None makes an import fail
        "import layers, hnet\n"
        "print('tensorflow' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "False"


def test_a_wheel_carries_hnet_and_layers_only(tmp_path):
    # Built with the hatchling that is installed here, so that no download is needed.
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hnet_jax-*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hnet", "layers"}

