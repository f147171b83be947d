"""The house's rules: imports run one way, ray stays at the edge, names say something, modules stay
readable."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from p48ray.store import SCHEMES

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "p48ray"

# A module may import its own row and rows above it. Folders that share a row import nothing of each
# other, but for numerics, whose fast paths are kernels.
ROWS = [
    ["p48ray.errors", "p48ray.trace", "p48ray.collection"],
    ["p48ray.integrations"],
    ["p48ray.numerics", "p48ray.kernels"],
    ["p48ray.store"],
    ["p48ray.config"],
    ["p48ray.checkpoint"],
    ["p48ray.texts", "p48ray.model"],
    ["p48ray.run"],
    ["p48ray.estimate"],
    ["p48ray.unit"],
    ["p48ray.stages"],
    ["p48ray.report"],
    ["p48ray.runner"],
    ["p48ray.finished", "p48ray.benchmarks"],
    ["p48ray.checkpoint_commands"],
    ["p48ray.cli", "p48ray.config_page"],
]
TOGETHER = ["p48ray.numerics", "p48ray.kernels"]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def imports(path: Path) -> set[str]:
    """Every module that a file imports, lazily or not, as `package.module` names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import")
    return found


def row(name: str) -> int | None:
    return next(
        (
            i
            for i, names in enumerate(ROWS)
            if any(name == n or name.startswith(f"{n}.") for n in names)
        ),
        None,
    )


def folder(name: str) -> str:
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_run_downward(name: str, path: Path) -> None:
    if name == "p48ray":
        return
    own = row(name)
    assert own is not None, f"{name} has no row in the house; give it one"
    for imported in imports(path):
        theirs = row(imported)
        assert theirs is None or theirs <= own, f"{name} imports {imported}, which stands above it"
        beside = theirs == own and folder(imported) != folder(name) and folder(name) not in TOGETHER
        assert not beside, f"{name} imports {imported}, which stands beside it"


RAY_USERS = ("cluster", "metrics", "ray_runner", "ray_tasks", "worker_process")


def test_ray_is_imported_by_runners_and_jobs_only() -> None:
    users = {
        name
        for name, path in modules()
        if any(i == "ray" or i.startswith("ray.") for i in imports(path))
    }
    runners = {f"p48ray.runner.{name}" for name in RAY_USERS}
    assert users == runners | {"p48ray.benchmarks.ray_server"}


# What compiles kernels in a process of its own, with children.
ITS_OWN_PROCESS = {
    "p48ray.kernels.precompile": (
        "argparse",
        "fcntl",
        "logging",
        "os",
        "pathlib",
        "signal",
        "sys",
        "threading",
        "time",
    ),
}


def test_numerics_need_only_torch() -> None:
    allowed = (
        "torch",
        "jaxtyping",
        "p48ray.numerics",
        "p48ray.kernels",
        "p48ray.errors",
        "p48ray.collection",
        "math",
        "dataclasses",
        "collections",
        "contextlib",
        "functools",
        "typing",
        "itertools",
    )
    for name, path in modules():
        if name.startswith("p48ray.numerics"):
            strangers = {i for i in imports(path) if not i.startswith(allowed)}
            assert strangers <= {"p48ray"}, f"{name} imports {strangers}"
        if name.startswith("p48ray.kernels"):
            strangers = {
                i
                for i in imports(path)
                if not i.startswith((*allowed, "triton", *ITS_OWN_PROCESS.get(name, ())))
            }
            assert strangers <= {"p48ray"}, f"{name} imports {strangers}"


def test_triton_is_imported_by_kernels_only_and_kernels_inside_functions_only() -> None:
    """A CPU has no triton: what needs it is imported where a tensor on a GPU comes."""
    for name, path in modules():
        if name.startswith("p48ray.kernels"):
            continue
        assert not any(i == "triton" or i.startswith("triton.") for i in imports(path)), name
        top = [
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.ImportFrom | ast.Import)
        ]
        assert not any("p48ray.kernels" in ast.unparse(n) for n in top), name


