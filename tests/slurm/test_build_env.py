"""slurm/build_env.sh over a Python that brings its own torch, with wheels made here instead of an index."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[2]
NEEDS = [Requirement(n) for n in tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]]
TORCH = next(need for need in NEEDS if need.name == "torch")


def metadata(name: str, version: str, needs: str = "") -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (f"Requires-Dist: {needs}\n" if needs else "")


def write_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", metadata(name, version, needs))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def container_python(folder: Path, torch_version: str) -> Path:
    """A Python with a torch of its own and no pip, as images have it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name, version in (("torch", torch_version), ("triton", "3.4.0+git1"), ("numpy", "1.26.4")):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("")
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata(name, version))
    return folder / "bin/python"


def write_index(folder: Path, deepspeed_needs: str) -> Path:
    """What pyproject.toml names at the lowest version it allows, and a newer torch to be tempted by."""
    folder.mkdir()
    for need in NEEDS:
        lowest = next(s.version for s in need.specifier if s.operator == ">=")
        write_wheel(folder, need.name, lowest, deepspeed_needs if need.name == "deepspeed" else "torch")
    write_wheel(folder, "torch", "2.14.1")
    return folder


def build(python: Path, index: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHECKOUT / "slurm/build_env.sh", "none", out],
        env={**os.environ, "MARATHON_PYTHON": str(python), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)},
        capture_output=True,
        text=True,
    )


def test_the_torch_of_the_container_is_kept_whatever_an_index_offers(tmp_path: Path) -> None:
    python = container_python(tmp_path / "container", "2.10.0+rocm7.0")
    out = tmp_path / "environment"
    done = build(python, write_index(tmp_path / "index", "torch>=2.0"), out)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [out / "bin/python", "-m", "pip", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"^torch +2\.10\.0\+rocm7\.0$", listed, re.MULTILINE)
    assert all(re.search(rf"^{need.name} ", listed, re.MULTILINE | re.IGNORECASE) for need in NEEDS)
    added = {path.name.split("-")[0] for path in out.glob("lib/python*/site-packages/*.dist-info")}
    assert added.isdisjoint({"torch", "triton", "numpy"}) and "deepspeed" in added
    where = subprocess.run(
        [out / "bin/python", "-c", "import torch, deepspeed; print(torch.__file__)"], capture_output=True, text=True
    )
    assert where.stdout.startswith(str(tmp_path / "container"))


def test_a_package_that_insists_on_another_torch_is_refused_with_the_versions(tmp_path: Path) -> None:
    python = container_python(tmp_path / "container", "2.10.0+rocm7.0")
    done = build(python, write_index(tmp_path / "index", "torch>=2.12"), tmp_path / "environment")
    assert done.returncode == 1
    assert "rule:" in done.stderr and "torch==2.10.0+rocm7.0" in done.stderr and "deepspeed" in done.stderr


def test_a_container_whose_torch_is_too_old_is_refused_before_pip_looks_for_anything(tmp_path: Path) -> None:
    python = container_python(tmp_path / "container", "2.6.0+rocm6.2.4")
    done = build(python, tmp_path, tmp_path / "environment")
    assert done.returncode == 1
    assert "torch 2.6.0+rocm6.2.4" in done.stderr and "repair:" in done.stderr


@pytest.mark.parametrize("version", ["2.7.0", "2.9.0a0+nv25.10", "2.10.0+rocm7.0", "2.13.0+cpu", "2.14.9"])
def test_torch_of_known_containers_is_accepted(version: str) -> None:
    assert TORCH.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0a0+nv25.01", "2.15.0", "2.15.0a0+nv26.12", "3.0.0"])
def test_torch_beyond_what_is_tested_is_refused(version: str) -> None:
    assert not TORCH.specifier.contains(version, prereleases=True)
