"""Qwen2.5-VL (Bai et al. 2025): pictures at their own resolution, positions of three axes."""