def test_no_module_is_a_grab_bag() -> None:
    names = {path.stem for _, path in modules()}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_modules_stay_under_400_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *(REPO / "jobs").glob("*.py")]
    assert {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 400} == {}


def test_jobs_stay_under_100_lines() -> None:
    assert {
        str(p): n
        for p in (REPO / "jobs").glob("*.py")
        if (n := len(p.read_text().splitlines())) > 100
    } == {}


def test_nothing_unpickles() -> None:
    """Sources and run roots are data: no pickle, no torch.load, no eval in the package."""
    for name, path in modules():
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & imports(path), name
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not {"torch.load", "eval", "exec"} & calls, name


NAMED_ELSEWHERE = {
    "readable",
    "seekable",
    "get_current_device",
    "get_current_stream",
    "get_current_target",
    "load_model",
    "emit",
    "readinto",
}
"""What others call by its name: pyarrow and io a file, Triton a driver, users of a checkpoint a
loader, logging a handler."""


def names_in(tree: ast.AST) -> Iterator[str]:
    """Names that code reads, by name, by attribute or as a text of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # getattr


def test_nothing_is_there_for_tests_alone() -> None:
    """Every function and class is used in the package, a job or a bench; words of comments do not
    count. What is decorated its decorator may call."""
    folders = (PACKAGE, REPO / "jobs", REPO / "bench")
    sources = {path: path.read_text() for folder in folders for path in folder.rglob("*.py")}
    counts = Counter(name for text in sources.values() for name in names_in(ast.parse(text)))
    unused = [
        f"{path.relative_to(REPO)}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(sources[path]))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.decorator_list
        and not node.name.startswith("__")
        if not counts[node.name] and node.name not in NAMED_ELSEWHERE
    ]
    assert unused == []


OUTSIDE_STORES = [
    *(path for name, path in modules() if not name.startswith("p48ray.store")),
    *sorted((REPO / "jobs").glob("*.py")),
]
STORE_CLASSES = {
    node.name
    for path in (PACKAGE / "store").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef) and node.name.endswith("Store")
}
PLACE = re.compile(rf"({'|'.join(name for name in SCHEMES if name)})?://")


def texts_for_people(tree: ast.AST) -> set[ast.AST]:
    """Docstrings, and what a key of the configuration or an option says of itself."""
    shown = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    described = [k.value for k in keywords if k.arg in ("description", "help")]
    return shown | {node for value in described for node in ast.walk(value)}


def store_questions(tree: ast.AST) -> list[str]:
    """What code asks or makes of a place's text, and of a store's class."""
    found = []
    for node in set(ast.walk(tree)) - texts_for_people(tree):
        if isinstance(node, ast.Constant) and PLACE.match(str(node.value)):
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            named = {ast.unparse(n).rpartition(".")[2] for n in ast.walk(node.args[1])}
            found += [f"line {node.lineno}: {ast.unparse(node)}"] if named & STORE_CLASSES else []
    return found


@pytest.mark.parametrize("path", OUTSIDE_STORES, ids=lambda path: str(path.relative_to(REPO)))
def test_what_a_store_is_is_asked_of_its_scheme(path: Path) -> None:
    """Not of a place's "://", nor of a class: p48ray/store/open.py (docs/EXTENDING.md)."""
    assert store_questions(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("code", "is_question"),
    [
        ('x = "://" in place', True),
        ('x = place.startswith("s3://")', True),
        ('place = f"hf://{repo}"', True),
        ("place = f'{scheme}://{rest}'", True),
        ("x = isinstance(store, LocalStore)", True),
        ("x = isinstance(store, base.Store | int)", True),
        ('url = f"http://{host}"', False),
        ("x = isinstance(error, TransientStoreError)", False),
        ('raise ConfigError("expected a folder or s3://bucket")', False),
        ('x: str = Field(description="hf:// uri with the commit.")', False),
        ('"""s3://bucket/prefix is a place."""', False),
    ],
)
def test_questions_about_stores_are_seen(code: str, is_question: bool) -> None:
    assert bool(store_questions(ast.parse(code))) is is_question
