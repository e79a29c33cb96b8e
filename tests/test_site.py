"What a visitor of the site relies on: the first screen, blocks that run as copied, and what page.html does in a real Chromium."

import configparser
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
if not (NBS / "index.ipynb").is_file():
    pytest.skip("the notebooks are not here", allow_module_level=True)

config = configparser.ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
home = ["".join(c["source"]) for c in json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]]
TABS = dict(re.findall(r"^### ([^\n]+)\n(?:(?!^### ).)*?```python\n(.*?)```", "\n".join(home), re.M | re.S))


def test_home_says_what_it_is_in_one_sentence_of_twenty_words():
    sentence = re.search(r"^> (.+)", home[0], re.M).group(1)
    assert len(sentence.split()) <= 20 and sentence.count(".") == 1


def test_home_installs_from_the_index_and_from_the_repository():
    text = "\n".join(home)
    assert f"pip install '{cfg['lib_name']}[all]'" in text
    assert f"git+https://github.com/{cfg['user']}/{cfg['repo']}" in text


def test_home_has_a_block_for_each_kind_of_loop():
    assert set(TABS) == {"PyTorch", "fastai", "Lightning", "Hugging Face"}


@pytest.mark.parametrize(
    "name, needs",
    [("PyTorch", "torch"), ("fastai", "fastai"), ("Lightning", "lightning"), ("Hugging Face", "transformers")],
)
def test_a_block_of_home_runs_as_copied_and_makes_channels_purer(name, needs, tmp_path):
    pytest.importorskip(needs)
    after = """
from gini_loss import FeatureTap, GiniKLLoss
model.eval().cpu()
with FeatureTap(model, "3") as tap, torch.no_grad():
    hits = (model(x).argmax(1) == y).float().mean()
    print("measured", float(hits), float(GiniKLLoss().terms(tap.pop(), y)[0]))
"""
    (tmp_path / "block.py").write_text(TABS[name] + after, encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    hits, gini = map(float, re.search(r"measured (\S+) (\S+)", done.stdout).groups())
    assert hits > 0.95 and gini < 0.2  # without the terms about 0.55


def test_the_bar_of_the_site_has_the_version_and_the_changelog():
    bar = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    assert f'text: "{cfg["version"]}"' in bar and "CHANGELOG.md" in bar


def test_the_themes_load_nothing_from_elsewhere():
    for path in NBS.glob("*.scss"):
        assert not re.search(r"@import|url\(|https?:", path.read_text(encoding="utf-8")), path.name
    assert "$web-font-path: false" in (NBS / "theme.scss").read_text(encoding="utf-8")
    assert "src=\"http" not in (NBS / "page.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- page.html in a browser

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>main pre, main table {{ overflow-x: auto; display: block; }} main {{ max-width: 800px; }}</style>
<body class="quarto-light"><div id="TOC"><ul><li><a href="#a" id="toc-a" class="nav-link">A</a></li><li><a href="#b">B</a></li>
<li><a href="#c">C</a></li></ul></div><main><header id="title-block-header"><h1>Title</h1></header>
<figure><img src="figure.png" alt="a figure"></figure>{drawing}<figure><img src="photo.png" alt="a photograph"></figure>
<table><tr>{cells}</tr></table>
<table id="arguments"><tr><th>argument</th><th>type</th></tr><tr><td>x</td><td>a tensor with a row for each image of a batch</td></tr></table></main>{page}</body></html>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def draw(path):
    "Two panels with one scale: the second one has no numbers of its own"
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 11, "svg.hashsalt": "site"}):
        fig, axs = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
        for ax, color in zip(axs, ("black", "#1f77b4"), strict=True):
            ax.plot([0, 1, 2], [5, 7, 6], color=color)
            ax.set(xlabel="epoch", title="a panel")
        axs[0].set(ylabel="points")
        fig.suptitle("What both panels show")
        fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


