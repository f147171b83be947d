"""Two drivers at once on one run root: nobody forbids it, so it must come out right."""

from pathlib import Path

import pytest

from tests.chaos.checks import assert_same_end
from tests.chaos.harness import Hit, Scene, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos_long]


@pytest.mark.parametrize("delay", ["none", "seconds"])
def test_two_drivers_at_once(
    delay: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    first = scene.submit()
    if delay == "seconds":
        wait_until(lambda: bool(scene.listing()), pause_s=0.01)
        scene.wait_for("capture", scene.rng.uniform(0, 0.5))
    second = scene.submit()
    scene.hits.append(Hit("second driver", "capture", {}, in_flight=0, killed=0))
    codes = sorted((first.finish(), second.finish()))
    for driver in (first, second):
        assert "Traceback" not in driver.err, driver.err
    assert codes == [0, 0], [
        (driver.out[-3000:], driver.err) for driver in (first, second) if driver.process.returncode
    ]
    assert_same_end(scene, undisturbed, tmp_path, is_contested=True)
