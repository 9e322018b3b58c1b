"""Qwen3-VL (Bai et al. 2025): features of several layers of the tower, added inside the decoder."""
