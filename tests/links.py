"""Links from the documents to lines of code: `python -m tests.links` updates their line numbers.

Such a link quotes the code that it leads to, [`ratio = ...`](../minirl/ppo.py#L219). Only one line of the file is or
has the quote, so that it can always be found again; a document must quote another line, or more of it, if that changes.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE_LINK = re.compile(r"\[`(?P<code>[^`]+)`\]\((?P<file>[^)#]+)#L\d+\)")


def relink(document: Path) -> tuple[str, list[str]]:
    """Return a document's text with links to code at the lines that they quote, and a message for each without one.

    If quoted code is no longer on any line of its file, or on several, its link stays as it is.
    """
    wrong: list[str] = []

    def mended(link: re.Match[str]) -> str:
        code = link["code"].replace("\\|", "|")  # in a table
        lines = (document.parent / link["file"]).read_text().splitlines()
        whole = [number for number, line in enumerate(lines, 1) if code == line.strip()]
        found = whole if len(whole) == 1 else [number for number, line in enumerate(lines, 1) if code in line]
        if len(found) != 1:
            wrong.append(f"{document.name}: {link['file']} must have `{code}` on one line, not on {found or 'none'}")
            return link[0]
        return f"[`{link['code']}`]({link['file']}#L{found[0]})"

    return CODE_LINK.sub(mended, document.read_text()), wrong


if __name__ == "__main__":
    complaints: list[str] = []
    for path in DOCUMENTS:
        text, wrong = relink(path)
        path.write_text(text)
        complaints += wrong
    raise SystemExit("\n".join(complaints) or 0)
