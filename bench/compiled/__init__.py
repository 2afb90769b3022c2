"""What the compilers made of the GPU kernels, on a machine without a GPU."""
