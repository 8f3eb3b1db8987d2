"""The pages are plain English: short sentences, and none of the phrases in `INSTEAD`."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGES = [
    str(path.relative_to(ROOT))
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
]
SOURCES = [
    str(path.relative_to(ROOT))
    for package in ("mlo", "lfmcw_app")
    for path in sorted((ROOT / package).rglob("*.py"))
]

LONGEST = 45
"""Words of the longest sentence of a page."""

NINETIETH = 28
"""Words that nine of ten sentences of a page do not exceed."""

MEAN = 20
"""Words of a page's average sentence."""

THING = (
    "(batch|cell|class|edge|epoch|image|input|level|measurement|node|parameter|picture|player"
    "|problem|process|round|row|run|seed|solve|step|task|tensor|update)"
)
NO_VERB = r"\b(?! (can|does|gets|had|has|is|keeps|makes|may|must|needs|reads|takes|uses|was))"

INSTEAD = {
    r"\b(go|goes|went) on\b(?! (a|all|an|each|every|one|the|top|which|your)\b)": "resume, continue",
    r"\b(let|lets|letting) go of\b": "release",
    r"\b(take|takes|taken|taking|took)( \w+){0,3} for (a )?constants?\b": "treat as constant",
    r"\b(mend|mends|mended|mending)\b": "fix, repair; recover",
    r"[,;:] else\b(?! (0|CODE|[Ff]alse|None|if|nothing)\b)": "otherwise",
    r"\bspoilt\b": "corrupted",
    r"\b(a|an|any|one) [\w-]+ of yours\b": "your own …",
    r"\b(begin|begins|began|beginning|start|starts) anew\b": "start over, start again",
    r"(^|[.;:] )Who \w+s [^.?]*\.": "To …, …; if you …",
    r"\b(allow|allows|allowed|allowing|enables|permits) to\b": "let, allow …ing",
    r"\b(evidences|informations|softwares)\b": "the singular",
    rf"\b(milliseconds?|ms|seconds?|minutes|hours|[GM]i?B|percent) an? {THING}\b": "per",
    rf"\b(folder|line|number|strength|vector|one|once|twice|two) an? {THING}{NO_VERB}": "per",
    r"\b(this day's|today|yesterday|nowadays|as of now)\b": "no diary: say what holds",
    r"\b[Ww]e (also |then |do |can )?[a-z]+\b": "say who or what does it",
}
"""What a native speaker does not write (a regular expression) → what to write instead."""


