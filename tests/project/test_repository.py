"""The files around the code agree with each other."""

import importlib
import io
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from vldnp import models
from vldnp._files import fingerprint

ROOT = Path(__file__).parents[2]


def normal(name: str) -> str:
    """A package's name as an index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines) -> dict[str, str]:
    matches = [re.fullmatch(r"([\w.-]+)==([\w.!+-]+)", line.strip()) for line in lines]
    return {normal(match[1]): match[2] for match in matches if match}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pip_section():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    return next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))


def test_constraints_are_pins_and_conda_has_the_same(pip_section):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints, conda = pins(lines), pins(pip_section)
    assert len(constraints) == sum(bool(line) and not line.startswith("#") for line in lines)
    assert conda == {name: constraints.get(name) for name in conda}
    assert "-c constraints.txt" in pip_section and "-e .[dev]" in pip_section


def test_conda_pins_what_the_project_asks_for(project, pip_section):
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), start=[])
    names = {normal(re.split(r"[>\[]", one)[0]) for one in wanted} - {"vldnp"}
    assert set(pins(pip_section)) == names
    assert all(">=" in one for one in wanted if not one.startswith("vldnp"))


def test_pip_takes_the_conda_environments_section(pip_section, tmp_path):
    """As conda hands it to pip: it resolves, to what is installed here, with no index to ask."""
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("\n".join(pip_section).replace("-c ", f"-c {ROOT}/"))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation"]
    asked = [*pip, "--no-index", "--disable-pip-version-check", "-r", wanted]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    (would,) = re.findall(r"^Would install (.*)$", said.stdout, re.M)
    assert re.fullmatch(r"vldnp-\S+", would)


def test_make_and_conda_set_the_same_variables():
    made = dict(re.findall(r"^export (\w+) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M))
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["variables"]
    assert made == conda and len(made) == 4
    assert made["OMP_WAIT_POLICY"] == "PASSIVE" and made["GOMP_SPINCOUNT"] == "1000"


def test_packages_and_assets_are_found():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {p.parent for top in ("vldnp", "moji") for p in (ROOT / top).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in found}
    assert set(setup["packages"]) == packages | {"vldnp.data"}
    others = {p for p in (ROOT / "vldnp").rglob("*") if p.suffix not in ("", ".py", ".pyc")}
    listed = {
        p
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
        for p in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert listed == others


def test_no_system_converts_the_ends_of_lines(tmp_path):
    """As Windows checks out; a fingerprint of converted files would be another model's."""
    part = "data/models/moji-sd/scheduler"
    asked = ["git", "-c", "core.autocrlf=true", "archive", "--format=tar", "HEAD", part]
    packed = subprocess.run(asked, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(tmp_path, filter="data")
    assert fingerprint(tmp_path / part) == fingerprint(ROOT / part)


def test_libraries_older_than_tested_are_said_in_one_line(monkeypatch):
    assert models.old == []
    old = {"transformers": "4.51.3", "nudenet": "2.0.9"}
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or own(name))
    with pytest.warns(UserWarning, match=r"with transformers 4.51.3 \(needs >=5") as said:
        importlib.reload(models)
    text = str(said[0].message)
    assert "nudenet 2.0.9" in text and "torch " not in text and "\n" not in text


def test_licence_and_credits():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2510.26052"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" in readme and "CC BY-SA 4.0" in readme and "2510.26052" in readme


def test_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_models_do_not_say_where_they_were_trained():
    configs = [path.read_text() for path in (ROOT / "data" / "models").rglob("*.json")]
    assert configs and not [text for text in configs if '"_name_or_path"' in text]
