"""Diagonal plus low rank: the generalised delta rule of RWKV-7 (arXiv 2503.14456).

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale * S_t^T q_t

a reads the state as it was before the decay, b writes what was read, and both are free of the key. RWKV-7 takes
a = -kappa and b = kappa * alpha with kappa a key of length 1 and alpha in (0, 1). The delta rule is the case
a = k exp(g), b = - beta k, with beta k in place of k.

naive.py is the definition; chunked.py is the same sums as matrix products; step.py is one token of decoding; fla.py
calls flash-linear-attention; recurrence.py picks between them.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T tokens, H heads, K key size, V value size; G = B * H, C tokens in a chunk, N chunks.
"""
