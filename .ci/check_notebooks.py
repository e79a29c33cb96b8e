"""Check every notebook: outputs are stored and clean, figures and images have descriptions, links and anchors exist,
and there is prose between the code. Links and images of README.md and CONTRIBUTING.md are checked too.

This runs offline, so links that leave the project must only be well formed. `--external` lists them with their files,
for a person or another tool to try.

Run from the repository's root. Prints one line a finding and exits with 1 if there is any.
"""

import ast
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from common import cells, cfg, page, site, text

MAX_BYTES, MAX_CODE_RUN, MAX_OUTPUT_LINE, MAX_PLOT_LINES = 1_500_000, 4, 350, 20
RESULTS = re.compile(r"3[1-6]_")
DERIVATION, PHOTOGRAPHS = re.compile(r"0[2-5]_"), re.compile(r"20b?_")
COPIED = re.compile(r"1[4-9]_")  # readers copy their code from the site, which leaves hidden cells out
ENTRY = re.compile(r"^show_doc\(", re.M)
MACHINE_PATH = re.compile(r"/(?:work|root|tmp|home|Users|opt)/[\w.~-]+")
LINK = re.compile(r"(?<!!)\[(?:!\[[^\]]*\]\([^)]*\)|[^\]])*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
AUTOLINK = re.compile(r"<((?:https?|mailto):[^>\n]*)>")
SPACED = re.compile(r"\]\(\s*((?:https?:|mailto:|[\w./-]+\.(?:ipynb|md|html)\b)[^\s)]*[ \t]+(?![\"'])[^)\n]*)\)")
HOST = re.compile(r"(?:[a-zA-Z0-9](?:[\w-]*[a-zA-Z0-9])?\.)+[a-zA-Z]{2,}(?::\d+)?")
NO_OUTPUT = re.compile(r"^#\|\s*(?:hide\b|default_exp|exporti?\b|exports\b|include: false)", re.M)

tracked = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split())
pages = {page(name): Path(name) for name in tracked if re.fullmatch(r"nbs/[^/]+\.ipynb", name)}
problems, external = [], {}


def prose(source):
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```", "", source, flags=re.M | re.S))


def heading_id(heading):
    "The anchor of a heading on the site, by pandoc's rule"
    if given := re.search(r"\{#([\w.:-]+)[^}]*\}\s*$", heading):
        return given.group(1)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*$\\]", "", heading)).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain)))


@lru_cache(None)
def anchors(path):
    "The anchors of a file: its headings, and the functions and classes that a notebook exports"
    path, found = Path(path), set()
    markdown = [path.read_text(encoding="utf-8")] if path.suffix == ".md" else []
    for c in cells(path) if path.suffix == ".ipynb" else []:
        source = text(c["source"])
        if c["cell_type"] == "markdown":
            markdown.append(source)
        elif re.search(r"^#\|\s*exports?\b", source, re.M):
            found |= {name.lower() for name in re.findall(r"^(?:def|class) (\w+)", source, re.M)}
        elif ENTRY.search(source):
            markdown += [text(o.get("data", {}).get("text/markdown")) for o in c.get("outputs", [])]
    for source in markdown:
        without_code = re.sub(r"^```.*?^```", "", source, flags=re.M | re.S)
        found |= {heading_id(h) for h in re.findall(r"^#{1,6}\s+(.+)$", without_code, re.M)}
        found |= set(re.findall(r"<a (?:id|name)=[\"']([\w.-]+)", source))
    return found


def in_repository(target, path):
    "The file and the anchor of a link; None for a link that leaves the project"
    target, _, anchor = target.partition("#")
    if target.startswith(site + "/") or target == site:
        return pages.get(target[len(site) + 1 :] or "index.html", Path(target)), anchor
    place = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/"
    for prefix in (f"https://github.com/{place}", f"https://colab.research.google.com/github/{place}"):
        if target.startswith(prefix):
            return Path(target[len(prefix) :]), anchor
    if re.match(r"\w+:", target):
        return None
    if not target:
        return path, anchor
    found = (path.parent / target).resolve()
    return (found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found), anchor


def malformed(url):
    "What is wrong with the form of an external link, or None"
    try:
        parts = urlsplit(url)
    except ValueError as e:
        return str(e)
    if parts.scheme == "mailto":
        return None if re.fullmatch(r"[^@\s]+@[\w.-]+\.\w+", parts.path) else "not an address"
    if parts.scheme not in ("http", "https"):
        return f"{parts.scheme}: is not http, https or mailto"
    if not HOST.fullmatch(parts.netloc):
        return f"{parts.netloc!r} is not the name of a host"
    rest = url.split(parts.netloc, 1)[1]
    if re.search(r"%(?![0-9A-Fa-f]{2})|[\s<>\"{}|\\^`]", rest):
        return "a character that must be written with %"
    if re.search(r"https?:/?/?", rest) and "://web.archive.org/" not in url:
        return "two addresses in one"
    if rest.count("(") != rest.count(")"):
        return "brackets that do not close: write them as %28 and %29"
    return "it ends in punctuation" if re.search(r"[.,;:!?]$", rest) else None


