"""The model that runs: one decoder layer at a time, its experts one at a time.

Belongs here: what runs layers with transformers' own modules, filled by byte range from the source.
No stage, no run root.

Read in this order:
    architecture    transformers' modules for a family, built empty
    decoder         a layer filled, run and dropped
    source_check    the source's headers against config and modules, before a run
    experts         the forward of a mixture whose weights are decoded when they are used
    expert_loader   the experts of a layer; on a GPU the next ones are on their way
    pinned_pages    host memory that a GPU copies from by itself

To add an architecture: a family (docs/families.md); nothing here knows one by its name.
"""
