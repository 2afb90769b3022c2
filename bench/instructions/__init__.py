"""How many instructions the CPU kernels execute."""
