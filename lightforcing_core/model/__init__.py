"""The causal Wan transformer: modules, KV cache, fused kernels and CUDA graphs."""
