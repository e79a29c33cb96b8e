"Looking at a layer leaves the model as it was; figures show names as they are given"

import warnings
import pytest, torch
from torch import nn
from gini_loss.losses import class_means, class_probs, diagnostics
from gini_loss.models import resnet18
from gini_loss.plots import LOSS_COLORS, LOSS_NAMES, as_text, inspect_layer, layer_diagnostics

pytest.importorskip('matplotlib')
import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from gini_loss.plots import plot_class_probs, plot_histograms, plot_impurity, plot_runs, use_theme

Y = torch.tensor([0, 1, 0, 2, 1, 2])


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


@pytest.fixture
def net():
    return resnet18(3, width=2)


@pytest.fixture
def d():
    return diagnostics(torch.rand(30, 8), torch.arange(30) % 3, 3)


# --- inspect_layer


def test_values(net):
    x = torch.rand(6, 3, 8, 8)
    seen = inspect_layer(net, [(x[:4], Y[:4]), (x[4:], Y[4:])])
    net.eval()
    with torch.no_grad():
        net_to_layer4 = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3, net.layer4)
        M, logits = net_to_layer4(x).mean((2, 3)), net(x)
    torch.testing.assert_close(seen.features, M)
    torch.testing.assert_close(seen.logits, logits)
    torch.testing.assert_close(seen.diagnostics.probs, class_probs(class_means(M, Y)))
    assert torch.equal(seen.labels, Y) and torch.equal(seen.right, logits.argmax(1) == Y)
    assert layer_diagnostics(net, [(x, Y)]).gini == pytest.approx(seen.diagnostics.gini)


def test_histograms_give_no_warning(d):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bars = plot_histograms(dict(a=d, b=d)).patches
    assert [b.get_height() for b in bars] == pytest.approx(2 * d.feature_histogram.tolist())
    assert bars[0].get_x() == pytest.approx(-0.4) and bars[5].get_x() == pytest.approx(2)


def test_frozen_batchnorm_stays_frozen(net):
    net.train()
    net.bn1.eval()
    net.layer2[0].bn1.eval()
    inspect_layer(net, [(torch.rand(6, 3, 8, 8), Y)])
    assert net.training and not net.bn1.training and not net.layer2[0].bn1.training and net.layer1.training
    with pytest.raises(TypeError):
        inspect_layer(net, [(torch.rand(6, 3, 8, 8).bool(), Y)])
    assert net.training and not net.bn1.training and net.layer1.training


def test_batch_statistics_are_not_touched(net):
    before = {k: v.clone() for k, v in net.train().state_dict().items()}
    inspect_layer(net, [(torch.rand(6, 3, 8, 8), Y)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_some_batches_and_none(net):
    batches = [(torch.rand(2, 3, 8, 8), Y[i : i + 2]) for i in (0, 2, 4)]
    assert len(inspect_layer(net, batches, n_batches=2).labels) == 4
    with pytest.raises(ValueError, match='is empty'):
        inspect_layer(net, [])
    with pytest.raises(ValueError, match='no labels'):
        inspect_layer(net, [torch.rand(2, 3, 8, 8)])


def test_targets_that_are_no_labels_and_models_without_logits():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    seen = inspect_layer(body, [(torch.rand(6, 3, 8, 8), torch.rand(6, 4))], '1')
    assert seen.diagnostics.probs.shape == (5, 4) and seen.logits is None
    with pytest.raises(ValueError, match='no logits'):
        _ = seen.right
    with_column = inspect_layer(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), [(torch.rand(6, 4), Y)], '0')
    assert with_column.right.shape == (6,)
    one_hot = inspect_layer(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), [(torch.rand(6, 4), torch.eye(3)[Y])], '0')
    with pytest.raises(ValueError, match=r'labels of 6 images have shape \(6, 3\)'):
        _ = one_hot.right


# --- names

NAMES = ['$x_1', '_under', 'a$b$c\\frac{']


def texts(ax):
    legend = ax.get_legend()
    return [t.get_text() for t in [*ax.get_xticklabels(), *(legend.get_texts() if legend else ())]]


@pytest.mark.parametrize('bad', ['$', '$x_1$', '\\frac{$', 'caf\udce9', 'a\nb', '', '$$'])
def test_any_name_can_be_drawn(d, bad):
    names = [bad, 'b', 'c']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for ax in (plot_class_probs(d, names), plot_histograms({bad: d, 'other': d}, names), plot_impurity({bad: d})):
            ax.set_title(as_text(bad))
            ax.figure.canvas.draw()


def test_names_are_shown_as_they_are(d):
    shown = texts(plot_histograms({'_first': d, '$second$': d}, NAMES))
    assert any(t.startswith('_first: KL') for t in shown), "matplotlib leaves out what begins with an underscore"
    assert any(t.startswith('\\$second\\$') for t in shown) and '\\$x_1' in shown and '_under' in shown
    assert as_text('plain_name') == 'plain_name' and as_text(3) == '3' and as_text('$5') == '\\$5'


def test_names_of_losses_and_metrics(d):
    pd = pytest.importorskip('pandas')
    runs = pd.DataFrame([dict(loss=loss, seed=s, my_metric=s) for loss in ('ce', 'both', '$odd_') for s in (0, 1)])
    ax = plot_runs(runs, 'my_metric', percent=False)
    ax.figure.canvas.draw()
    assert texts(ax) == ['cross-entropy', '+ Gini + KL', '\\$odd_'] and ax.get_ylabel() == 'my metric'


# --- the theme


def contrast(color, ground):
    def luminance(c):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in matplotlib.colors.to_rgb(c)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(color), luminance(ground)))
    return (b + 0.05) / (a + 0.05)


def test_colours_can_be_seen_on_white_and_on_the_dark_page():
    for name, color in LOSS_COLORS.items():
        assert contrast(color, '#ffffff') >= 3 and contrast(color, '#222222') >= 3, name
    assert set(LOSS_COLORS) == set(LOSS_NAMES) and len(set(LOSS_COLORS.values())) == len(LOSS_COLORS)
    assert list(LOSS_COLORS)[:4] == ['ce', 'gini', 'kl', 'both']


def test_theme():
    with matplotlib.rc_context():
        use_theme()
        assert not plt.rcParams['axes.spines.top'] and plt.rcParams['font.size'] == 11
        assert plt.rcParams['figure.figsize'][0] <= 4.9, "letters of 11 points stay 11 pixels high on a phone"


def test_looking_needs_no_matplotlib():
    import subprocess, sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'seaborn', 'pandas']))\n"
        "import torch; from gini_loss.plots import inspect_layer, plot_impurity\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))\n"
        "s = inspect_layer(net, [(torch.rand(4, 2), torch.arange(4) % 2)])\n"
        "try: plot_impurity(s.diagnostics)\nexcept ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert "gini_loss[plots]" in done.stdout, done.stderr
