"""The same model and prompt through Hugging Face transformers: `python -m benchmarks.peers`.

Random weights are made once, by our side, and written as a Hugging Face checkpoint that the other
side loads. Each framework runs in a process of its own, since both want a GPU's memory for
themselves, and is asked in turns; so what changes with the time changes for all of them. Nothing is
timed before both sides have given the same logits and the same greedy tokens.
"""
