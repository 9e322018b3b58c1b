"""PyTorch's attention at the shapes of speed_prompt.prefill: run by it, in a process of its own.

`python -m benchmarks.gpu_suite.torch_sdpa 2048 8192` prints {"2048": {"samples": [...]}, ...}.
"""

import json
import math
import sys
import time
from typing import Any


def measure(lengths: list[int], device: str, tokens: int = 32768) -> dict[str, Any]:
    """Seconds of one causal call of batch 1, 32 query and 8 kv heads of 128, for each length.

    Args:
        lengths: of the sequences.
        device: "cuda" or "cpu".
        tokens: of all input sets together, so that they are more than the cache holds.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found = {}
    for length in lengths:
        sets = [
            [
                torch.randn(1, n, length, 128, device=device, dtype=torch.bfloat16)
                for n in (32, 8, 8)
            ]
            for _ in range(max(2, math.ceil(tokens / length)))
        ]

        def sample(count: int, sets: list[Any] = sets) -> float:
            wait()
            began = time.perf_counter()
            for _ in range(count):
                for q, k, v in sets:
                    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            wait()
            return (time.perf_counter() - began) / (count * len(sets))

        with torch.inference_mode():
            once = [sample(1) for _ in range(3)][-1]
            count = max(1, math.ceil(0.01 / (once * len(sets))))
            samples = [sample(count) for _ in range(20)]
        found[str(length)] = {"samples": samples, "version": torch.__version__}
    return found


if __name__ == "__main__":
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU")
    print(json.dumps(measure([int(text) for text in sys.argv[1:]], "cuda")))
