"""Compress mixture-of-experts checkpoints to paired-4:8 sparse NVFP4 (W4A4) on a fleet of
preemptible GPUs.

Folders, from the bottom up; each imports only what stands before it:
    integrations    numerics, kernels    store    config    checkpoint    texts, model    run
    estimate    unit    stages    report    runner    finished, benchmarks
Everywhere: errors, trace, collection. Entry points: jobs/, cli with checkpoint_commands, and
config_page.
docs/DESIGN.md follows one unit from plan to checkpoint.
"""

__version__ = "0.2.0"
