"""The error ladder: its numbers are those of tokens run through the linears, and taking them
changes nothing."""

import json

import pytest
import torch
from torch import Tensor

from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.unit import compress, ladder
from p48ray.unit.compress import compress_unit
from p48ray.unit.ladder import Ladder, linear_error
from p48ray.unit.moments import Curvature
from tests.unit.conftest import PAIR, Opener, shard_bytes

TWO_SIDED = ("compression.output_curvature=true", "compression.sweeps=3")
REFINED = (*TWO_SIDED, "compression.refine_steps=10")
SOLVERS = {
    "round_to_nearest": ("dense", "round_to_nearest"),
    "gptq": ("dense", "gptq"),
    "sparsegpt_gptq": ("dense", "one_shot"),
    "block_descent": ("dense", "one_shot", "block_descent"),
}


def random_case(is_crossed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Curvature]:
    """Weights W and Q, what they see (h, h'), G, and the moments of h and h'; float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    seen_TI = normal(200, 16) @ normal(16, 16)
    other_TI = seen_TI + 0.1 * normal(200, 16) if is_crossed else seen_TI
    w_OI = normal(12, 16)
    root_OO = normal(12, 12)
    moments = {"hessian_II": other_TI.T @ other_TI / 200}
    if is_crossed:
        moments |= {"cross_II": seen_TI.T @ other_TI / 200, "energy_II": seen_TI.T @ seen_TI / 200}
    curvature = Curvature(
        tokens=200, shrinkage=0.0, **{name: value.float() for name, value in moments.items()}
    )
    return w_OI, w_OI + 0.2 * normal(12, 16), seen_TI, other_TI, root_OO @ root_OO.T, curvature


@pytest.mark.parametrize("rows", [512, 6, 5])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("is_crossed", [False, True])
def test_linear_error_is_that_of_every_token(
    is_crossed: bool, is_weighted: bool, rows: int
) -> None:
    """Fewer rows than there are: every second or third stands for the outer sum."""
    w_OI, q_OI, seen_TI, other_TI, metric_OO, curvature = random_case(is_crossed)
    metric_OO = metric_OO if is_weighted else torch.eye(12, dtype=torch.float64)
    step = {512: 1, 6: 2, 5: 3}[rows]

    def mean(error_TO: Tensor) -> Tensor:
        return ((error_TO @ metric_OO) * error_TO)[:, ::step].sum(1).mean()

    expected = mean(seen_TI @ w_OI.T - other_TI @ q_OI.T) / mean(seen_TI @ w_OI.T)
    found = linear_error(
        w_OI.float(), q_OI.float(), curvature, metric_OO.float() if is_weighted else None, rows
    )
    assert found == pytest.approx(max(expected.item(), 0.0), rel=2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_are_those_of_the_solver(opened: Opener, solver: str) -> None:
    sparsity = "none" if solver == "gptq" else "paired-4:8"
    settings = (
        f"compression.solver={solver}",
        f"compression.sparsity={sparsity}",
        "compression.sweeps=1",
    )
    found = compress_unit(opened(*settings), PAIR).ladder
    assert tuple(step.step for step in found) == SOLVERS[solver]
    assert all(
        set(step.output_error) == {"gate_up", "down"} and step.loss_error == {} for step in found
    )
    assert found[0].output_error["gate_up"] < 0.02  # NVFP4 alone
    if solver == "block_descent":
        assert (
            found[0].output_error["gate_up"]
            < found[2].output_error["gate_up"]
            < found[1].output_error["gate_up"]
        )


def test_solver_lowers_the_error_in_the_metric_of_the_loss(opened: Opener) -> None:
    dense, one_shot, descended, refined = compress_unit(opened(*REFINED), PAIR).ladder
    assert refined.step == "refined" and all(
        set(s.loss_error) == {"gate_up", "down"} for s in (dense, one_shot, descended, refined)
    )
    for side in ("gate_up", "down"):
        assert max(dense.loss_error[side], descended.loss_error[side]) < one_shot.loss_error[side]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TWO_SIDED, REFINED], ids=["solved", "refined"])
def test_last_step_of_down_is_the_error_that_its_record_claims(
    opened: Opener, settings: tuple[str, ...]
) -> None:
    manifest = compress_unit(opened(*settings), PAIR)
    record = next(r for r in manifest.linears if r.name.endswith("experts.4.down_proj"))
    assert manifest.ladder[-1].output_error["down"] == pytest.approx(
        record.relative_output_error, rel=1e-3
    )
    gate, up = (
        next(r for r in manifest.linears if r.name.endswith(f"experts.4.{p}_proj"))
        for p in ("gate", "up")
    )
    low, high = sorted((gate.relative_output_error, up.relative_output_error))
    assert low * 0.999 <= manifest.ladder[-1].output_error["gate_up"] <= high * 1.001


class Blind(Ladder):
    """Looks at nothing."""

    def note(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [("compression.sweeps=2",), REFINED], ids=["one-sided", "refined"]
)
def test_measuring_changes_no_byte(
    opened: Opener, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = []
    for kind in (Ladder, Blind):
        monkeypatch.setattr(compress, "Ladder", kind)
        context = opened(*settings)
        manifest = compress_unit(context, PAIR)
        assert bool(manifest.ladder) == (kind is Ladder)
        shards.append(shard_bytes(context, manifest))
    assert shards[0] == shards[1]


def test_manifest_of_before_has_no_ladder_and_loads(opened: Opener) -> None:
    context = opened()
    manifest = compress_unit(context, PAIR)
    key = run_root.unit_manifest(PAIR.id)
    fields = json.loads(context.store.get(key))
    assert [step["step"] for step in fields.pop("ladder")] == ["dense", "one_shot", "block_descent"]
    context.store.put(key, json.dumps(fields).encode())
    assert UnitManifest.load(context.store, key) == manifest.model_copy(update={"ladder": ()})


def test_expert_without_any_statistics_has_no_ladder(opened: Opener) -> None:
    found = Ladder(opened())
    nothing = [Curvature(hessian_II=torch.zeros(16, 16), tokens=0, shrinkage=0.0)]
    for side in ladder.SIDES:
        found.note("dense", side, torch.ones(1, 8, 16), torch.ones(1, 8, 16), nothing)
    assert found.steps() == ()
