from __future__ import annotations

import random

import pytest

SENTENCE = "the model reads a long text and learns which word comes next while its memory keeps what was said before in other segments"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """400 texts of 3 lines: English-like words with numbers, accents, emoji, indentation and double spaces."""
    draw = random.Random(7)
    extra = ["naïve", "größer", "日本語", "😀", "x=1;", "def f(x):", "3.14", "don't", "U.S.", "  twice"]
    made = []
    for number in range(400):
        lines = [" ".join(draw.choices(SENTENCE.split(), k=12)) + " " + draw.choice(extra) + str(draw.randrange(1000)) for _ in range(2)]
        made.append(f"{number} " + "\n    ".join(lines) + "\n")
    return made