def prose(text):
    """The paragraphs and items of a page: no code, tables, headings, pictures or addresses."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2\s*$", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|\$\$.*?\$\$", "\n", text, flags=re.DOTALL)
    blocks = [[]]
    for line in text.splitlines():
        stripped = line.strip()
        item = re.match(r"([-*]|\d+\.) +(.*)", stripped)
        aside = re.match(r"[|#<]|!\[|:::|---|!!!|\?\?\?|===|\[!\[", stripped)
        code = line.startswith("    ") and not (item or blocks[-1])
        if aside or code or not stripped:
            blocks.append([])
        elif item:
            blocks.append([item[2]])
        else:
            blocks[-1].append(stripped)
    return [" ".join(block) for block in blocks if block]


def plain(text):
    """A text with code and formulas as one word each, without links' addresses and emphasis."""
    text = re.sub(r"``.+?``|`[^`]+`", "CODE", text)
    text = re.sub(r"\$[^$\n]+\$", "FORMULA", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(\*\*|\*|\b_|_\b)(?=\S)(.+?)(?<=\S)\1", r"\2", text)


def sentences(block):
    """The sentences of a paragraph."""
    text = re.sub(r"\b(e\.g|i\.e|cf|Eqs?|al|Fig|vs|St|approx)\.", r"\1", plain(block))
    parts = re.split(r"(?<=[.!?])[\")”’*]*\s+(?=[\"“(*]?(?:[A-Z0-9]|[a-zα-ω]\b))", text)
    return [part for part in parts if words(part)]


def words(sentence):
    return len(re.findall(r"\S*\w\S*", sentence))


def lengths_that_break_a_rule(text):
    """What is wrong with the lengths of a page's sentences; longest first."""
    found = [sentence for block in prose(text) for sentence in sentences(block)]
    counted = sorted(((words(sentence), sentence) for sentence in found), reverse=True)
    if not counted:
        return []
    lengths = [length for length, _ in counted]
    wrong = [f"{length} words: {text}" for length, text in counted if length > LONGEST]
    mean, ninetieth = sum(lengths) / len(lengths), lengths[len(lengths) // 10]
    if mean > MEAN:
        wrong.append(f"{mean:.1f} words in the average sentence, not {MEAN}")
    if ninetieth > NINETIETH:
        wrong.append(f"1 sentence in 10 has {ninetieth} words or more, not {NINETIETH}:")
        wrong += [f"{length}: {text}" for length, text in counted[: len(counted) // 10 + 1]]
    return wrong


def phrases_that_break_a_rule(texts):
    """Each phrase of `INSTEAD` in some texts, with what surrounds it and what to write."""
    return [
        f"“{text[max(0, match.start() - 40) : match.end() + 20]}”: {instead}"
        for text in texts
        for phrase, instead in INSTEAD.items()
        for match in re.finditer(phrase, text)
    ]


def texts_of_page(text):
    """The prose of a page and the cells of its tables."""
    cells = [
        cell for row in re.findall(r"^ *\|(.*)\|", text, re.MULTILINE) for cell in row.split("|")
    ]
    return [plain(block) for block in [*prose(text), *cells]]


def texts_of_source(text):
    """The strings of a module (docstrings and messages too) and its comments, each block joined."""
    tree = ast.parse(text)
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    comments, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            follows = last == token.start[0] - 1
            said = token.string.lstrip("#: ")
            comments = [*comments[:-1], f"{comments[-1]} {said}"] if follows else [*comments, said]
            last = token.start[0]
    return [plain(re.sub(r"\s+", " ", said)) for said in [*found, *comments]]


def wrong_in(name):
    text = (ROOT / name).read_text("utf-8")
    if name.endswith(".py"):
        return phrases_that_break_a_rule(texts_of_source(text))
    return lengths_that_break_a_rule(text) + phrases_that_break_a_rule(texts_of_page(text))


@pytest.mark.parametrize("name", [*PAGES, *SOURCES])
def test_a_file_is_written_in_plain_english(name):
    wrong = wrong_in(name)
    assert not wrong, "\n".join([f"{name}:", *wrong])


WRONG = [
    "The run goes on after a crash.",
    "It lets go of the graph.",
    "The engine takes it for a constant.",
    "No setting mends this.",
    "It is exact for SGD; else a warning says so.",
    "Half of the patients is spoilt.",
    "Pass a function of yours.",
    "The net begins anew.",
    "It is freed. Who asks then evaluates again.",
    "This allows to resume.",
    "This is an informations page about softwares.",
    "It costs 8 ms a step.",
    "The folder has a folder a class.",
    "It is fast since this day's changes.",
    "First we train the net.",
]
"""A sentence for each row of `INSTEAD`, in its order."""

RIGHT = """
The argument goes on the GPU. Each one a class has is read; it warns once a step is lost. Who
computes the response? Return its name, or else None; the name if there is one, else None.
The trainer takes a constant. He let go. A recommendation amended the rules. It runs for 3 ms.
A new start follows. Begin a new round. Weights allow for noise. Yesterdays is a file's name.
"""


def test_every_forbidden_phrase_is_found_and_no_other():
    for number, sentence in enumerate(WRONG):
        found = [place for place, phrase in enumerate(INSTEAD) if re.search(phrase, sentence)]
        assert found == [number], sentence
    assert len(WRONG) == len(INSTEAD)
    assert phrases_that_break_a_rule([RIGHT.replace("\n", " ")]) == []


def test_only_prose_is_counted():
    page = """# A title of words

A sentence with `some code in it` and a [link of four words](page.md), e.g. this one. Another
one, over two lines.

- An item.
- A second item that ends in a
  colon:

```python
code = "is no prose"
```

    nor is this

| nor | this |
|---|---|
"""
    assert [words(s) for block in prose(page) for s in sentences(block)] == [13, 5, 2, 8]
    long = " ".join(["word"] * 30) + ". " + " ".join(["Short sentence."] * 20)
    assert lengths_that_break_a_rule(long) == []
    assert lengths_that_break_a_rule(long.replace("Short sentence.", "", 12))[0].startswith(
        "1 sentence in 10"
    )
    assert lengths_that_break_a_rule("word " * 46)[0].startswith("46 words")
    assert lengths_that_break_a_rule("word " * 21 + ".")[0].startswith("21.0 words")


def test_words_in_docstrings_comments_and_messages_are_looked_at():
    source = '''"""Goes on."""
go = 1  # it lets
# go of it
raise ValueError(f"{go} is spoilt")
'''
    assert len(phrases_that_break_a_rule(texts_of_source(source))) == 2
