"""The distribution: one name for every module, buildable, importable from anywhere."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import environment

ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path) -> str:
    """Standard output of a program that starts in a folder, which is first on its sys.path."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_transformers_probe_for_hub_kernels_does_not_import_ours_twice() -> None:
    """With the repository root on sys.path, `import kernels` finds our folder under a second name."""
    code = (
        "import sys, transformers, cggr_compile\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "import kernels\n"
        "print(is_kernels_available(), sorted(name for name in sys.modules if name.startswith('kernels')))\n"
    )
    assert run(code, ROOT).strip() == "False ['kernels']"


@pytest.mark.parametrize("module", ["kernels.ops", "passes"])
def test_bare_names_are_refused(module: str) -> None:
    code = f"import importlib\ntry:\n    importlib.import_module({module!r})\nexcept ImportError as e:\n    print(e)"
    assert "No module named" in run(code, ROOT) or "installed as 'cggr_compile.passes'" in run(code, ROOT)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built from a clean copy without build isolation."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return out


def test_the_built_wheel_imports_from_an_empty_folder(distributions: Path, tmp_path: Path) -> None:
    wheel = next(distributions.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "cggr_compile/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cggr_compile"}
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import cggr_compile, cggr_compile.passes.pipeline, cggr_compile.kernels.op.score, importlib.metadata as m\n"
        "print(cggr_compile.__file__)\n"
        "print([e.value for e in m.entry_points(group='torch_dynamo_backends') if e.name == 'cggr'][0])\n"
        "print(m.version('cggr-compile') == cggr_compile.__version__)\n"
    )
    where, backend, same_version = run(code, empty).split()
    assert where.startswith(str(site))
    assert backend == "cggr_compile.front.backend:cggr"
    assert same_version == "True"


def test_the_sdist_holds_sources_tests_and_licence(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"passes/pipeline.py", "kernels/op/score.py", "LICENSE", "README.md", "cggr_compile/front/api.py"} <= names
