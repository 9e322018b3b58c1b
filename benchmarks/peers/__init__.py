"""The same model and prompt through Hugging Face transformers: `python -m benchmarks.peers`.

Random weights are made once, by our side, and written as a Hugging Face checkpoint that the other
side loads. Each framework runs in a process of its own, since both want a GPU's memory for
themselves, and is asked in turns; so what changes with the time changes for all of them. Nothing is
timed before both sides have given the same logits and the same greedy tokens.

    model         shapes, random weights, and a prompt of pictures of an exact length
    process       a process that answers questions, with a limit of time
    ours          what runs in our process
    hugging_face  what runs in Hugging Face's
    agreement     whether two answers are the same
    compare       the run: check, turns, rows, ratios
"""
