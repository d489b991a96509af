"""What is imported and what is shipped."""
import ast
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
    """Imports run one way, layers <- hnet <- experiments, and neither needs a data stack or orbax."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.split(".")[0]
                assert top in MAY_IMPORT[package] | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_importing_them_works_where_the_training_stack_is_missing():
    program = (
        "import sys\n"
        "blocked = ('ml_collections', 'grain', 'tensorflow_datasets', 'tensorboardX', 'experiments', 'configs')\n"
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

