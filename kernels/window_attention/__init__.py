"""Softmax attention to the last tokens, and to the first ones, with a memory that does not grow.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s    over real s <= t with t - s < window or s < sinks

The first `sinks` tokens stay visible for ever (StreamingLLM, arXiv 2309.17453). Places are positions among the real
tokens of a sequence, so padding anywhere changes nothing. naive.py is the definition; chunked.py is the same in blocks
of queries against the band they see; memory.py is what stays between calls.

Shapes, in the names of tensors everywhere in this folder:
    B batch, T tokens, H query heads, J key/value heads, K key size, V value size, S keys at hand,
    M = sinks + window places of the memory.
"""