def check_external(target, path, say):
    external.setdefault(target, set()).add(str(path))
    if wrong := malformed(target):
        say(f"malformed link {target}: {wrong}")


def exists(file):
    return str(file) in tracked or any(name.startswith(f"{file}/") for name in tracked)


def check_link(target, path, say):
    "The file and the section of a link within the project exist"
    where = in_repository(target, path)
    if where is None:
        return
    file, anchor = where
    if file != path and not exists(file):
        say(f"dead link {target}")
    elif anchor and file.suffix in (".ipynb", ".md") and anchor not in anchors(str(file)):
        say(f"no section #{anchor} in {file}")


def check_images(source, path, say):
    "Each image exists and has alt text"
    for alt, target in IMAGE.findall(source):
        if not alt.strip():
            say(f"an image without alt text, {target}")
        where = in_repository(target, path)
        if where is not None and str(where[0]) not in tracked:
            say(f"no image {target}")
    for tag in re.findall(r"<img\b[^>]*>", source):
        if not re.search(r"alt=[\"'][^\"']", tag):
            say(f"an image without alt text, {tag}")


def check_text(source, path, say):
    "Links, anchors and images of a text"
    source = prose(source)
    links = LINK.findall(source)
    for target in AUTOLINK.findall(source) + links + [url for _, url in IMAGE.findall(source)]:
        if in_repository(target, path) is None:
            check_external(target, path, say)
    for target in SPACED.findall(source):
        say(f"malformed link {target}: a space in it")
    for target in links:
        check_link(target, path, say)
    check_images(source, path, say)


def check_opening(path, all_cells, say):
    "A title, a one-sentence subtitle, the Colab link, and stored outputs if any cell shows one"
    first = text(all_cells[0]["source"])
    if not first.startswith("# "):
        say("the first cell is not a title")
    if not re.search(r"^> \S", first, re.M):
        say("no one-sentence subtitle under the title")
    if f"/nbs/{path.name})" not in first + text(all_cells[1]["source"]):
        say("no Colab link to this notebook at the top")
    shown = [c for c in all_cells if c["cell_type"] == "code" and not NO_OUTPUT.search(text(c["source"]))]
    if shown and not any(c.get("outputs") for c in shown):
        say("no cell has an output")


def check_output(output, source, path, say):
    data = output.get("data", {})
    printed = text(output.get("text")) + "".join(text(v) for k, v in data.items() if k.startswith("text/"))
    if output["output_type"] == "error":
        say("a stored error")
    if output.get("name") == "stderr":
        say("stored stderr")
    if "\r" in printed or "%|" in printed:
        say("a progress bar")
    if found := MACHINE_PATH.search(printed):
        say(f"a path of some machine, {found.group(0)}")
    if "text/markdown" in data:
        check_text(text(data["text/markdown"]), path, say)
    if {"image/png", "image/svg+xml"} & set(data) and "fig-alt:" not in source:
        say("a figure without `#| fig-alt:`")
    if "image/png" in data and not PHOTOGRAPHS.match(path.name):
        say("a figure as PNG: call gini_loss.plots.use_theme before it")


def check_shown(cell, source, say):
    "Lines of outputs are not too long, and plotting code is short or folded"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        drawn = {"image/png", "image/svg+xml"} & set(data)
        rich = drawn | ({"text/html", "text/markdown"} & set(data))
        printed = text(output.get("text")) or ("" if rich else text(data.get("text/plain")))
        longest = max(map(len, printed.splitlines()), default=0)
        if longest > MAX_OUTPUT_LINE:
            say(f"an output with a line of {longest} characters, more than {MAX_OUTPUT_LINE}")
        folded = re.search(r"^#\|\s*(?:code-fold|echo: false|exports?\b)", source, re.M)
        if drawn and not folded and source.count("\n") > MAX_PLOT_LINES:
            say(f"plotting code of more than {MAX_PLOT_LINES} lines that is not folded: add `#| code-fold: true`")


