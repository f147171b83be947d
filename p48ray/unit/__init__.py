"""One unit: the experts of a layer that are compressed together, from tokens to a shard.

Belongs here: what a worker does with one unit, and what it works with.

Read in this order:
    context         what every task gets: plan, run root, opened source, device
    compress        fetch, gather tokens, solve, write the shard, then the manifest
    routed_tokens   the tokens of a unit's experts, and a sample of the layer's
    token_columns   rows of values as columns of a part; staging: pinned memory on their way
    moments         what the experts see, folded into second moments
    ladder          the error after each step of a solve, for one expert
    linear_records  what the manifest says of each linear
    refinement      all three linears of an expert together, by gradient steps
    compute_lock, compiling   one unit computes at a time; kernels are compiled beside it

To add a solver: numerics.solvers, one record (docs/EXTENDING.md); nothing here names one.
"""
