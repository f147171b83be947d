"""Tests of p48ray.numerics; a package, so that its file names may recur elsewhere in the tests."""