@pytest.fixture
def page(browser, set_width, tmp_path, request):
    """A page as the site has it, with a plot, a photograph and a wide table, from a server on this machine; the
    parameter is its width, and it then has a drawing with two panels as well"""
    Image = pytest.importorskip("PIL.Image")
    width = getattr(request, "param", None)
    if width:
        draw(tmp_path / "drawing.svg")
    plot = Image.new("RGB", (200, 100), "white")
    plot.paste((0, 0, 0), (0, 0, 20, 100))  # ink
    plot.paste((68, 1, 84), (30, 0, 50, 100))  # the dark end of a heat map
    plot.paste((44, 160, 44), (60, 0, 80, 100))  # the colour of a loss
    plot.save(tmp_path / "figure.png")
    Image.effect_noise((200, 100), 90).convert("RGB").save(tmp_path / "photo.png")
    cells = "".join(f"<td>{'wide ' * 3}{k}</td>" for k in range(30))
    (tmp_path / "page.html").write_text(
        PAGE.format(
            cells=cells,
            page=(NBS / "page.html").read_text(encoding="utf-8"),
            drawing='<figure><img src="drawing.svg" style="max-width: 100%" alt="a drawing"></figure>' if width else "",
        ),
        encoding="utf-8",
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_width(width or 1000)
    browser.get(f"http://127.0.0.1:{server.server_port}/page.html")
    yield browser
    server.shutdown()


PIXEL = """const image = document.querySelector(arguments[0]), done = arguments[arguments.length - 1]
image.decode().then(() => {
  const canvas = document.createElement("canvas"); canvas.width = 200; canvas.height = 100
  const context = canvas.getContext("2d"); context.drawImage(image, 0, 0, 200, 100)
  done(arguments[1].map(x => [...context.getImageData(x, 50, 1, 1).data].slice(0, 3)))
})"""


def pixels(browser, image, places):
    return browser.execute_async_script(PIXEL, f"img[alt='{image}']", places)


def test_a_figure_follows_the_colour_scheme_and_keeps_its_colours(page):
    places = [10, 40, 70, 150]  # ink, heat map, loss, ground
    light = pixels(page, "a figure", places)
    page.execute_script("document.body.className = 'quarto-dark'")
    ink, heat, loss, ground = pixels(page, "a figure", places)
    assert ink == [255, 255, 255] and ground == [34, 34, 34] and heat == [68, 1, 84] and loss == [44, 160, 44]
    page.execute_script("document.body.className = 'quarto-light'")
    assert pixels(page, "a figure", places) == light


def test_a_photograph_stays_as_it_is(page):
    before = pixels(page, "a photograph", [10, 90])
    page.execute_script("document.body.className = 'quarto-dark'")
    assert pixels(page, "a photograph", [10, 90]) == before


FIGURES = """const done = arguments[arguments.length - 1], frame = () => new Promise(r => setTimeout(r, 300))
Promise.all(figures.map(f => f.start())).then(frame).then(() => done(figures.filter(f => f.svg).map(f => ({
  whole: f.image.hidden ? 0 : f.image.clientWidth / f.width * f.letter,
  panels: f.stack && !f.stack.hidden ? f.pieces.map((image, k) => ({ words: f.panels[k].words,
    letter: image.clientWidth / (f.panels[k].box.width + 8) * f.letter, x: image.offsetLeft, y: image.offsetTop,
    numbers: f.panels[k].borrowed.length})) : [],
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth}))))"""


@pytest.mark.parametrize("page", [390], indirect=True)
def test_panels_stand_below_each_other_on_a_phone_and_can_be_read(page):
    (drawing,) = page.execute_async_script(FIGURES)
    title, first, second = drawing["panels"]
    assert title["words"] == "What both panels show"  # text, which wraps
    assert drawing["whole"] == 0 and drawing["over"] <= 0
    assert first["x"] == second["x"] and first["y"] < second["y"]
    assert min(first["letter"], second["letter"]) >= 10.9  # pixels
    assert (first["numbers"], second["numbers"]) == (0, 1)  # the scale that both share stands at each


@pytest.mark.parametrize("page", [1000], indirect=True)
def test_panels_stand_side_by_side_where_there_is_room(page):
    (drawing,) = page.execute_async_script(FIGURES)
    assert drawing["whole"] >= 10.9 and not drawing["panels"]


SOURCE = """const done = arguments[arguments.length - 1], image = document.querySelector("img[alt='a drawing']")
setTimeout(() => fetch(image.src).then(answer => answer.text()).then(done), 600)"""


@pytest.mark.parametrize("page", [1000], indirect=True)
def test_a_drawing_in_the_dark_scheme_stays_one(page):
    light = page.execute_async_script(SOURCE)
    page.execute_script("document.body.className = 'quarto-dark'")
    dark = page.execute_async_script(SOURCE)
    assert "<svg" in dark and "#ffffff" in light and "#222222" in dark  # the ground
    assert "#1f77b4" in light and "#1f77b4" in dark  # a colour with a meaning
    page.execute_script("document.body.className = 'quarto-light'")
    assert page.execute_async_script(SOURCE) == light


def test_a_page_has_its_contents_under_the_title(page):
    box = page.find_element("css selector", "header + details.contents")
    assert box.find_element("tag name", "summary").text == "On this page"
    assert [a.get_attribute("href").split("#")[1] for a in box.find_elements("tag name", "a")] == ["a", "b", "c"]
    assert not box.find_elements("css selector", "[id]")  # a second element with the same id would break links


def test_a_wide_table_says_that_it_scrolls_and_takes_the_keyboard(page):
    table = page.find_element("tag name", "table")
    page.execute_script("fit()")
    assert table.get_attribute("tabindex") == "0"
    assert "scrolls sideways" in page.find_element("css selector", "table + .scrolls-hint").text


def test_a_table_of_arguments_is_marked_for_phones(page):
    assert page.find_element("id", "arguments").get_attribute("class") == "arguments"
    assert "arguments" not in (page.find_element("tag name", "table").get_attribute("class") or "")
    assert [td.text[:1] for td in page.find_elements("css selector", "#arguments td.words")] == ["a"]


@pytest.mark.parametrize("key", ["\ue007", " "], ids=["Enter", "Space"])
def test_a_figure_enlarges_and_closes_with_the_keyboard(page, key):
    page.find_element("css selector", "img[alt='a figure']").send_keys(key)
    dialog = page.find_element("css selector", "dialog.enlarged[open]")
    assert dialog.get_attribute("aria-label") == "a figure"
    page.switch_to.active_element.send_keys("\ue00c")
    page.execute_script("document.querySelector('dialog')?.close()")
    assert not page.find_elements("css selector", "dialog[open]")


# ---------------------------------------------------------------- tidy.lua, by pandoc

DERIVED = r"""
## Equation 1

$$a = b \tag{1}$$

In words.

### name

[source](https://github.com)

``` python
name(x)
```

What it does.

::: {.cell}
``` {.python .cell-code code-fold="true"}
def name(x): return x
```
:::

::: {.cell}
``` {.python .cell-code}
name(1)
```
:::

After it.
"""
PICTURE = """
::: {.cell}
``` {.python .cell-code}
fig, ax = plt.subplots()
ax.plot(x)
ax.set(title="t")
ax.legend()
fig
```

![](a.svg)
:::
"""


@pytest.fixture
def tidy(tmp_path):
    "Markdown as the filter leaves it, as pandoc's own tree and as HTML"
    pandoc = shutil.which("pandoc")
    if pandoc is None:
        pytest.skip("pandoc is not installed")

    def run(markdown, to="html"):
        done = subprocess.run(
            [pandoc, "-f", "markdown", "-t", to, "--mathjax", "--lua-filter", str(NBS / "tidy.lua")],
            input=markdown,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_link_within_the_site_does_not_leave_it(tidy):
    assert '<a href="a.html#b">' in tidy("[b](https://someone.github.io/gini_loss/a.html#b)")


def test_a_link_to_a_method_leads_to_its_class(tidy):
    html = tidy("[`A.b`](https://someone.github.io/gini_loss/a.html#a.b) [there](a.html#in-fig.-1)")
    assert re.findall(r'href="([^"]+)"', html) == ["a.html#a", "a.html#in-fig.-1"]


def test_a_link_of_a_name_that_was_linked_before_keeps_the_name_alone(tidy):
    html = tidy("[[`pull`](https://someone.github.io/gini_loss/a.html#pull)](b.html)")
    assert html.strip() == '<p><a href="b.html"><code>pull</code></a></p>'


def test_bars_in_code_have_no_backslash_in_a_table(tidy):
    assert "<code>int | None</code>" in tidy("| argument | type |\n|---|---|\n| `x` | `int \\| None` |\n")


def test_an_equation_stands_beside_the_code_below_it_and_the_entry_moves_down(tidy):
    html = tidy(DERIVED)
    order = [
        'class="side-by-side"',
        'class="words"',
        r"\tag{1}",
        "In words.",
        "def",
        "(1)",
        "<h3",
        "What it does",
        "After it",
    ]
    plain = re.sub(r"<span[^>]*>|</span>", "", html.replace('<span class="math display">', ""))
    places = [plain.index(part) for part in order]
    assert places == sorted(places)
    assert "code-fold=&quot;show" in html or 'code-fold="show"' in html


def test_code_that_draws_by_hand_is_folded(tidy):
    assert 'code-fold="true"' in tidy(PICTURE)
    assert "code-fold" not in tidy(PICTURE.replace("subplots", "other").replace("ax.", "b."))


# ---------------------------------------------------------------- after_render.lua, by pandoc

RENDERED = """<link href="dark.css" class="quarto-color-scheme quarto-color-alternate" id="quarto-bootstrap">
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-c3" crossorigin></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" integrity="sha384-ZvpUoO"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script>
<script src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml-full.js" type="text/javascript"></script>
"""


@pytest.fixture
def after_render(tmp_path):
    "Runs the script on a rendered page and an index of the search, and returns both"
    pandoc = shutil.which("pandoc")
    if pandoc is None:
        pytest.skip("pandoc is not installed")

    def run(page, index=None):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        if index is not None:
            (tmp_path / "search.json").write_text(json.dumps(index), encoding="utf-8")
        env = {**os.environ, "QUARTO_PROJECT_OUTPUT_FILES": "page.html\n", "QUARTO_PROJECT_OUTPUT_DIR": str(tmp_path)}
        done = subprocess.run(
            [pandoc, "--lua-filter", str(NBS / "after_render.lua")], input="", env=env, cwd=tmp_path, text=True
        )
        assert done.returncode == 0
        found = None if index is None else json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
        return (tmp_path / "page.html").read_text(encoding="utf-8"), found

    return run


def test_a_page_loads_no_script_from_elsewhere_but_for_maths(after_render):
    page, _ = after_render(RENDERED)
    assert re.findall(r'src="https://([^/]+)', page) == ["cdn.jsdelivr.net"] and "define(" not in page
    assert 'media="(scripting: enabled)" class="quarto-color-scheme quarto-color-alternate" id' in page


def test_the_search_finds_the_entry_of_a_name_first(after_render):
    version = (
        subprocess.run(["pandoc", "--version"], capture_output=True, text=True).stdout if shutil.which("pandoc") else ""
    )
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 1, 1):
        pytest.skip("this pandoc has no pandoc.json")
    pages = ["tap.html", "api.html#x", "api_train.html#x", "api_tap.html#x", "api_losses.html", "index.html"]
    _, found = after_render("", [{"href": href, "text": "x"} for href in pages])
    expected = ["api_tap.html#x", "api_losses.html", "api.html#x", "api_train.html#x", "tap.html", "index.html"]
    assert [entry["href"] for entry in found] == expected


# ---------------------------------------------------------------- the API's pages


def test_every_public_name_has_an_entry_with_its_own_heading():
    from gini_loss.api import is_described, public_modules

    for module in public_modules():
        page = NBS / f"60_api_{module.__name__.split('.')[1]}.ipynb"
        sources = ["".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"]]
        headings = [found for s in sources for found in re.findall(r"^## (?!Constants$)(\w+)$", s, re.M)]
        entries = [name for s in sources for name in re.findall(r"^show_doc\(\w+\.(\w+), title_level=0\)$", s, re.M)]
        wanted = [name for name in module.__all__ if is_described(getattr(module, name))]
        assert headings == entries == wanted, f"{page.name}: run `python .ci/api.py`"


def test_a_page_that_a_script_writes_is_left_alone_by_nbdev_clean(tmp_path, monkeypatch):
    clean = pytest.importorskip("nbdev.clean")
    monkeypatch.syspath_prepend(ROOT / ".ci")
    from common import as_json

    source = json.loads((NBS / "60_api_extras.ipynb").read_text(encoding="utf-8"))
    page = {name: source[name] for name in sorted(source, reverse=True)}
    page["cells"] = [{name: cell[name] for name in sorted(cell, reverse=True)} for cell in source["cells"]]
    path = tmp_path / "page.ipynb"
    path.write_text(as_json(page), encoding="utf-8")
    clean.process_write(False, clean.clean_nb, path, path)
    assert path.read_text(encoding="utf-8") == as_json(page)


def test_signatures_are_real_and_no_column_is_without_a_heading():
    from gini_loss.api import Entry, is_described, public_modules

    for module in public_modules():
        for name in module.__all__:
            symbol = getattr(module, name)
            if not is_described(symbol):
                continue
            entry = Entry(symbol)._repr_markdown_()
            assert "__main__" not in entry and "(*args, **kwargs)" not in entry and "torch.nn.modules" not in entry, (
                name
            )
            for table in re.findall(r"^(\|.*\|)\n\|---", entry, re.M):
                assert "|  |" not in table and "| |" not in table, name


def test_an_entry_links_to_the_line_of_its_source():
    from gini_loss import losses
    from gini_loss.api import Entry

    line = int(re.search(r"/losses\.py#L(\d+)", Entry(losses.GiniKLLoss)._repr_markdown_()).group(1))
    source = Path(losses.__file__).read_text(encoding="utf-8").splitlines()
    assert source[line - 1].startswith("class GiniKLLoss")


def test_pages_fold_exported_source_by_a_processor_of_their_own():
    assert (
        "add_fold" in cfg["skip_procs"]
        and cfg["procs"] == "gini_loss.api:fold_exports"
        and cfg["renderer"] == "gini_loss.api.Entry"
    )
