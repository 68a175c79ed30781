"""``kernels/`` and ``benchmarks/`` are found inside rmfast, however installed, and only there."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

import rmfast
from rmfast import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"rmfast": "rmfast", "rmfast/kernels": "kernels", "rmfast/benchmarks": "benchmarks"}

# Prints where rmfast and its kernels come from, and what `import rmfast` brought along.
PROBE = """
import json, sys
import rmfast
early = [m for m in sys.modules if m.split(".")[0] == "transformers" or "rmfast.kernels" in m]
import rmfast.kernels.reward_head
import importlib.util
benchmarks = importlib.util.find_spec("rmfast.benchmarks")
print(json.dumps({
    "early": early,
    "rmfast": rmfast.__file__,
    "kernel": rmfast.kernels.reward_head.__file__,
    "benchmarks": list(benchmarks.submodule_search_locations),
    "found_as_top_level": sorted({"kernels", "benchmarks"} & set(sys.modules)),
}))
"""

HUB_KERNELS = """
import json
import transformers.integrations.hub_kernels as hub
from transformers.utils.import_utils import is_kernels_available
import rmfast.kernels
import kernels
print(json.dumps({
    "available": is_kernels_available(),
    "kernels": getattr(kernels, "__file__", None),
    "folders": list(kernels.__path__),
    "get_kernel": getattr(hub, "get_kernel_hub", None) is not None,
}))
"""

# Stands in for Hugging Face's package: whatever transformers imports from it is there.
FAKE_KERNELS = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """Output of ``command`` run in ``cwd`` with ``path`` as PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(code: str, *, cwd: Path, path: Path | None = None, python: object = sys.executable) -> dict:
    return json.loads(run(python, "-c", code, cwd=cwd, path=path).splitlines()[-1])


def pip(*arguments: object, cwd: Path) -> None:
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", *arguments, *offline, cwd=cwd)


def check(answer: dict, folder: Path, *, checkout: bool) -> None:
    """``answer`` to PROBE tells of the rmfast in ``folder``, and of nothing else."""
    inside = folder if checkout else folder / "rmfast"
    real = {k: answer[k] for k in ("rmfast", "kernel")}
    assert {k: Path(v).resolve() for k, v in real.items()} == {
        "rmfast": folder / "rmfast" / "__init__.py",
        "kernel": inside / "kernels" / "reward_head.py",
    }
    assert [Path(p).resolve() for p in answer["benchmarks"]] == [inside / "benchmarks"]
    assert answer["early"] == answer["found_as_top_level"] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that nothing is written to the repository."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("checkout").resolve()
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, checkout, cwd=folder)
    shutil.rmtree(checkout / "build")  # an editable install must not find it
    (file,) = folder.glob("rmfast-*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked").resolve()
    wheel.extractall(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["kernels/__init__.py", "benchmarks/__init__.py", "tests/__init__.py", "conftest.py"],
)
def test_would_shadow_others(name):
    assert not (ROOT / name).exists()


def test_wheel_holds_every_module_and_nothing_beside_rmfast(wheel):
    names = set(wheel.namelist())
    expected = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert "rmfast/kernels/reward_head.py" in expected
    assert "rmfast/py.typed" in names
    assert {f"rmfast/demo/{split}.jsonl.gz" for split in ("train", "held-out")} <= names
    assert any(name.startswith("rmfast/benchmarks/") for name in expected)
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == {
        "rmfast",
        f"rmfast-{rmfast.__version__}.dist-info",
    }


def test_wheel_metadata(wheel):
    folder = f"rmfast-{rmfast.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("rmfast", rmfast.__version__)
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert b"rmfast = rmfast.commands.main:main" in wheel.read(f"{folder}/entry_points.txt")


def test_wheel_is_used_from_elsewhere(unpacked, tmp_path):
    check(ask(PROBE, cwd=tmp_path, path=unpacked), unpacked, checkout=False)


