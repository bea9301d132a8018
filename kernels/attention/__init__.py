"""Causal softmax attention with grouped key/value heads.

    o_t = sum_{s <= t} softmax_s(scale * q_t . k_s) v_s

naive.py is the definition; softmax.py picks the fastest form for the device and the case.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T queries, S keys, H query heads, J key/value heads, G = H / J query heads that share one,
    K key size, V value size. The T queries are the last T of the S tokens.
"""
