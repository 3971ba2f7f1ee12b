"""The installed package: conf/ in the wheel, the entry point, nothing left in the checkout."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tlcli
from tlcli.cli.conf_files import conf_dir

ROOT = Path(__file__).resolve().parents[1]


def listing() -> set[str]:
    done = subprocess.run(["git", "status", "--porcelain", "--ignored"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if "__pycache__" not in line}


@pytest.mark.slow
def test_the_wheel_has_the_package_with_its_conf_and_nothing_else(tmp_path: Path) -> None:
    before = listing()
    command = [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    assert listing() == before  # building leaves nothing behind
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as content:
        wheel = content.namelist()
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tlcli").rglob("*.*") if "__pycache__" not in p.parts}
    files |= {"tlcli/conf/" + p.relative_to(ROOT / "conf").as_posix() for p in (ROOT / "conf").rglob("*.yaml")}
    assert any(name.endswith(".html.j2") for name in files)
    assert files <= set(wheel)
    assert {name.split("/")[0] for name in wheel} == {"tlcli", f"tlcli-{tlcli.__version__}.dist-info"}


def test_the_checkout_finds_its_own_conf() -> None:
    assert conf_dir().resolve() == ROOT / "conf"


def test_every_dependency_has_a_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for dependency in wanted:
        assert "==" in dependency or (">=" in dependency and "<" in dependency), dependency
    assert project["scripts"] == {"tlcli": "tlcli.cli:main"}
    assert project["requires-python"] == ">=3.11"