def test_wheel_is_passed_over_in_a_checkout(unpacked):
    check(ask(PROBE, cwd=ROOT, path=unpacked), ROOT, checkout=True)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(mode, checkout, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # Lends it torch and the rest, but not this environment's own editable install of rmfast.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    lent = [entry for entry in sys.path if entry.endswith("-packages")]
    (Path(site.strip()) / "lent.pth").write_text("\n".join(lent))
    config = f"--config-settings=editable_mode={mode}"
    install = ("--python", python, "install", "--no-build-isolation", config, "-e", checkout)
    pip(*install, cwd=elsewhere)

    assert (venv / "bin" / "rmfast").exists()
    answer = ask(PROBE, cwd=elsewhere, python=python)
    if mode == "lenient":
        check(answer, checkout, checkout=True)
        check(ask(PROBE, cwd=checkout, python=python), checkout, checkout=True)
    else:  # a tree of links to the files
        assert Path(answer["kernel"]).resolve() == checkout / "kernels" / "reward_head.py"
        assert Path(answer["rmfast"]).resolve() == checkout / "rmfast" / "__init__.py"


def test_transformers_from_the_root_without_hugging_face_kernels():
    if any(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels is installed")
    if Version(transformers.__version__) < Version("5.10"):
        pytest.skip("this transformers reads a version of any folder named kernels")
    answer = ask(HUB_KERNELS, cwd=ROOT)
    assert answer == {
        "available": False,
        "kernels": None,
        "folders": [str(ROOT / "kernels")],
        "get_kernel": False,
    }


def test_transformers_from_the_root_with_hugging_face_kernels(tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_KERNELS)
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (metadata.parent / "top_level.txt").write_text("kernels\n")  # Python 3.10 looks there
    # The root comes first on the child's sys.path, and the real package still wins.
    assert ask(HUB_KERNELS, cwd=ROOT, path=tmp_path) == {
        "available": True,
        "kernels": str(package / "__init__.py"),
        "folders": [str(package)],
        "get_kernel": True,
    }


def test_import_is_light():
    """Neither Triton, which reads its environment then, nor what takes seconds to import."""
    code = """
import json, sys
import rmfast
early = [name for name in ("torch", "numpy") if name in sys.modules]
for name in rmfast.__all__:
    getattr(rmfast, name)
heavy = ("triton", "torch._dynamo", "transformers", "rmfast.kernels.chips")
print(json.dumps(early + [name for name in heavy if name in sys.modules]))
"""
    assert ask(code, cwd=ROOT) == []


@pytest.mark.parametrize("command", ["", *"demo score eval train run bench doctor".split()])
def test_help_waits_for_no_torch(command):
    code = f"""
import contextlib, json, sys
from rmfast.commands.main import main
with contextlib.suppress(SystemExit):
    main("{command} --help".split())
print(json.dumps([name for name in ("torch", "numpy", "transformers") if name in sys.modules]))
"""
    assert ask(code, cwd=ROOT) == []


def transformers_of(version, path):
    """What says that this version is installed."""
    metadata = path / f"transformers-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")


def test_a_transformers_that_is_too_old_is_named(tmp_path):
    """By all that needs it, and nothing before; the commands say it in one line."""
    transformers_of("4.57.6", tmp_path)
    code = """
import contextlib, io, json, sys
import rmfast
from rmfast.commands import main
from rmfast.errors import UserError
said = []
for name in ("patch", "Scorer", "doctor", "pack"):
    with contextlib.suppress(UserError):
        said += [getattr(rmfast, name)]
with contextlib.redirect_stderr(io.StringIO()) as err:
    code = main.main(["doctor", "--model", "nowhere"])
print(json.dumps([[x.__name__ for x in said], code, err.getvalue(), "transformers" in sys.modules]))
"""
    names, exit_code, error, imported = ask(code, cwd=ROOT, path=tmp_path)
    assert names == ["pack"] and exit_code == 2 and not imported
    needed = "rmfast needs transformers 5.0 or newer, found 4.57.6: pip install 'transformers>=5.0'"
    assert error == f"rmfast doctor: {needed}\n"


@pytest.mark.parametrize("version", ["5.0.0rc1", "5.5.3", "5.5.4", "5.23.0.dev0"])
def test_a_transformers_that_the_trainer_cannot_use(version, tmp_path, monkeypatch):
    transformers_of(version, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    errors.require_transformers("5.0")
    old = version in ("5.0.0rc1", "5.5.3")
    message = f"the trainer of rmfast needs transformers 5.5.4 or newer, found {version}"
    with pytest.raises(errors.UserError, match=message) if old else contextlib.nullcontext():
        errors.require_transformers("5.5.4", "the trainer of rmfast")


def test_import_without_triton():
    code = """
import json, sys
sys.modules["triton"] = None  # any import of it fails
import rmfast
print(json.dumps({"tokens": len(rmfast.pack([[1, 2, 3], [1, 2, 4]]))}))
"""
    assert ask(code, cwd=ROOT) == {"tokens": 4}
