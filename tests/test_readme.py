"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text() if README.exists() else "", re.MULTILINE | re.DOTALL)


def test_the_readme_has_python_to_run() -> None:
    assert BLOCKS, f"{README.name} is missing or has no python block"


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_each_block_runs_on_its_own(number: int) -> None:
    exec(compile(BLOCKS[number], f"{README.name}, python block {number + 1}", "exec"), {"__name__": "__main__"})
