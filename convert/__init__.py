"""Conversion of checkpoints: Hugging Face's safetensors to Orbax and back.

`python -m convert SRC DST` is the program, `convert.program.convert` the function behind it.
"""
