"""What the model card says about a checkpoint that others have compressed, once it is converted to
dense storage."""

from collections.abc import Mapping

from p48ray.checkpoint.foreign import Folding
from p48ray.report.markdown import code, table_of
from p48ray.report.storage_card import BEFORE

LISTED_LINEARS = 10
TITLE = "## Conversion to dense storage"


def foreign_card(
    card: str, foldings: Mapping[str, Folding], errors: Mapping[str, float], num_experts: int
) -> str:
    """The card with a section before "Serving", or at its end.

    Args:
        card: of the checkpoint that was converted; empty where it had none.
        foldings, errors, num_experts: as folding_summary takes them.
    """
    section = f"{TITLE}\n\n{TEXT}\n\n{folding_summary(foldings, errors, num_experts)}\n\n"
    rounded = sorted(
        ((name, f) for name, f in foldings.items() if f.num_rounded),
        key=lambda pair: (-pair[1].largest_rounding, pair[0]),
    )
    if rounded:
        rows = [
            (
                code(name),
                f"{f.ratio:.6g}",
                f"{f.num_rounded:,} of {f.num_groups:,}",
                f"{f.largest_rounding:.4%}",
                f"{f.num_vanished:,}",
            )
            for name, f in rounded[:LISTED_LINEARS]
        ]
        head = ("linear", "ratio", "scales rounded", "largest rounding", "groups now zero")
        section += table_of(head, rows) + "\n\n"
    if len(rounded) > LISTED_LINEARS:
        section += (
            f"The other {len(rounded) - LISTED_LINEARS:,} are in `p48ray.json`"
            " (`foreign.foldings`), with the same figures of each.\n\n"
        )
    at = card.find(BEFORE)
    if at >= 0:
        return card[:at] + section + card[at:]
    return (card.rstrip() + "\n\n" if card.strip() else "") + section


def folding_summary(
    foldings: Mapping[str, Folding], errors: Mapping[str, float], num_experts: int
) -> str:
    """How many experts are exactly what they were, and how far the others are from it.

    Args:
        foldings: by module name, of linears whose global scale gave way.
        errors: |W - Q|^2 / |W|^2 by module name, against the checkpoint that was converted.
        num_experts: of all layers.
    """
    rounded = {name: f for name, f in foldings.items() if f.num_rounded}
    exact = f"{num_experts - len(rounded):,} of {num_experts:,} experts are exactly what they were."
    if not rounded:
        return exact
    name, worst = max(rounded.items(), key=lambda pair: pair[1].largest_rounding)
    return (
        f"{exact} Of {len(rounded):,} some block scales of gate or up are rounded, by"
        f" {worst.largest_rounding:.4%} at most ({code(name)}); |W - Q|^2 / |W|^2 of these linears"
        f" is {max(errors[n] for n in rounded):.3g} at most."
    )


TEXT = """\
These are the experts of the checkpoint that this card describes, in the form that stock servers of
NVFP4 load; what this section says takes the place of what others say of keys, sizes and serving.
Codes are the same values. Each block scale of 32 inputs is stored for both its halves of 16.
Servers quantize activations per 16 inputs here, where the sparse kernels do per 32.

Gate and up of an expert had a global scale each. Servers fuse the two and take one for both, so
both have the smaller one here, and the other linear's block scales are multiplied by the ratio and
rounded to E4M3. That is exact where every product is an E4M3 number: for a ratio that is a power of
two, unless a product falls below E4M3's normal numbers. A scale that would round to zero becomes
the smallest one, with codes of zero. `p48ray verify <this folder>` checks every byte but this
card."""
