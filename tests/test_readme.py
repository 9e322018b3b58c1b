"""The README says what the committed result files say, and its code runs."""

import re
from pathlib import Path

from benchmarks.readme import README, fill

ROOT = Path(__file__).parent.parent


def test_generated_parts_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert fill(text) == text, "run `python -m benchmarks.readme`"


def test_the_ten_lines_of_python_run(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    namespace = {}
    exec(code[1], namespace)
    assert capsys.readouterr().out
    assert len(namespace["answers"]) == 2


def test_links_lead_somewhere():
    for name in ("README.md", "docs/architecture.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"([^\"]+)\"", text):
            assert (ROOT / name).parent.joinpath("".join(target)).exists(), target
        for path in re.findall(r"(?:vlcache_jax|pallas_kernels)/[\w/.]*[\w/]", text):
            assert (ROOT / path).exists(), path
