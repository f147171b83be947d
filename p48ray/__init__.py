"""Compress mixture-of-experts checkpoints to paired-4:8 sparse NVFP4 (W4A4) on a fleet of preemptible GPUs."""

__version__ = "0.1.0"
