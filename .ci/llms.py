"""Write nbs/llms.txt, the site's table of contents for language models (llmstxt.org), from the sidebar and the
notebooks.

`--check` exits with 1 if the file is out of date.
"""

import sys

import yaml
from common import cfg, page, root, site, title_and_subtitle

TARGET = root / "nbs" / "llms.txt"


def link(item):
    title, subtitle = title_and_subtitle(root / "nbs" / item["href"])
    if item["href"] == "index.ipynb":  # its subtitle stands above
        subtitle = "the loss in a few lines, what it changes, how far the replication has come, how to cite it"
    return f"- [{title}]({site}/{page(item['href'])}): {subtitle}"


def render():
    sidebar = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    title, summary = title_and_subtitle(root / "nbs" / "index.ipynb")
    start = [o for o in sidebar if "href" in o]
    pages = "Every page is a notebook with its outputs; the library is exported from them."
    out = [f"# {title}", f"> {summary}", f"Install with `pip install {cfg['lib_name']}`. {pages}"]
    for section in [dict(section="Start", contents=start), *(o for o in sidebar if "section" in o)]:
        out.append(f"## {section['section']}\n\n" + "\n".join(map(link, section["contents"])))
    source = cfg["git_url"]
    optional = [f"- [Source]({source}): the notebooks, the library, the tests and the records of all runs"]
    optional.append(f"- [Changelog]({source}/blob/{cfg['branch']}/CHANGELOG.md): what changed between versions")
    out.append("## Optional\n\n" + "\n".join(optional))
    return "\n\n".join(out) + "\n"


def main():
    if "--check" not in sys.argv:
        TARGET.write_text(render(), encoding="utf-8")
        return print("wrote nbs/llms.txt")
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != render():
        sys.exit("nbs/llms.txt is not what the notebooks say; run `python .ci/llms.py`")
    print("nbs/llms.txt and the notebooks agree")


if __name__ == "__main__":
    main()
