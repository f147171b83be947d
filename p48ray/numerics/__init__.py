"""The numerics of p48ray: formats, curvature, solvers. Pure functions of torch tensors: no files,
no logging, no environment.

Read in this order (docs/DESIGN.md has the equations):
    e2m1, nvfp4, paired48, int4, block_int8     formats
    activation, products                        what a server does to activations; TF32
    curvature, output_gradients, token_rows     second moments of inputs and of the loss's gradients
    factor                                      the inverse that the column loops read
    solution, solvers, solver_inputs            what solvers take and give; the solvers by name
    sparsegpt, block_descent, two_sided, code_descent, asymmetric   how they solve
    refine, refine_tokens                       an expert's three linears together
    relative_errors                             what was lost
    shared_scale                                one global scale for two linears
    headroom                                    room above an activation's amax, and who pays
    zeros                                       where there is nothing to lose

A fast path has a slow float64 reference in tests/reference. To add a solver: docs/EXTENDING.md.
Capitals at the end of a tensor's name are its axes; the `Legend:` of its module names them.
"""
