"""What report.html says about scales of activations and weights; templates/scales.html.j2."""

from p48ray.report.fold import Facts, Values
from p48ray.report.scale_figures import KINDS, WARN_SHARE, headroom_words, scale_warnings


def scales(facts: Facts) -> Values | None:
    """A row a layer, and what passes the share that is warned of; None before there is a unit with
    its layer's scales."""
    figures = facts.report.scales
    if not figures:
        return None
    rows = [
        {
            "layer": f.layer,
            "headroom": f.headroom,
            "shares": [
                None if (counts := counts_of(f)) is None else share(counts)
                for _, share, counts_of in KINDS
            ],
        }
        for f in figures
    ]
    return {
        "room": headroom_words(figures),
        "warnings": scale_warnings(figures),
        "most": WARN_SHARE,
        "head": ["layer", "room, gate and up", "room, down", *(name for name, *_ in KINDS)],
        "rows": rows,
        "has_held_out": any(f.held_out for f in figures),
    }
