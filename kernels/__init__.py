"""The Triton kernels, importable as `sparsekd.kernels` (never as `kernels`: the file would load twice).

    conv2d.py          convolution, its input gradient; the device code is in conv2d_kernel.py
    weight_grad.py     gradient at the non-zero vectors
    linear.py          the same over maps of one pixel
    kd_loss.py         distillation loss
    linear_kd_loss.py  distillation loss of a linear layer, without the logits; the CPU's half too
    lanes.py           a layout without misaligned loads
    plans.py           what the kernels need of a pattern, made once
    configs.py         tile sizes, and those that were tuned
    registration.py    the operators, and who serves them on CUDA
    checks.py          arguments
    static.py          what the compiler makes of all this

Only `sparsekd.sparse.ops` calls them. Imports between the files here are relative. Importing them needs Triton, but
neither a GPU nor its driver.
"""