def check_answer(path, all_cells, say):
    "A page of results has its answer in a box among the first cells"
    if not RESULTS.match(path.name):
        return
    opening = all_cells[:8]
    said = [text(c["source"]) for c in opening if c["cell_type"] == "markdown"]
    said += [text(o.get("data", {}).get("text/markdown")) for c in opening for o in c.get("outputs", [])]
    if not any("{.callout" in s for s in said):
        say("no answer box among the first cells: gini_loss.paper.answer_box makes one")


def check_derivation(path, all_cells, say):
    "Each numbered equation of the derivation is followed by its code, which wide screens show beside it"
    if not DERIVATION.match(path.name):
        return
    shown = [c for c in all_cells if not re.search(r"^#\|\s*hide\b", text(c["source"]), re.M)]
    for cell, below in zip(shown, [*shown[1:], {"cell_type": "none"}], strict=True):
        number = re.search(r"\\tag\{(\d+)\}", text(cell["source"])) if cell["cell_type"] == "markdown" else None
        if number and below["cell_type"] != "code":
            say(f"Equation {number.group(1)} without code right below it")


def defined_and_used(sources):
    defined, used = set(), set()
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add(node.asname or node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
    return defined, used


def check_copied(path, all_cells, say):
    "The code of a page that readers copy from uses no name that only hidden code defines"
    if not COPIED.match(path.name):
        return
    code = [text(c["source"]) for c in all_cells if c["cell_type"] == "code"]
    hidden = [source for source in code if re.search(r"^#\|\s*(?:hide\b|echo: false)", source, re.M)]
    shown_names, used = defined_and_used([source for source in code if source not in hidden])
    for name in sorted(defined_and_used(hidden)[0] & used - shown_names):
        say(f"code that readers copy uses {name}, which only a hidden cell defines")


def reporter(where):
    def say(message):
        problems.append(f"{where}: {message}")

    return say


def check_cells(path, all_cells):
    "Each cell with its outputs, and the number of code cells that follow each other without prose"
    run = 0
    for i, c in enumerate(all_cells):
        source, say = text(c["source"]), reporter(f"{path}: cell {i}")
        if c["cell_type"] != "code":
            run = 0
            check_text(source, path, say)
            continue
        hidden = re.search(r"^#\|\s*hide\b", source, re.M)
        if ENTRY.search(source):
            run = 0  # an entry of the API is prose
        elif not hidden:
            run += 1
        if not hidden:
            check_shown(c, source, say)
        if run == MAX_CODE_RUN + 1:
            say(f"more than {MAX_CODE_RUN} code cells without prose between them")
        for output in c.get("outputs", []):
            check_output(output, source, path, say)


def check(path):
    say = reporter(path)
    raw = path.read_text(encoding="utf-8")
    if len(raw.encode()) > MAX_BYTES:
        say(f"{len(raw) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6} MB")
    all_cells = json.loads(raw)["cells"]
    if any(isinstance(c["source"], str) for c in all_cells):
        say("sources as one string each: save it in Jupyter, which stores lines, so that a diff can be read")
    check_opening(path, all_cells, say)
    check_answer(path, all_cells, say)
    check_derivation(path, all_cells, say)
    check_copied(path, all_cells, say)
    check_cells(path, all_cells)


def check_sidebar(names):
    for name in names:
        if f"nbs/{name}" not in tracked:
            problems.append(f"_quarto.yml: {name} is not there")
    for path in sorted(Path("nbs").glob("*.ipynb")):
        if path.name not in names:
            problems.append(f"_quarto.yml: {path.name} is not in the sidebar")


def main():
    for path in sorted(Path("nbs").glob("*.ipynb")):
        check(path)
    for path in map(Path, ("README.md", "CONTRIBUTING.md")):
        check_text(path.read_text(encoding="utf-8"), path, reporter(path))
    for path in map(Path, ("nbs/references.bib", "CITATION.cff", "CHANGELOG.md")):
        targets = re.findall(r"(?:https?|mailto):[^\s{}<>\"'()]+", path.read_text(encoding="utf-8"))
        for target in targets:
            check_external(target, path, reporter(path))
    sidebar = re.findall(r"href: (\S+\.ipynb)", Path("_quarto.yml").read_text(encoding="utf-8"))
    check_sidebar(sidebar)
    if "--external" in sys.argv:
        for url, where in sorted(external.items()):
            print(f"{url}  ({', '.join(sorted(where))})")
    print("\n".join(problems) or f"{len(sidebar)} notebooks in order")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
