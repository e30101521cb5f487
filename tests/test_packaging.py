"""The wheel and the sdist hold what a user needs: the code, its types, the declarative YAML, the licence.

Both are built by the backend in this environment (no isolation, no network), into a temporary folder.
"""

import email
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import microscale

ROOT = Path(__file__).resolve().parents[1]
YAML = sorted(p for kind in ("formats", "recipes") for p in (ROOT / kind).glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
INFO = f"microscale-{microscale.__version__}.dist-info"

pytestmark = pytest.mark.slow


def build(target: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist of a source folder."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout."""
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as `pip install` lays it out; put it first on the path and the checkout is out of sight."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def in_wheel(path: Path) -> str:
    """Where the wheel holds a YAML file of the checkout."""
    return f"microscale/_data/{path.relative_to(ROOT).as_posix()}"


def run_installed(installed: Path, code: str, *args: str) -> str:
    """Run code against the unpacked wheel only."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_yaml_byte_for_byte(wheel):
    assert YAML
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("microscale/_data/")}
        assert packed == {in_wheel(p) for p in YAML}
        assert all(archive.read(in_wheel(p)) == p.read_bytes() for p in YAML)


def test_wheel_holds_all_code_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folder = ROOT / "microscale"
    code = {p.relative_to(ROOT).as_posix() for p in (*folder.rglob("*.py"), *folder.rglob("tunings/*.json"))}
    code |= {"microscale/py.typed"}
    assert {n for n in names if not n.startswith((INFO, "microscale/_data/"))} == code
    assert wheel.stat().st_size < 2_000_000


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        meta = email.message_from_bytes(archive.read(f"{INFO}/METADATA"))
        assert "microscale = microscale.cli:main" in archive.read(f"{INFO}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{INFO}/licenses/LICENSE").decode()
    assert meta["Requires-Python"] == ">=3.11"
    assert meta["License-Expression"] == "Apache-2.0"
    required = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    assert set(meta.get_all("Provides-Extra")) == {"triton", "report", "demo", "test", "dev"}


def test_installed_wheel_finds_its_data(installed):
    code = (
        "import microscale.spec.registry as r\n"
        "print(r.__file__); print(*r.list_formats()); print(*r.list_recipes())\n"
        "[r.find_format(n) for n in r.list_formats()]; [r.find_recipe(n) for n in r.list_recipes()]"
    )
    file, formats, recipes = run_installed(installed, code).splitlines()
    assert Path(file).is_relative_to(installed)
    assert {p.stem for p in YAML} - {"elements", "scale_rules"} <= set(formats.split()) | set(recipes.split())


def test_installed_wheel_runs_the_command(installed):
    out = run_installed(installed, "from microscale.cli import main; main()", "formats", "--json")
    assert '"nvfp4"' in out


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert not {".venv", ".git", "demo-output"} & {p.name for p in source.iterdir()}
    again = build("wheel", source, tmp_path / "again")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert {(i.filename, i.CRC) for i in ours.infolist()} == {(i.filename, i.CRC) for i in theirs.infolist()}


def test_editable_install_leaves_no_copy_of_the_data(tmp_path):
    """A stale copy in site-packages would be a second truth; see `sources` in pyproject.toml."""
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (made,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".yaml", ".py"))]


def test_every_direct_dependency_is_pinned():
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    normal = {p.replace("_", "-") for p in pins}
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    names = {r.split(";")[0].split(">")[0].split("[")[0].strip().lower().replace("_", "-") for r in asked}
    assert names - {"microscale"} <= normal
