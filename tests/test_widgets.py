"""The figures to drag, in a real Chromium: their numbers are the package's, and mouse, keyboard and touch move them.

Skipped where there is no Chromium with its driver, or no selenium.
"""

import re

import pytest
import torch

from gini_loss.losses import (
    class_means,
    class_probs,
    feature_histogram,
    gini_impurity,
    gini_loss,
    kl_loss,
    label_histogram,
)
from gini_loss.widgets import figure_html, script_path

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<body style="margin:10px;font-family:sans-serif;{style}">{figures}</body></html>"""
DARK = "background:#222;color:#f0f0f0"


@pytest.fixture
def show(browser, set_width, tmp_path):
    "Opens a page with figures; with a width in pixels, as a phone that has touch"

    def open_page(*names, style="", width=None):
        page = tmp_path / "page.html"
        page.write_text(PAGE.format(style=style, figures="\n".join(map(figure_html, names))), encoding="utf-8")
        set_width(width or 1000)
        browser.get(page.as_uri())
        return browser

    return open_page


def close(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs.detach().double(), atol=1e-6, rtol=1e-6)


def random_states(count):
    "Batches with dead channels, zeros, absent classes, both directions, with and without a prior"
    g = torch.Generator().manual_seed(0)
    pick = lambda low, high: int(torch.randint(low, high, (), generator=g))
    for k in range(count):
        m, c, n = pick(2, 9), pick(1, 7), pick(2, 6)
        M = torch.rand(m, c, generator=g, dtype=torch.float64) * 6
        if k % 3 == 0:
            M[torch.rand(m, c, generator=g) < 0.3] = 0
        if k % 7 == 0:
            M[:, 0] = 0
        y = torch.randint(0, n, (m,), generator=g)
        prior = torch.rand(n, generator=g, dtype=torch.float64) + 0.1 if k % 4 == 0 else None
        yield M, y, n, bool(k % 2), None if prior is None else prior / prior.sum()


def test_numbers_of_the_script_are_those_of_the_package(show):
    browser, states = show("toy-batch"), list(random_states(200))
    sent = [
        dict(
            M=M.tolist(),
            y=y.tolist(),
            n=n,
            options=dict(reverse=reverse, prior=None if prior is None else prior.tolist()),
        )
        for M, y, n, reverse, prior in states
    ]
    found = browser.execute_script(
        "return arguments[0].map(s => giniLoss.numbers.measure(s.M, s.y, s.n, s.options))", sent
    )
    for (M, y, n, reverse, prior), there in zip(states, found, strict=True):
        M = M.requires_grad_()
        S = class_means(M, y, n)
        P = class_probs(S)
        gini, kl = gini_loss(M, y), kl_loss(M, y, reverse=reverse, class_prior=prior)
        close(there["S"], S)
        close(there["P"], P)
        close(there["impurities"], gini_impurity(P))
        close(there["HS"], feature_histogram(P))
        if prior is None:
            close(there["HY"], label_histogram(y, n))
        close(there["gini"], gini)
        close(there["kl"], kl)
        fires = M.detach() > 0  # at zero the package's absolute value has no slope
        for name, term in (("gradGini", gini), ("gradKL", kl)):
            (grad,) = torch.autograd.grad(term, M, retain_graph=True)
            close(torch.tensor(there[name], dtype=torch.float64)[fires].tolist(), grad[fires])


def test_a_step_in_the_triangle_follows_the_gradient_of_both_terms(show):
    g = torch.Generator().manual_seed(1)
    states = [
        (
            torch.rand(3, 3, generator=g, dtype=torch.float64) + 0.05,
            torch.rand(2, generator=g, dtype=torch.float64),
            bool(k % 2),
        )
        for k in range(200)
    ]
    states = [(S / S.sum(1, keepdim=True), weights, reverse) for S, weights, reverse in states]
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    sent = [dict(P=S.tolist(), lambda1=float(w[0]), lambda2=float(w[1]), reverse=reverse) for S, w, reverse in states]
    found = show("triangle").execute_script(
        "return arguments[0].map(s => giniLoss.numbers.channelPull(s.P, arguments[1], arguments[1], s))",
        sent,
        prior.tolist(),
    )
    for (S, (lambda_gini, lambda_kl), reverse), there in zip(states, found, strict=True):
        M, y = S.T.clone().requires_grad_(), torch.arange(3)  # one image a class: M is S, transposed
        total = lambda_gini * gini_loss(M, y) + lambda_kl * kl_loss(M, y, reverse=reverse, class_prior=prior)
        (grad,) = torch.autograd.grad(total, M)
        close(there["both"], -grad[:, 0])
        close([a + b for a, b in zip(there["gini"], there["kl"])], -grad[:, 0])


def test_the_toy_batch_opens_with_the_numbers_of_the_derivation(show):
    browser = show("toy-batch")
    result = browser.execute_script("return document.querySelector('[data-gini]').gini.result")
    assert result["gini"] == pytest.approx(1 / 6) and result["kl"] == pytest.approx(0)
    text = browser.find_element("css selector", "[data-gini]").text
    assert "0.1667" in text and "3.00, 0.00" in text and "Where scripts run" not in text


def test_keyboard_changes_an_activation_and_every_number_with_it(show):
    browser = show("toy-batch")
    cell = browser.find_element("css selector", "input[aria-label='image 2, channel 2']")
    cell.send_keys("\ue011")  # Home: down to zero
    browser.find_element("css selector", "input[aria-label='image 3, channel 2']").send_keys("\ue011")
    result = browser.execute_script("return document.querySelector('[data-gini]').gini.result")
    assert result["gini"] == pytest.approx(0) and result["P"][2] == pytest.approx([1, 0])
    assert result["kl"] == pytest.approx(
        float(kl_loss(torch.tensor([[4.0, 0, 1], [2, 0, 1], [0, 3, 0], [0, 1, 0]]), torch.tensor([0, 0, 1, 1])))
    )


def test_keyboard_moves_the_channel_and_its_words(show):
    browser = show("triangle")
    dot = browser.find_element("css selector", "[data-dot='0']")
    before = dot.get_attribute("aria-valuetext")
    dot.send_keys("\ue014" * 5)  # five times to the right, towards class 1
    row = browser.execute_script("return document.querySelector('[data-gini]').gini.state.row")
    assert row[1] > 0.37 and sum(row) == pytest.approx(1)
    assert dot.get_attribute("aria-valuetext") != before


def test_the_path_leads_where_repeated_steps_lead(show):
    browser = show("triangle")
    path = torch.tensor(
        browser.execute_script("return document.querySelector('[data-gini]').gini.result.path"), dtype=torch.float64
    )
    S, prior = (
        torch.tensor([[0.4, 0.35, 0.25], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    for _ in range(len(path) - 1):
        M = S.T.clone().requires_grad_()
        total = 0.5 * gini_loss(M, torch.arange(3)) + 0.5 * kl_loss(M, torch.arange(3), class_prior=prior)
        (grad,) = torch.autograd.grad(total, M)
        row = (S[0] - 0.25 * grad[:, 0]).clamp(min=0)
        S[0] = row / row.sum()
    torch.testing.assert_close(path[-1], S[0], atol=1e-4, rtol=0)
    assert path[-1][2] > 0.9  # the class that no other channel stands for


def test_labels_of_a_batch_make_the_path_tremble_and_a_seed_repeats_it(show):
    browser = show("triangle")
    browser.execute_script("document.querySelector('[data-gini]').gini.set({batch: true, m: 6, seed: 3})")
    path = lambda: browser.execute_script("return document.querySelector('[data-gini]').gini.result.path.slice(0, 30)")
    first = path()
    browser.execute_script("document.querySelector('[data-gini]').gini.set({seed: 3})")
    assert path() == first
    browser.execute_script("document.querySelector('[data-gini]').gini.set({seed: 4})")
    assert path() != first


def touch(browser, start, end):
    send = lambda kind, points: browser.execute_cdp_cmd("Input.dispatchTouchEvent", dict(type=kind, touchPoints=points))
    send("touchStart", [dict(x=start[0], y=start[1])])
    for part in (0.25, 0.5, 0.75, 1):
        send("touchMove", [dict(x=start[0] + part * (end[0] - start[0]), y=start[1] + part * (end[1] - start[1]))])
    send("touchEnd", [])


def middle(browser, selector):
    return browser.execute_script(
        """const node = document.querySelector(arguments[0]); node.scrollIntoView({block: "center"})
        const box = node.getBoundingClientRect(); return [box.x + box.width/2, box.y + box.height/2, box.width]""",
        selector,
    )


def test_touch_drags_an_activation_and_a_channel_on_a_phone(show):
    browser = show("toy-batch", "triangle", width=390)
    x, y, width = middle(browser, "input[aria-label='image 0, channel 1']")
    touch(browser, (x - width / 2 + 6, y), (x + width / 4, y))
    assert browser.execute_script("return document.querySelector('[data-gini=toy-batch]').gini.state.M[0][1]") > 3
    x, y, _ = middle(browser, "[data-dot='0']")
    touch(browser, (x, y), (x, y - 80))
    row = browser.execute_script("return document.querySelector('[data-gini=triangle]').gini.state.row")
    assert row[2] > 0.45


@pytest.mark.parametrize("width", [390, 1000])
def test_figures_fit_a_page_and_stand_out_in_both_schemes(show, width):
    for style, ink in (("", "rgb(0, 0, 0)"), (DARK, "rgb(240, 240, 240)")):
        browser = show("toy-batch", "triangle", style=style, width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert (
            browser.execute_script("return getComputedStyle(document.querySelector('.gini-widget svg text')).fontSize")
            == "14px"
        )
        assert (
            browser.execute_script("return getComputedStyle(document.querySelector('.gini-widget caption')).color")
            == ink
        )


def test_two_outputs_on_one_page_draw_each_figure_once(show):
    browser = show("toy-batch", "toy-batch", "triangle")
    counts = browser.execute_script(
        "return [...document.querySelectorAll('[data-gini]')].map(node => node.querySelectorAll('.gw-columns').length)"
    )
    assert counts == [1, 1, 1]


def test_a_figure_is_one_html_output_that_loads_nothing():
    from gini_loss.widgets import toy_batch, triangle

    for html in (toy_batch().data, triangle().data):
        assert html.count("\n<script>\n") == 1 and html.index("</div>") < html.index("<script>")
        assert html.count("</script>") == 1 and "src=" not in html and "import(" not in html and "fetch(" not in html
    assert script_path().stat().st_size < 30_000
    with pytest.raises(ValueError, match="toy-batch"):
        figure_html("pie")


def test_without_scripts_the_toy_batch_is_a_table_of_the_same_numbers():
    html = figure_html("toy-batch").split("<script>")[0]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    numbers = lambda k: torch.tensor([[float(v) for v in row[k].split(",")] for row in rows])
    M, y = torch.tensor([[4.0, 0, 1], [2, 0, 1], [0, 3, 1], [0, 1, 1]]), torch.tensor([0, 0, 1, 1])
    S = class_means(M, y)
    assert torch.equal(numbers(1), S) and torch.equal(numbers(2), class_probs(S))
    assert torch.equal(numbers(3).flatten(), gini_impurity(class_probs(S)))
    assert f"Gini loss {gini_loss(M, y):.4f}, KL loss {kl_loss(M, y):.4f}" in html
    assert "<svg" in figure_html("triangle").split("<script>")[0]
