"""Write README.md from nbs/index.ipynb and CONTRIBUTING.md from nbs/70_contributing.ipynb.

We do not use `nbdev_readme`: with Quarto it loses the sentence under the title, the targets of links and the alt texts.
`--check` exits with 1 if one of the files differs from its notebook in words or code; it does not compare the layout.
"""

import base64
import re
import sys

from common import cells, root, site, text

RENDERED = {
    "README.md": ("index.ipynb", "index_files/figure-commonmark"),
    "CONTRIBUTING.md": ("70_contributing.ipynb", "contributing_files/figure-commonmark"),
}


def as_details(tabs):
    "The tabs of the site as sections that can be opened; the first one is open"
    parts = re.split(r"^### (.+)\n", tabs.group(1), flags=re.M)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    opened = [
        f"<details{'' if k else ' open'}>\n<summary>{name}</summary>\n\n{body.strip()}\n\n</details>"
        for k, (name, body) in enumerate(sections)
    ]
    return "\n\n".join(opened) + "\n"


def without_fences(source):
    "Markdown without the lines that make tabs, cards and columns of it on the site"
    source = re.sub(r"^::: \{\.panel-tabset\}\n(.*?)^:::$\n?", as_details, source, flags=re.M | re.S)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^:::.*$\n?", "", source, flags=re.M)).strip()


def markdown_parts(cells):
    "The pieces of the README in order: (kind, content), with kind 'text', 'code', 'output' or 'image'"
    for i, c in enumerate(cells):
        source = text(c["source"])
        if c["cell_type"] == "markdown":
            yield (
                "text",
                without_fences(re.sub(r"\]\((?:\d+\w*?_)?(\w+)\.ipynb(#[^)]*)?\)", rf"]({site}/\1.html\2)", source)),
            )
            continue
        options = dict(re.findall(r"^#\|\s*([\w-]+):?\s*(.*)$", source, re.M))
        if "hide" in options or c["cell_type"] != "code":
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and options.get("echo") != "false":
            yield "code", code
        for k, o in enumerate(c.get("outputs", []), 1):
            data = o.get("data", {})
            if drawn := {"image/svg+xml", "image/png"} & set(data):
                kind = max(drawn)  # an SVG, where there is one
                alt = options.get("fig-alt", "").strip('"')
                content = text(data[kind])
                content = content.encode() if kind == "image/svg+xml" else base64.b64decode(content)
                yield "image", (f"cell-{i + 1}-output-{k}.{'svg' if kind == 'image/svg+xml' else 'png'}", content, alt)
            elif "text/markdown" in data:
                yield "text", text(data["text/markdown"])
            elif "data-gini=" in text(data.get("text/html")):
                continue  # a figure to drag needs a script
            else:
                yield "output", (text(o.get("text")) or text(data.get("text/plain"))).rstrip()


def render(parts, target):
    notebook, images = RENDERED[target]
    out = [f"<!-- Rendered from nbs/{notebook}: edit that notebook, then run `python .ci/readme.py`. -->"]
    for kind, part in parts:
        if kind == "text":
            out.append(part.strip())
        elif kind == "code":
            out.append(f"```python\n{part}\n```")
        elif kind == "output":
            out.append("\n".join("    " + line for line in part.split("\n")))
        else:
            name, data, alt = part
            (root / images).mkdir(parents=True, exist_ok=True)
            (root / images / name).write_bytes(data)
            out.append(f"![{alt}]({images}/{name})")
    return "\n\n".join(out) + "\n"


def words(s):
    return re.findall(r"\w+", re.sub(r"<[^>]*>", " ", s))


def difference(parts, target):
    "The first part of the notebook that is missing in the rendered file, or None"
    if not (root / target).exists():
        return f"there is no {target}"
    have = " ".join(words((root / target).read_text(encoding="utf-8")))
    written = [p for kind, part in parts if kind != "image" for p in part.split("\n\n")]
    missing = [p for p in written if " ".join(words(p)) not in have]
    missing += [
        part[0] for kind, part in parts if kind == "image" and not (root / RENDERED[target][1] / part[0]).exists()
    ]
    return missing[0] if missing else None


def main():
    for target, (notebook, images) in RENDERED.items():
        parts = list(markdown_parts(cells(root / "nbs" / notebook)))
        if "--check" in sys.argv:
            missing = difference(parts, target)
            if missing:
                advice = "run `python .ci/readme.py`. First difference:"
                sys.exit(f"{target} does not hold what nbs/{notebook} says; {advice}\n{missing}")
            print(f"{target} and nbs/{notebook} agree")
            continue
        for old in (root / images).glob("cell-*"):
            old.unlink()
        (root / target).write_text(render(parts, target), encoding="utf-8")
        print("wrote", target)


if __name__ == "__main__":
    main()
