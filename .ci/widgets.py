"""The figures to drag hold their script, so a stored output goes out of date with it: this makes every stored output
again, with the script of `nbs/widgets/gini.js` and what is shown where scripts do not run.

`--check` says whether any is out of date.
"""
import json
import re
import sys

from common import root, text

from gini_loss.widgets import figure_html

FIGURE = re.compile(r'<div data-gini="([\w-]+)">[^\n]*</div>\n<script>\n.*?</script>', re.S)


def refreshed(html):
    "A stored output with the figure as it is now"
    return FIGURE.sub(lambda found: figure_html(found.group(1)), html)


def refresh(notebook):
    "Put the script into the outputs of a notebook; says whether that changed any"
    changed = False
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            old = text(data.get("text/html"))
            new = refreshed(old)
            if new == old: continue
            data["text/html"] = new.splitlines(keepends=True)
            changed = True
    return changed


def main():
    stale = []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if not refresh(notebook): continue
        stale.append(path.name)
        if "--check" in sys.argv: continue
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"figures to drag with an old script in {', '.join(stale)}; run `python .ci/widgets.py`")
    print("figures to drag:", ", ".join(stale) + " refreshed" if stale else "in step with their script")


if __name__ == "__main__": main()
