"""Write the input tables of the nodes' help pages from the texts in locales/.

Only the lines between the two markers are replaced; the rest of a page is written by hand.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "nodes" / "web" / "docs"
BEGIN, END = "<!-- inputs: written by `make help-tables` -->", "<!-- end of inputs -->"
HEADS = {"en": "| input | effect |", "zh": "| 输入 | 作用 |"}


def texts(language: str) -> dict[str, dict]:
    """Node id → its texts."""
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def page_of(node: str, language: str) -> Path:
    """The help page that ComfyUI shows; English has no folder of its own."""
    return PAGES / f"{node}.md" if language == "en" else PAGES / node / f"{language}.md"


def table(node: str, language: str) -> str:
    """The inputs of a node as a Markdown table; another language adds its name to the English one."""
    english, own = texts("en")[node]["inputs"], texts(language)[node]["inputs"]
    rows = [HEADS[language], "|---|---|"]
    for key, field in english.items():
        label = "" if language == "en" else f"（{own[key]['name']}）"
        effect = own[key]["tooltip"].replace("|", "\\|")
        rows.append(f"| `{field['name']}`{label} | {effect} |")
    return "\n".join(rows)


def renewed(node: str, language: str) -> str:
    """The text of a page with the table that belongs there. Raises ValueError for a page without markers."""
    page = page_of(node, language)
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{table(node, language)}\n\n{END}{after}"


if __name__ == "__main__":
    for language in HEADS:
        for node in texts("en"):
            page_of(node, language).write_text(renewed(node, language), encoding="utf-8")
