"""Every stage of the small job."""

from pathlib import Path

from tests.jobs.command import arguments, invoke

# Every stage there is, the backward pass too. With sweeps and refinement Ray is held against one
# process in tests/stages/test_family_jobs.py.
ALL_STAGES = {"compression.output_curvature": "true", "compression.sweeps": "0"}


def run_to_end(root: Path, settings: dict[str, str], on_ray: bool) -> Path:
    outcome = invoke(*arguments(root, ALL_STAGES | settings), on_ray=on_ray)
    assert outcome.code == 0, outcome
    return root
