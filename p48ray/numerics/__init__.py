"""The numerics of p48ray: formats, curvature, solvers. Pure functions of torch tensors: no files, no logging, no environment."""
