"""Linear attention with a decay per key channel: Gated Linear Attention (arXiv 2312.06635).

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

naive.py is the definition; chunked.py is the same sums as matrix products; step.py is one token of decoding; fla.py
calls flash-linear-attention; recurrence.py picks between them.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T tokens, H heads, K key size, V value size; G = B * H, C tokens in a chunk, N chunks.
"""
