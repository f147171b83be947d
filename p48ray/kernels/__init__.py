"""Triton kernels beside the torch code (of numerics, of model.experts) that defines them. Imported
only where a tensor on a GPU comes: a CPU needs no triton.

They are no part of numerics because its annotations are checked under pytest by rewriting
functions, which Triton reads as source.

The kernels of the column loop and of descent give a row (an output of one expert) to one thread of
a warp: the columns of a panel are visited in order, and rows never wait for each other. The input
dimension comes before the output dimension in their buffers, so that a warp's 32 rows of a column
are one 128-byte line.

Read in this order: rounding, strips (shared pieces); activation, int4, swiglu (elementwise);
column_pass, descent, descend_panel, refine_step (solvers); precompile (all of them before they are
needed). To add one: the torch code first, then the kernel, tests/numerics/test_kernels.py, and its
shapes in precompile.
"""
