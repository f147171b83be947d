"""What a stranger goes by: folders that say what belongs there, one meaning a name, axes that a
legend explains, a line for each of many arguments, tests where their module is."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGE, REPO, modules

TESTS = REPO / "tests"
FOLDERS = sorted({path.parent for _, path in modules()})
MODULES = [(name, path) for name, path in modules() if path.stem != "__init__"]
BY_NAME = {"ids": lambda value: value if isinstance(value, str) else ""}

FOUND_BY_FILES = {PACKAGE / "checkpoint" / "families"}
"""Nothing lists the families, so that a new one is a new file."""


def doc_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(REPO)))
def test_folder_says_what_belongs_there_and_names_every_module(folder: Path) -> None:
    doc = doc_of(folder / "__init__.py")
    assert len(doc.splitlines()) >= 5
    if folder in FOUND_BY_FILES:
        return
    stems = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    assert [stem for stem in stems if not re.search(rf"\b{stem}\b", doc)] == []


# A kernel has the name of the function that it makes fast; `module.name` is how these are called.
QUALIFIED = {"encode", "decode", "pack", "main", "log", "T", "FAMILY"}


def test_name_means_one_thing() -> None:
    """Public top-level names stand in one module each."""
    found = defaultdict(list)
    for name, path in MODULES:
        if not name.startswith("p48ray.kernels"):
            for defined in top_level_names(ast.parse(path.read_text())):
                found[defined].append(name)
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert {n: p for n, p in twice.items() if not n.startswith("_") and n not in QUALIFIED} == {}


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def axes_of(tree: ast.AST) -> set[str]:
    """Capitals at the end of tensors' names: {"N", "O", "I"} of weight_NOI."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    ends = (re.fullmatch(r"[a-z0-9_]+_([A-Z]{1,4})\d*", name) for name in names)
    return {letter for end in ends if end for letter in end[1]}


@pytest.mark.parametrize(("name", "path"), MODULES, **BY_NAME)
def test_axes_have_a_legend(name: str, path: Path) -> None:
    axes = axes_of(ast.parse(path.read_text()))
    legend = " ".join(doc_of(path).partition("Legend:")[2].split())
    assert {axis for axis in axes if not re.search(rf"\b{axis}\b", legend)} == set()


MANY = 4
OPTIONS = {"p48ray.cli", "p48ray.checkpoint_commands"}  # each explains itself in --help


def silent_arguments(tree: ast.AST) -> Iterator[str]:
    """Of public functions with many: those that no docstring names. A class speaks for its
    __init__."""
    owners = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef))
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name.startswith("_") and node.name != "__init__":
                continue
            names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            names = [n for n in names if n not in ("self", "cls")]
            doc = ast.get_docstring(node) or ""
            if node.name == "__init__" and isinstance(owner, ast.ClassDef):
                if owner.name.startswith("_"):
                    continue
                doc += ast.get_docstring(owner) or ""
            if len(names) >= MANY:
                entries = re.findall(r"^ +([\w, `*]+): ", doc.partition("Args:")[2], re.MULTILINE)
                said = {word for entry in entries for word in re.findall(r"\w+", entry)}
                yield from (f"{node.name}: {n}" for n in names if n not in said)


@pytest.mark.parametrize(("name", "path"), MODULES, **BY_NAME)
def test_many_arguments_have_a_line_each(name: str, path: Path) -> None:
    if name not in OPTIONS and not name.startswith("p48ray.kernels"):
        assert list(silent_arguments(ast.parse(path.read_text()))) == []


def test_silent_argument_is_seen() -> None:
    doc = "Does.\n\nArgs:\n    a, b: one.\n    c: two.\n"
    code = f"def f(a, b, c, d):\n    {doc!r}"
    assert list(silent_arguments(ast.parse(code))) == ["f: d"]


