"""Write the stored outputs of the interactive figures again. They contain the script `nbs/widgets/gini.js`, and a text
for readers without scripts, so they go out of date when these change.

`--check` exits with 1 if one of them is out of date.
"""

import json
import re
import sys

from common import as_json, root, text

from gini_loss.widgets import figure_html

FIGURE = re.compile(r'<div data-gini="([\w-]+)">[^\n]*</div>\n<script>\n.*?</script>', re.S)


def refreshed(html):
    "The HTML of a stored output with the current figure"
    return FIGURE.sub(lambda found: figure_html(found.group(1)), html)


def refresh(notebook):
    "Update the figures in the outputs of a notebook, and return whether any changed"
    changed = False
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            old = text(data.get("text/html"))
            new = refreshed(old)
            if new == old:
                continue
            data["text/html"] = new.splitlines(keepends=True)
            changed = True
    return changed


def main():
    stale = []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if not refresh(notebook):
            continue
        stale.append(path.name)
        if "--check" in sys.argv:
            continue
        path.write_text(as_json(notebook), encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"interactive figures with an old script in {', '.join(stale)}; run `python .ci/widgets.py`")
    print("interactive figures:", ", ".join(stale) + " written" if stale else "up to date")


if __name__ == "__main__":
    main()
