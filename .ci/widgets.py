"""The figures to drag hold their script, so a stored output goes out of date with it: this puts the script of
`nbs/widgets/gini.js` into every stored output again.

`--check` says whether any is out of date.
"""
import json
import re
import sys

from common import root, text

SCRIPT = root / "nbs" / "widgets" / "gini.js"
HELD = re.compile(r"(<div data-gini=[^\n]*</div>\n<script>\n).*?(</script>)", re.S)


def refreshed(html):
    "A stored output with the script as it is now"
    script = SCRIPT.read_text(encoding="utf-8")
    return HELD.sub(lambda found: found.group(1) + script + found.group(2), html)


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
