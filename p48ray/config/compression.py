"""The numerics of a run, as it asks for them. What a solver can do is its record's to say
(numerics.solvers.SOLVERS)."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from p48ray.config.section import Section
from p48ray.numerics.solvers import SOLVERS

Automatic = Literal["auto"]
DEFAULT_SOLVER = next(iter(SOLVERS))


def known_solver(name: str) -> str:
    if name not in SOLVERS:
        # what was found is said of any key
        raise ValueError(f"expected {' or '.join(map(repr, SOLVERS))}")
    return name


SolverName = Annotated[str, AfterValidator(known_solver)]


class CompressionConfig(Section):
    """The numerics. Everything here but max_fallback_share changes output bytes."""

    solver: SolverName = Field(
        DEFAULT_SOLVER,
        description=(
            f"How masks and codes are found: {', '.join(SOLVERS)}. "
            "sparsegpt_gptq is the published one-shot method; gptq chooses no masks."
        ),
    )
    sparsity: Literal["paired-4:8", "none"] = Field(
        "paired-4:8", description="Keep 2 of every 4 neighbouring pairs of inputs, or all of them."
    )
    scale_span: Literal[16, 32] = Field(
        32, description="[inputs] How many share one weight scale. The sparse kernels need 32."
    )
    activation_group: Literal[16, 32] = Field(
        16,
        description=(
            "[inputs] How many share one activation scale in the server: 32 on sparse kernels,"
            " else 16."
        ),
    )
    activation_headroom: Automatic | Annotated[float, Field(ge=1, le=64)] = Field(
        "auto",
        description=(
            "[factor] How far above the calibration's maximum an activation may lie before it"
            " saturates. auto: for each layer and linear the largest power of two up to 16 that"
            " costs small values nothing (DESIGN 2.2)."
        ),
    )
    output_curvature: bool = Field(
        True,
        description=(
            "Use the gradients of the model's own loss too (DESIGN 7.3). Costs a backward pass."
            " Other solvers: false."
        ),
    )
    damp: Automatic | Annotated[float, Field(gt=0, le=1000)] = Field(
        "auto",
        description=(
            "[fraction of H's mean diagonal] Damping of H; auto: 0.01 to 0.1, by the expert's"
            " tokens (DESIGN 7.6); one-shot solvers: 0.1."
        ),
    )
    output_damp: Automatic | Annotated[float, Field(gt=0, le=1000)] = Field(
        "auto",
        description=(
            "[fraction of G's mean diagonal] Damping of G; auto: 0.05 to 0.3, by the expert's"
            " tokens (DESIGN 7.6)."
        ),
    )
    router_weight_exponent: float = Field(
        2.0,
        ge=0,
        le=100,
        description=(
            "[exponent] Without output_curvature a token counts by its router weight to this power."
        ),
    )
    sweeps: int = Field(
        12,
        ge=0,
        le=10**5,
        description=(
            "[sweeps] Passes of block descent over a matrix. The solver's time grows with it."
        ),
    )
    code_sweeps: int = Field(
        0,
        ge=0,
        le=10**5,
        description=(
            "[sweeps] Passes of code descent over a matrix, after quantization. On a GPU it is"
            " slow: torch code."
        ),
    )
    refine_steps: int = Field(
        300,
        ge=0,
        le=10**7,
        description=(
            "[steps] Gradient steps on the values of each expert, masks fixed (DESIGN 7.5). Other"
            " solvers: 0."
        ),
    )
    activation_quantization: bool = Field(
        True,
        description=(
            "Take the curvature of NVFP4-quantized activations (W4A4), not of the original ones."
            " false: refine_steps is 0."
        ),
    )
    max_fallback_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description=(
            "[share of linears] The job fails if more than this share of the linears that are not"
            " zero fell back to rounding. A check only."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def defaults_follow_the_solver(cls, values: object) -> object:
        """Where the solver does not work on the model's own loss gradients and refinement are off
        by default; refinement needs quantized activations too."""
        if not isinstance(values, dict):
            return values
        off: dict[str, object] = {}
        solver = SOLVERS.get(str(values.get("solver", DEFAULT_SOLVER)))
        if solver is not None and not solver.uses_model_loss:
            off = {"output_curvature": False, "refine_steps": 0}
        elif values.get("activation_quantization") is False:
            off = {"refine_steps": 0}
        return off | values

    @model_validator(mode="after")
    def solver_fits_sparsity(self) -> "CompressionConfig":
        solver = SOLVERS[self.solver]
        able = " or ".join(repr(s.name) for s in SOLVERS.values() if s.uses_model_loss)
        if self.refine_steps and not self.activation_quantization:
            raise ValueError("refine_steps needs activation_quantization: true")
        for key, is_on in (
            ("refine_steps", self.refine_steps),
            ("output_curvature", self.output_curvature),
        ):
            if is_on and not solver.uses_model_loss:
                raise ValueError(f"{key} needs solver {able}, found {self.solver!r}")
        if self.sparsity not in solver.sparsities:
            raise ValueError(
                f"solver {self.solver!r} needs sparsity {' or '.join(solver.sparsities)!r}, found"
                f" {self.sparsity!r}"
            )
        return self
