"""Which tests notice that the code is wrong: mutants of p48ray/, drawn by a seed, each run against
the tests that reach its line.

    python -m venv ../mutants && ../mutants/bin/pip install cosmic-ray==8.7.0
        # an environment of its own: it pins what it likes
    ../mutants/bin/python bench/mutants.py draw --seed 17 --count 30 > mutants.json
    .venv/bin/pip install coverage==7.11.0
    .venv/bin/python bench/mutants.py run mutants.json

`draw` lists every mutant that Cosmic Ray knows of p48ray/ but for p48ray/kernels (nothing here runs
what Triton compiles), sorts the list and takes a sample. `run` copies the tree, measures once which
test function executes which line (in pytest's own process; what a worker or a driver executes is
not seen), and for each mutant runs those tests until one fails. A line that runs at import, or in
no test's process, is given the tests of the folder with its package's name. A mutant that all of
them let pass is run against the whole of `make test` with `--whole`, else reported as surviving
them.
"""

import argparse
import difflib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "p48ray"
NOT_RUN_HERE = f"{PACKAGE}/kernels/"
FAST = "not (ray or server or browser or slow)"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", flags=re.M)
MOST_TESTS = 60  # of a mutant: a line that every test runs is not run by all of them
LIMIT_S = 900


@dataclass(frozen=True, slots=True)
class Mutant:
    """Lines of a module and what stands in their place."""

    module: str
    line: int
    operator: str
    old: list[str]
    new: list[str]

    def apply(self, tree: Path) -> None:
        """Change the module of a tree. Raises: ValueError if it does not read as when the mutant
        was drawn."""
        path = tree / self.module
        lines = path.read_text(encoding="utf-8").split("\n")
        first = find(lines, self.old, self.line - 1)
        lines[first : first + len(self.old)] = self.new
        path.write_text("\n".join(lines), encoding="utf-8")

    def lines(self, tree: Path) -> range:
        """Where its lines are in a tree, from 1."""
        first = find(
            (tree / self.module).read_text(encoding="utf-8").split("\n"), self.old, self.line - 1
        )
        return range(first + 1, first + 1 + len(self.old))


def find(lines: list[str], wanted: list[str], near: int) -> int:
    """The place of some lines, the nearest to where they were."""
    places = [i for i in range(len(lines)) if lines[i : i + len(wanted)] == wanted]
    if not places:
        raise ValueError(f"line {near + 1}: not found: {wanted}")
    return min(places, key=lambda i: abs(i - near))


# Drawing


def draw(seed: int, count: int) -> list[Mutant]:
    """A sample of Cosmic Ray's list, in the list's order."""
    from cosmic_ray.mutating import mutate_code  # of the environment that draws
    from cosmic_ray.plugins import get_operator

    mutants = []
    for module, operator, occurrence in sorted(random.Random(seed).sample(all_mutants(), count)):
        source = (REPO / module).read_text(encoding="utf-8")
        changed = mutate_code(source, get_operator(operator)(), occurrence)
        mutants.append(
            difference(
                module, operator.removeprefix("core/"), source.split("\n"), changed.split("\n")
            )
        )
    return mutants


def all_mutants() -> list[tuple[str, str, int]]:
    """Module, operator, occurrence: sorted, so that a seed says which. None of the operators takes
    an argument here."""
    with tempfile.TemporaryDirectory() as folder:
        config, session = Path(folder) / "config.toml", Path(folder) / "session.sqlite"
        config.write_text(
            f'[cosmic-ray]\nmodule-path = "{PACKAGE}"\ntimeout = 1.0\nexcluded-modules ='
            ' []\ntest-command = "false"\n[cosmic-ray.distributor]\nname = "local"\n'
        )
        subprocess.run(
            [Path(sys.executable).parent / "cosmic-ray", "init", config, session],
            cwd=REPO,
            check=True,
        )
        rows = (
            sqlite3.connect(session)
            .execute("select module_path, operator_name, occurrence from mutation_specs")
            .fetchall()
        )
    return sorted(row for row in rows if not row[0].startswith(NOT_RUN_HERE))


def difference(module: str, operator: str, old: list[str], new: list[str]) -> Mutant:
    """The first changed run of lines; a mutant has one."""
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if tag != "equal":
            return Mutant(module, i1 + 1, operator, old[i1:i2], new[j1:j2])
    raise ValueError(f"{module}: {operator} changes nothing")


# Running


