"""The Triton kernels, importable as `sparsekd.kernels` (never as `kernels`: the file would load twice).

One file per op, named as everywhere else. Only `sparsekd.sparse.ops` calls them. Imports between the files here are
relative, and Triton is imported where a kernel is first needed, so that a machine without it can import sparsekd.
"""
