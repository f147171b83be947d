"""Records of greedy agreement: the source's continuations of some prompts, which depend on no
compressed model, and how far the compressed model follows them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from p48ray.run import run_root
from p48ray.run.checked import load_checked
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record
from p48ray.store.base import Store


class ContinuedPrompt(Record):
    """One prompt's continuation: as many tokens as are wanted, of which the first are settled and
    the others the next pass's draft."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...] = Field(
        description=(
            "Of each settled token: how far its logit lies above the next one's. Log-probabilities"
            " are as far apart."
        )
    )

    @property
    def settled(self) -> int:
        return len(self.margins)


class Continuations(Record):
    """What the source writes after the prompts of a part, as far as it is known."""

    schema_version: Literal[1] = 1
    digest: str = Field(description="Of source, prompts and arithmetic.")
    passes: int = Field(description="Over all layers of the source, so far.")
    prompts: tuple[ContinuedPrompt, ...]


class FollowedPrompt(Record):
    """How far the compressed model follows the source after one prompt."""

    followed: int = Field(ge=0, description="Tokens before the first different one.")
    margin: float | None = Field(
        description="The source's, at the first different token; None where there is none."
    )
    mean_margin: float = Field(description="The source's, over all tokens.")


class GreedyPart(Record):
    """Greedy agreement on some prompts."""

    schema_version: Literal[1] = 1
    plan_digest: str
    agreement: str = Field(description="Digest of what the figures depend on.")
    part: int
    tokens: int = Field(description="After each prompt: no more are followed.")
    passes: int = Field(description="Over all layers of the source, to have the continuations.")
    prompts: tuple[FollowedPrompt, ...]

    @model_validator(mode="after")
    def margins_are_of_differences(self) -> Self:
        for p in self.prompts:
            if p.followed > self.tokens or (p.margin is None) != (p.followed == self.tokens):
                raise ValueError(
                    f"expected a margin where fewer than {self.tokens} tokens are followed, and"
                    f" nowhere else, found {p.margin} at {p.followed}"
                )
        return self


def load_continuations(store: Store, digest: str) -> Continuations | None:
    """As far as they are; None where no pass is done.

    Raises: CorruptObjectError for a record that is not what its key says.
    """
    key = run_root.continuations(digest)
    if store.head(key) is None:
        return None
    return load_checked(Continuations, store, key, digest=digest)


def load_greedy_part(plan: RunPlan, store: Store, digest: str, part: int) -> GreedyPart:
    """Greedy agreement on some prompts.

    Args:
        plan, store: of the run.
        digest: of what the figures depend on.
        part: its number.
    """
    key = run_root.greedy_part(digest, part)
    return load_checked(
        GreedyPart, store, key, agreement=digest, part=part, plan_digest=plan.digest
    )