TESTED_IN = {
    "p48ray.benchmarks.completions": "benchmarks/test_smoke.py",
    "p48ray.finished.foreign_units": "finished/test_foreign.py",
    "p48ray.finished.forms": "finished/test_form_change.py",
    "p48ray.benchmarks.harness": "jobs/test_evaluate_job.py",
    "p48ray.benchmarks.job": "jobs/test_evaluate_job.py",
    "p48ray.benchmarks.process_group": "benchmarks/test_server_process.py",
    "p48ray.benchmarks.ray_server": "benchmarks/test_server_process.py",
    "p48ray.benchmarks.smoke_table": "benchmarks/test_smoke.py",
    "p48ray.estimate.duration": "estimate/test_plan_cost.py",
    "p48ray.estimate.fit": "estimate/test_plan_cost.py",
    "p48ray.estimate.memory": "estimate/test_plan_cost.py",
    "p48ray.estimate.stored": "runner/test_keep.py",
    "p48ray.run.passes": "run/test_needs.py",
    "p48ray.finished.branch": "finished/test_publish.py",
    "p48ray.finished.publisher": "finished/test_publish_on_ray.py",
    "p48ray.finished.rehearsal": "finished/test_publish.py",
    "p48ray.finished.survey": "stages/test_verify.py",
    "p48ray.finished.upload": "finished/test_publish.py",
    "p48ray.estimate.held_out": "estimate/test_plan_cost.py",
    "p48ray.estimate.rates": "estimate/test_plan_cost.py",
    "p48ray.run.greedy_records": "stages/test_greedy.py",
    "p48ray.stages.side_by_side": "stages/test_evaluate.py",
    "p48ray.run.checkpoint_manifest": "finished/test_foreign.py",
    "p48ray.run.checked": "runner/test_unsound_run_root.py",
    "p48ray.run.doctor": "runner/test_unsound_run_root.py",
    "p48ray.run.manifest": "stages/test_reduce.py",
    "p48ray.run.records": "run/test_plan.py",
    "p48ray.run.run_root": "run/test_cleanup.py",
    "p48ray.runner.worker_process": "runner/test_ray_runner.py",
    "p48ray.run.scales": "runner/test_unsound_run_root.py",
    "p48ray.runner.base": "runner/test_ray_runner.py",
    "p48ray.runner.console": "jobs/test_terminal.py",
    "p48ray.runner.layer_units": "runner/test_overlap.py",
    "p48ray.runner.local_runner": "runner/test_ray_runner.py",
    "p48ray.runner.ray_tasks": "finished/test_verifier.py",
    "p48ray.stages.compressed_experts": "stages/test_evaluate.py",
    "p48ray.stages.final_files": "stages/test_reduce.py",
    "p48ray.stages.index_proof": "stages/test_verify.py",
    "p48ray.stages.linear_proof": "stages/test_verify.py",
    "p48ray.stages.mirror": "jobs/test_mirror_job.py",
    "p48ray.stages.prepare": "jobs/test_bad_input.py",
    "p48ray.stages.revisions": "jobs/test_mirror_job.py",
    "p48ray.stages.shard_proof": "stages/test_verify.py",
    "p48ray.stages.derivatives": "stages/test_gradients.py",
    "p48ray.stages.streaming": "stages/test_gradients.py",
    "p48ray.stages.table": "test_one_record.py",
    "p48ray.unit.compiling": "kernels/test_precompile.py",
    "p48ray.unit.compute_lock": "unit/test_units_ahead.py",
    "p48ray.unit.context": "stages/test_blobs.py",
    "p48ray.unit.moments": "unit/test_compress.py",
    "p48ray.unit.refinement": "unit/test_compress.py",
    "p48ray.unit.routed_tokens": "unit/test_compress.py",
    "p48ray.unit.staging": "model/test_experts_cuda.py",
    "p48ray.unit.token_columns": "unit/test_compress.py",
}
"""Modules that only a larger piece shows, and where it does."""
MIRRORED = ("run", "estimate", "unit", "stages", "runner", "finished", "benchmarks")


@pytest.mark.parametrize(("name", "path"), MODULES, **BY_NAME)
def test_tests_lie_where_their_module_does(name: str, path: Path) -> None:
    if name.split(".")[1] in MIRRORED:
        folder = TESTS / path.parent.relative_to(PACKAGE)
        own = [folder / f"test_{path.stem}.py", *folder.glob(f"test_{path.stem}_*.py")]
        has_own = any(file.is_file() for file in own)
        assert has_own != (name in TESTED_IN), "a file of its name, or where it is tested"


def test_table_of_tests_is_current() -> None:
    assert TESTED_IN.keys() <= {name for name, _ in MODULES}
    files = [TESTS / file for file in TESTED_IN.values()]
    assert [f for f in files if not f.is_file() or not f.name.startswith("test_")] == []


def annotated_lines(tree: ast.AST) -> set[int]:
    """Where a text stands inside an annotation: an array's axes."""
    found = set()
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for inner in ast.walk(part) if part is not None else ():
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    found |= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return found


def test_names_in_the_numerics_are_defined() -> None:
    """Axes in annotations are texts, so ruff and mypy do not look for undefined names there."""
    ruff = Path(sys.executable).parent / "ruff"
    command = [ruff, "check", "--isolated", "--select=F821", "--output-format=concise"]
    found = subprocess.run([*command, PACKAGE / "numerics"], capture_output=True, text=True)
    places = re.findall(r"^(.+?):(\d+):\d+: F821 (.*)$", found.stdout, re.MULTILINE)
    assert places
    lines = {file: annotated_lines(ast.parse(Path(file).read_text())) for file, _, _ in places}
    assert [place for place in places if int(place[1]) not in lines[place[0]]] == []
