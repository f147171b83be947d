"""Triton kernels for CUDA tensors, each beside the torch code that defines it. Imported only where such a tensor comes."""
