"""One list of dependencies, a core that imports without the notebook stack, clean code."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import mas
import mas_core

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mas_core", "mas")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
]
LIGHT = [name for name in MODULES if name != "mas.run.cluster"]  # which needs Dask
ABSENT = [
    "IPython", "carbontracker", "dask", "distributed", "ipywidgets", "jupyterlab", "matplotlib",
    "nbformat", "papermill", "seaborn",
]  # fmt: skip


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code, cwd=ROOT):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def name_of(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def test_ruff_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_core_imports_without_notebooks_plots_and_carbontracker():
    run(f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib, mas, mas_core
for name in {LIGHT}:
    importlib.import_module(name)
for name in mas.__all__:
    getattr(mas, name)
assert not set({ABSENT}) & set(sys.modules)
from mas.run.meters import Meter
with Meter("cpu") as meter:
    pass
assert meter.joules is None and meter.how.startswith("not measured"), meter.how
""")


def test_help_and_import_do_not_wait_for_pytorch():
    run("""
import sys, contextlib, io
import mas, mas_core
from mas.__main__ import main
for arguments in (["--help"], ["run", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(arguments)
    assert "usage: mas" in out.getvalue()
assert not {"torch", "numpy", "pandas"} & set(sys.modules)
""")


def test_names_that_readme_and_notebooks_use(tmp_path):
    for name in ("best_split", "self_affinity", "lookahead_affinity", "MultiTaskNet", "open_store",
                 "methods", "settings", "merge", "TASKS"):  # fmt: skip
        assert name in dir(mas_core) and getattr(mas_core, name) is not None
        assert getattr(mas, name) is getattr(mas_core, name)
    assert mas_core.methods.merge_and_split and mas_core.open_store("smoke", tmp_path)
    assert mas.results and mas.records and mas.experiments.figure_5
    for package in (mas, mas_core):
        with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
            package.train_everything  # noqa: B018


# What stands first is imported by what stands later, never the other way. Folders count whole.
ORDER = [
    "config", "tasks", "models", "affinity", "masks", "split", "fedavg", "local", "grouped",
    "federated", "methods", "data", "records",  # mas_core; what follows is mas
    "mas.rivals", "mas.run", "mas.frames", "mas.paper", "mas.__main__",
]  # fmt: skip


def imports_of(name):
    """The modules of the package that a module imports, inside functions too, as full names."""
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            source = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            found |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    known = set(MODULES)
    return {f for f in found if f in known and f not in PACKAGES and f != package} - {name}


def room_of(name):
    package, room = name.split(".")[:2]
    return room if package == "mas_core" else f"mas.{room}"


def test_imports_run_one_way():
    """tasks -> models -> affinity -> local -> federated -> methods; then data, records; then mas"""
    inside = [name for name in MODULES if name not in PACKAGES]
    rooms = {room_of(name) for name in inside}
    assert rooms == set(ORDER), f"not in the order, or gone: {rooms ^ set(ORDER)}"
    for name in inside:
        later = {i for i in imports_of(name)
                 if ORDER.index(room_of(i)) > ORDER.index(room_of(name))}  # fmt: skip
        assert not later, f"{name} imports {sorted(later)}"


def test_no_circle_anywhere():
    left = {name: imports_of(name) for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import one another in a circle: {sorted(left)}"


def test_environment_installs_the_package(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "mas"
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert sorted(d.partition("=")[0] for d in conda) == ["pip", "python"]  # no second list
    (package,) = pip
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", package)[1].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"]) and "test" in extras
    (python,) = [d.partition("=")[2].strip("=") for d in conda if d.startswith("python")]
    lowest = project["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, lowest.split(".")))


def imported_by(folder):
    """Top-level names of what the package's files import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def test_what_is_imported_is_declared(project):
    modules = {"pillow": "PIL", "dask-jobqueue": "dask_jobqueue", "dask": "dask distributed"}
    listed = [*project["project"]["dependencies"]]
    listed += project["project"]["optional-dependencies"]["dask"]
    declared = {m for d in listed for m in modules.get(name_of(d), name_of(d)).split()}
    of_jupyterlab = {"nbformat", "nbconvert", "pygments"}
    for package in PACKAGES:
        assert imported_by(ROOT / package) <= declared | of_jupyterlab


def test_dependencies_and_extras(project):
    names = {name_of(d) for d in project["project"]["dependencies"]}
    assert {
        "torch", "torchvision", "numpy", "pandas", "matplotlib", "seaborn", "jupyterlab",
        "papermill", "ipywidgets", "carbontracker", "safetensors", "tqdm", "scipy", "pillow",
    } <= names  # fmt: skip
    torch = next(d for d in project["project"]["dependencies"] if name_of(d) == "torch")
    assert torch == "torch>=2.9"
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"test", "dask", "digits", "flower", "peers"}
    assert {"pytest", "nbval", "ruff"} <= {name_of(d) for d in extras["test"]}


def test_console_script_and_licence(project):
    assert project["project"]["scripts"] == {"mas": "mas.__main__:main"}
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "mas"]
    assert script.value == "mas.__main__:main"
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert project["project"]["license"] == "MIT"


def test_readme_begins_with_two_commands(project):
    readme = (ROOT / "README.md").read_text()
    first_screen = "\n".join(readme.splitlines()[:30])
    commands = re.findall(r"```bash\n(.+?)\n```", first_screen, re.S)
    assert len(commands) == 2 and all("\n" not in c for c in commands)
    demo, tests = commands
    assert demo.endswith("mas demo") and tests.endswith("pytest -n 2 --dist loadfile")
    extras = re.search(r"\.\[([\w,]+)\]", tests)[1].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    run = (ROOT / ".ci" / "run").read_text()
    assert f".[{','.join(extras)}]" in run and run.rstrip().endswith('pytest" -n 2 --dist loadfile')


def test_the_core_is_thin():
    """The method on some 1,500 lines, all of the core but the rooms on 4,500."""
    lines = {path.relative_to(ROOT / "mas_core"): len(path.read_text().splitlines())
             for path in (ROOT / "mas_core").rglob("*.py")}  # fmt: skip
    method = ("tasks", "models", "affinity", "split", "local", "federated", "methods")
    assert sum(lines[Path(f"{name}.py")] for name in method) <= 1500
    assert sum(n for path, n in lines.items() if "rooms" not in path.parts) <= 4500