def copy_tree(tree: Path, to: Path) -> Path:
    """What git would commit of it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)
    return to


def pytest(tree: Path, *args: str, under: tuple[str, ...] = ()) -> tuple[int, str]:
    """Its exit code and output, in a tree."""
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, *under, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *args]
    done = subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    return done.returncode, done.stdout + done.stderr


def covering(tree: Path, marks: str) -> dict[tuple[str, int], list[str]]:
    """(Module, line) -> test functions (file::name) that execute it, measured."""
    from coverage import CoverageData  # only `run` needs it

    (tree / ".coveragerc").write_text(
        f"[run]\nsource = {PACKAGE}\ndynamic_context = test_function\n"
    )
    code, out = pytest(tree, "-m", marks, under=("-m", "coverage", "run"))
    if code:
        raise SystemExit(f"the tests fail without any mutant:\n{out[-3000:]}")
    data = CoverageData(str(tree / ".coverage"))
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    data.read()
    for file in data.measured_files():
        module = str(Path(file).relative_to(tree.resolve()))
        for line, contexts in data.contexts_by_lineno(file).items():
            found[module, line] += [test for context in contexts if (test := node(tree, context))]
    return found


def node(tree: Path, context: str) -> str | None:
    """`tests.numerics.test_x.test_name` as pytest says it; None for what is no test."""
    module, _, name = context.rpartition(".")
    path = f"{module.replace('.', '/')}.py"
    return f"{path}::{name}" if name.startswith("test_") and (tree / path).is_file() else None


def tests_of(mutant: Mutant, tree: Path, covered: dict[tuple[str, int], list[str]]) -> list[str]:
    """What to run against a mutant."""
    found = sorted(
        {test for line in mutant.lines(tree) for test in covered.get((mutant.module, line), ())}
    )
    own = [
        test
        for test in found
        if Path(test.split("::")[0]).stem == f"test_{Path(mutant.module).stem}"
    ]
    ordered = [*own, *(test for test in found if test not in own)]
    if ordered:
        return ordered[:MOST_TESTS]
    package, stem = Path(mutant.module).parent.name, Path(mutant.module).stem
    places = [tree / "tests" / f"test_{stem}.py", tree / "tests" / package]
    return [str(place.relative_to(tree)) for place in places if place.exists()] or ["tests"]


def killer(
    mutant: Mutant, base: Path, covered: dict[tuple[str, int], list[str]], marks: str, whole: bool
) -> str:
    """The test that fails first, or "" if none does."""
    tests = tests_of(mutant, base, covered)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(base, tree)
        mutant.apply(tree)
        rounds = [["-x", "-m", marks, *tests]] + [
            ["-x", "-n", "2", "--no-loadscope-reorder"]
        ] * whole
        for args in rounds:
            try:
                code, out = pytest(tree, *args)
            except subprocess.TimeoutExpired:
                return f"time: no end within {LIMIT_S} s"
            if code not in (0, 5):  # 5: none was selected
                failed = FAILED.search(out)
                return failed.group(1) if failed else f"import: {out.strip().splitlines()[-1]}"
    return ""


def run(mutants: list[Mutant], tree: Path, marks: str, whole: bool) -> int:
    """A Markdown row for each. Returns how many were killed."""
    killed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = copy_tree(tree, Path(folder))
        start = time.monotonic()
        covered = covering(base, marks)
        print(f"coverage: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        print("| module | operator | line | killed by |\n|---|---|---|---|")
        for mutant in mutants:
            by = killer(mutant, base, covered, marks, whole)
            killed += bool(by)
            line = " ".join(line.strip() for line in mutant.new).replace("|", "\\|")
            print(
                f"| {mutant.module}:{mutant.line} | {mutant.operator} | `{line[:120]}` |"
                f" {by or '**survives**'} |",
                flush=True,
            )
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="print a sample as JSON")
    drawing.add_argument("--seed", type=int, required=True)
    drawing.add_argument("--count", type=int, required=True)
    running = commands.add_parser("run", help="print which test kills each")
    running.add_argument("list", type=Path)
    running.add_argument("--tree", type=Path, default=REPO, help="another checkout to measure")
    running.add_argument("--marks", default=FAST, help="pytest's -m of the tests that are measured")
    running.add_argument(
        "--whole", action="store_true", help="run the whole of the tests against those that survive"
    )
    args = parser.parse_args()
    if args.command == "draw":
        json.dump([asdict(mutant) for mutant in draw(args.seed, args.count)], sys.stdout, indent=1)
    else:
        mutants = [Mutant(**row) for row in json.loads(args.list.read_text())]
        killed = run(mutants, args.tree.resolve(), args.marks, args.whole)
        print(f"\n{killed} of {len(mutants)} killed")


if __name__ == "__main__":
    main()
