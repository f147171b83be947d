"""Every kernel that is launched is compiled ahead, by a process that can fail, hang or be orphaned
without harm."""

import ast
import importlib.util
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from p48ray.kernels.precompile import Launches, launch_all, parsed, row_counts

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from p48ray.unit.compiling import Compiling

REPO = Path(__file__).resolve().parents[2]
KERNELS = REPO / "p48ray" / "kernels"
KIMI = Launches(
    hidden=7168,
    intermediate=2048,
    descends=True,
    two_sided=True,
    refines=True,
    int4_group=32,
    streams=True,
)


def functions() -> dict[str, ast.FunctionDef]:
    """Every function and method of the package by its bare name."""
    found: dict[str, ast.FunctionDef] = {}
    for path in KERNELS.glob("*.py"):
        found |= {
            node.name: node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
    return found


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)


def launched_by(function: ast.FunctionDef) -> set[str]:
    """Kernels with a `kernel[grid](...)` in the function."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {ast.unparse(c.value) for c in calls if isinstance(c, ast.Subscript)} & {
        n for n, f in functions().items() if is_kernel(f)
    }


def all_launched() -> set[str]:
    return {name for function in functions().values() for name in launched_by(function)}


def reached_from(start: str) -> set[str]:
    """Functions of the package that a function calls, and so on, by bare names."""
    known, reached, open_ends = functions(), set(), [start]
    while open_ends:
        name = open_ends.pop()
        if name in known and name not in reached:
            reached.add(name)
            calls = [node.func for node in ast.walk(known[name]) if isinstance(node, ast.Call)]
            open_ends += [ast.unparse(c).rpartition(".")[2] for c in calls]
    return reached


def test_every_launch_site_is_reached_by_what_compiles_ahead() -> None:
    known = functions()
    reached = {
        kernel for name in reached_from(launch_all.__name__) for kernel in launched_by(known[name])
    }
    assert reached == all_launched()
    assert {
        "_descend_panel",
        "_quantize_panel",
        "_adam_step",
        "_quantize_groups",
        "_decode",
        "_add_rows",
    } <= reached


def test_row_groups_have_the_sizes_of_chunks() -> None:
    assert (
        row_counts(4096, 16) == {256} and row_counts(40, 16) == {3, 1} and row_counts(40, 1) == {40}
    )


def test_command_line_says_what_it_was_made_from() -> None:
    for launches in (
        KIMI,
        Launches(
            hidden=256, intermediate=128, span=16, solves=False, picks_masks=False, is_sparse=False
        ),
    ):
        assert parsed(["--arch", "90", *launches.arguments()])[1] == launches
    assert parsed(["--arch", "90", *KIMI.arguments()])[1].picks_masks is True


def python(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_process_that_compiles_imports_little() -> None:
    asked = (
        "import sys, p48ray.kernels.precompile; print(*({'ray', 'transformers', 'pydantic',"
        " 'triton'} & {m for m in sys.modules}))"
    )
    assert set(python("-c", asked).split()) <= {"triton"}  # which torch may bring


RECORDED = """
import sys
from p48ray.kernels.precompile import parsed, specialisations
for kernel, _ in specialisations(parsed(sys.argv[1:])[1], 90):
    print(kernel.fn.__name__)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, not a GPU")
def test_launches_without_a_device_are_those_of_every_kernel() -> None:
    names = python("-c", RECORDED, "--arch", "90", *KIMI.arguments()).split()
    assert set(names) == all_launched()
    assert names.count("_quantize_panel") == 2, (
        "the pass that chooses masks, and the one that keeps them"
    )
    assert names[0] == "_descend_panel", "the longest to compile goes first"
    assert names.count("_descend_panel") == 1
    odd = Launches(
        hidden=96, intermediate=40, descends=True, two_sided=True, refines=True, streams=True
    )
    assert (
        python("-c", RECORDED, "--arch", "90", *odd.arguments()).split().count("_descend_panel")
        == 2
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, not a GPU")
def test_second_process_finds_everything_in_the_cache(tmp_path: Path) -> None:
    small = Launches(hidden=64, intermediate=32, solves=False, streams=True)
    command = [
        "-m",
        "p48ray.kernels.precompile",
        "--arch",
        "90",
        "--kernels-only",
        "--processes",
        "2",
        *small.arguments(),
    ]
    counts = []
    for _ in range(2):
        python(*command, TRITON_CACHE_DIR=str(tmp_path))
        counts.append(len(list(tmp_path.rglob("*.cubin"))))
    assert counts[0] == counts[1] > 0


# The worker's side
def compiling(code: str, patience_s: float = 20.0) -> "Compiling":
    from p48ray.unit.compiling import Compiling  # which needs pydantic

    return Compiling([sys.executable, "-c", code], patience_s)


def test_failure_and_slowness_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pydantic")
    with caplog.at_level(logging.WARNING):
        compiling("raise SystemExit(3)").wait()
        slow = compiling("import time; time.sleep(60)", patience_s=0.1)
        slow.wait()
        slow.wait()
    assert [("exit code 3" in r.message, "after 0 s" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
    slow.close()
    assert slow.process.returncode is not None


def test_wait_is_until_the_end() -> None:
    pytest.importorskip("pydantic")
    work = compiling("import time; time.sleep(0.5)")
    work.wait()
    assert work.process.returncode == 0
    work.close()


ORPHANED = """
import os, sys, time
from p48ray.kernels.precompile import end_with_input
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
end_with_input([child])
time.sleep(60)
"""


def test_what_compiles_and_its_children_end_with_whoever_started_them() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANED],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    process.stdin.close()
    process.wait(20)
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Not gone, and no zombie. Source: proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_command_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    from p48ray.config.load import load_config
    from p48ray.stages.prepare import prepare
    from p48ray.unit.compiling import command, start_compiling

    monkeypatch.chdir(REPO)
    prepared = prepare(
        load_config(
            REPO / "configs" / "tiny.yaml", ("compression.output_curvature=true",), str(tmp_path)
        )
    )
    found = command(prepared.plan, prepared.layout, (9, 0))
    given, launches = parsed(found[3:])
    assert (given.arch, given.ends_with_input) == (90, True)
    assert (launches.hidden, launches.intermediate) == (
        prepared.layout.hidden_size,
        prepared.layout.moe_intermediate_size,
    )
    assert launches.descends and launches.two_sided and launches.refines and launches.picks_masks
    assert start_compiling(prepared.plan, prepared.layout, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert start_compiling(prepared.plan, prepared.layout, torch.device("cuda")) is None, (
        "no process, no harm"
    )
