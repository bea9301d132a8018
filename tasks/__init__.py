"""What a model is measured on: retrieval, continuation, lm-eval tasks, perplexity, speed and memory.

A suite takes a model and lengths and yields metrics with their count and standard error. Everything works on any
Hugging Face causal decoder; nothing here knows a hybrid from a teacher. `suites.py` has the names and runs them.
"""
