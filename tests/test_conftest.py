"""What the tests' own arrangement promises: marks follow from what is used, and what shares a
cluster stays in one process."""

from pathlib import Path

import pytest
import ray
from safetensors import safe_open

from tests.conftest import LONGEST_FIRST, NEEDS, REPO, TINY, group_of
from tests.jobs.command import narrow_model
from tests.reference import narrow


def test_ray_without_its_mark_is_a_failure() -> None:
    with pytest.raises(
        pytest.fail.Exception,
        match=r"test_ray_without_its_mark_is_a_failure starts Ray without pytest\.mark\.ray",
    ):
        ray.init(address="local")


def test_what_uses_a_cluster_a_server_or_a_browser_is_marked(
    request: pytest.FixtureRequest,
) -> None:
    for item in request.session.items:
        for fixture in set(getattr(item, "fixturenames", ())) & set(NEEDS):
            assert item.get_closest_marker(NEEDS[fixture]), f"{item.nodeid}: {fixture}"


@pytest.mark.parametrize(
    ("file", "group"),
    [
        ("tests/chaos/test_bad_data.py", "tests/chaos"),
        ("tests/runner/test_overlap.py", "ray_session"),
        ("tests/report/test_card.py", "finished: SmallRun"),
        ("tests/config/test_config.py", "tests/config/test_config.py"),
    ],
)
def test_group_is_what_is_shared_else_the_file(file: str, group: str) -> None:
    assert group_of(file) == group


@pytest.mark.parametrize("group", LONGEST_FIRST)
def test_groups_that_begin_are_there(group: str) -> None:
    """Else a file that was renamed would come last without a word."""
    files = {str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py")}
    assert group in {group_of(file) for file in files}


def test_narrow_model_is_the_sample_but_for_its_widths() -> None:
    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return found

    sample, ours = shapes(TINY), shapes(narrow_model())
    assert sample.keys() == ours.keys()
    smaller = {name for name in sample if sample[name] != ours[name]}
    assert {
        name for name in sample if ".mlp.experts." in name and not name.endswith("_shape")
    } <= smaller
    gate = "language_model.model.layers.1.mlp.experts.0.gate_proj.weight_packed"
    assert ours[gate] == (narrow.INTERMEDIATE, narrow.HIDDEN // 8)
    assert not [name for name in smaller if name.startswith(("vision_tower", "mm_projector"))]
