"""What other programs need to read this project's checkpoints correctly."""
