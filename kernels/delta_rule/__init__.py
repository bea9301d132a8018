"""The delta rule: DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention (2510.26692).

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

What the state holds under k_t is replaced by v_t, to the degree beta_t. DeltaNet has no decay (g = 0), Gated DeltaNet
one per head, Kimi Delta Attention one per key channel. The rule is stable for keys of length 1 and beta in [0, 2].

naive.py is the definition; chunked.py is the same sums as matrix products; step.py is one token of decoding; fla.py
calls flash-linear-attention; recurrence.py picks between them.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T tokens, H heads, K key size, V value size; G = B * H, C tokens in a chunk, N chunks; D = K or 1.
"""
