"""Counts the words of sentences in docstrings, comments and Markdown pages.

``python -m tests.helpers.sentences [PATH …]`` prints the longest sentences and the share over the limit.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIMIT = 25  # words of a sentence, at most
ROOTS = ("fr_core", "pipelines", "tune_spaces")

CODE = re.compile(r"``.+?``|`[^`]+`|:\w+:`[^`]+`", re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
ENTRY = re.compile(r"^\s{4,}\*{0,2}\w[\w, .]*:\s")  # an entry under Args or Raises
HEADING = re.compile(r"^\s*(?:Args|Returns|Raises|Yields|Attributes|Example|Legend):\s*$")
# A sentence ends at its stop, unless the stop belongs to a number or an abbreviation.
END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bal)(?<!\bvs)[.!?][*\"')\]]*(?=\s|$)")


class Sentence(NamedTuple):
    words: int
    text: str
    where: str


def sentences(text: str) -> list[str]:
    """Split prose into sentences. Blank lines, list items and entries of Args also end one."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or HEADING.match(line):
            blocks.append([])
        elif ITEM.match(line) or ENTRY.match(line):
            blocks.append([ITEM.sub("", line)])
        else:
            blocks[-1].append(line)
    prose = [CODE.sub("code", " ".join(lines)) for lines in blocks]
    return [part.strip() for block in prose for part in END.split(block) if part.strip()]


def words(sentence: str) -> int:
    """Count the words that hold a letter; signs and bare numbers are none."""
    return sum(any(letter.isalpha() for letter in word) for word in sentence.split())


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each docstring of a file, attribute docstrings included, with the line it begins at."""
    for node in ast.walk(ast.parse(path.read_text())):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield f"{path}:{child.lineno}", value.value


def comments(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the comments of a file; neighbouring whole-line comments are one text."""
    begun, lines, last = 0, [], 0
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type != tokenize.COMMENT:
                continue
            text = token.string.lstrip("#: ")
            row = token.start[0]
            whole = token.line.lstrip().startswith("#")
            if lines and whole and row == last + 1:
                lines.append(text)
            else:
                if lines:
                    yield f"{path}:{begun}", " ".join(lines)
                begun, lines = row, [text]
            last = row if whole else -1
    if lines:
        yield f"{path}:{begun}", " ".join(lines)


def page(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the prose of a Markdown page, without code blocks, tables, headings and targets of links."""
    text = re.sub(r"^( *)```.*?^\1```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    kept = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|<)", line)]
    yield str(path), LINK.sub(r"\1", "\n".join(kept))


def counted(paths: list[Path], kinds: str = "docstrings") -> list[Sentence]:
    """Count every sentence of ``docstrings``, of ``comments`` or of Markdown pages, longest first."""
    read = {"docstrings": docstrings, "comments": comments, "pages": page}[kinds]
    found = [
        Sentence(words(sentence), sentence, where)
        for path in paths
        for where, text in read(path)
        for sentence in sentences(text)
    ]
    return sorted(found, reverse=True)


def sources(roots: list[str], suffix: str = ".py") -> list[Path]:
    """List the files of a suffix below some folders, or the files themselves."""
    found = [sorted(Path(root).rglob("*" + suffix)) if Path(root).is_dir() else [Path(root)] for root in roots]
    return [path for paths in found for path in paths if path.suffix == suffix]


def main() -> None:
    """Print a summary for each kind of text below the paths of the command line."""
    roots = sys.argv[1:] or list(ROOTS)
    for kind, suffix in (("docstrings", ".py"), ("comments", ".py"), ("pages", ".md")):
        if found := counted(sources(roots, suffix), kind):
            long = [sentence for sentence in found if sentence.words > LIMIT]
            print(f"{kind}: {len(found)} sentences, {len(long)} over {LIMIT} words ({len(long) / len(found):.1%})")
            for sentence in found[: max(5, len(long))]:
                print(f"  {sentence.words:3} {sentence.where}: {' '.join(sentence.text.split())[:150]}")


if __name__ == "__main__":
    main()
