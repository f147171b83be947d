"""What other programs need to read this project's checkpoints correctly.

Belongs here: a patch of somebody else's library, until the library has it; it imports nothing of
this project but errors, so that it can be copied.

    transformers   loads NVFP4 mixtures of experts with their global scales

To add one: a module that does nothing once the library does it right, and a test of both.
"""
