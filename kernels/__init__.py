"""The Triton kernels, importable as `sparsekd.kernels` (never as `kernels`: the file would load twice).

    conv2d.py        convolution, its input gradient        linear.py         the same over maps of one pixel
    weight_grad.py   gradient at the non-zero vectors        kd_loss.py        distillation loss
    lanes.py         a layout without misaligned loads       plans.py          what they need of a pattern, made once
    configs.py       tile sizes, and those that were tuned   registration.py   the operators
    checks.py        arguments                               static.py         what the compiler makes of all this

Only `sparsekd.sparse.ops` calls them. Imports between the files here are relative. Importing them needs Triton, but
neither a GPU nor its driver.
"""
