"""Linear attention with a scalar decay per head: Lightning Attention, simple GLA and Mamba2.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

naive.py is the definition; chunked.py is the same sums as matrix products; triton.py and its kernels are those on a
GPU; step.py is one token of decoding; fla.py calls flash-linear-attention; recurrence.py picks between them.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T tokens, H heads, K key size, V value size, C tokens in a chunk, N chunks.
"""
