"""Triton kernels beside the torch code (of numerics, of model.experts) that defines them. Imported only where a tensor on a GPU comes: a CPU needs no triton.

They are no part of numerics because its annotations are checked under pytest by rewriting functions, which Triton reads as source.

Every solver kernel gives a row (an output of one expert) to one thread of a warp: the columns of a panel are visited in order, and rows never wait for each
other. The input dimension comes before the output dimension in every buffer, so that a warp's 32 rows of a column are one 128-byte line.
"""
