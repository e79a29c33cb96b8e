"""What the callback is told, and what it says to that. Its meaning inside training loops is checked in test_robustness.py."""
import copy, warnings

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip('fastai', reason="the callback needs fastai")
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # gives Learner.no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from gini_loss.callback import GiniLossCallback

X, Y = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4

class Pairs(list):
    def new_empty(self): return Pairs()

def get_learner(*cbs, net=None):
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    dl = DataLoader(Pairs(zip(X, Y)), bs=16, num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.c = 4
    return Learner(dls, net, loss_func=nn.functional.cross_entropy, cbs=list(cbs))

def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn.recorder.metric_names

@pytest.fixture
def loud():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.filterwarnings('error', message='GiniLossCallback')
        yield

def test_no_layer_at_all():
    with pytest.raises(ValueError, match="names no layer"): GiniLossCallback([])

@pytest.mark.parametrize('layers', [['1', '1'], ['1', nn.ReLU]])
def test_a_layer_named_twice(layers):
    learn = get_learner()
    learn.add_cb(GiniLossCallback([learn.model[1] if o is nn.ReLU else o for o in layers], start_epoch=0))
    with pytest.raises(ValueError, match="layer '1' is named twice"): fit(learn)
    assert not learn.model[1]._forward_hooks

def test_two_callbacks_have_columns_of_their_own_and_no_layer_in_common(loud):
    names = fit(get_learner(GiniLossCallback('1', start_epoch=0), GiniLossCallback('3', .1, .2, start_epoch=0)))
    assert {'train_gini_1', 'train_kl_1', 'train_gini_3', 'train_kl_3'} <= set(names) and len(set(names)) == len(names)
    with pytest.raises(ValueError, match="layer '3' is named twice"): fit(get_learner(GiniLossCallback('3', start_epoch=0), GiniLossCallback(start_epoch=0)))

def test_two_callbacks_train_like_one_with_two_layers():
    one, two = get_learner(GiniLossCallback(['1', '3'], [.5, .1], [.5, .2], start_epoch=0)), get_learner(GiniLossCallback('1', start_epoch=0), GiniLossCallback('3', .1, .2, start_epoch=0))
    fit(one), fit(two)
    for a, b in zip(one.model.parameters(), two.model.parameters()): assert torch.allclose(a, b, atol=1e-6)

@pytest.mark.parametrize('start', [np.int64(0), np.int32(2), 1])
def test_whole_numbers_of_any_kind_start(start): assert GiniLossCallback(start_epoch=start).start_epoch == int(start)

@pytest.mark.parametrize('start', [True, -1, np.int64(-1), 1., '1', None])
def test_what_is_no_epoch(start):
    with pytest.raises(ValueError, match="start_epoch must be 0 or a positive integer"): GiniLossCallback(start_epoch=start)

def test_a_chosen_layer_that_does_not_run_asks_for_another():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.layer4, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        def forward(self, x): return self.fc(self.conv(x).mean((2, 3)))
    for layer, advice in ((None, True), ('layer4', False)):
        with pytest.raises(RuntimeError, match="layer 'layer4' did not run") as e: fit(get_learner(GiniLossCallback(layer, start_epoch=0), net=Net()))
        assert ("chosen as the last stage" in str(e.value)) == advice

@pytest.mark.parametrize('dim,layer', [(2, '3'), (-1, '3'), (3, '1'), (-2, '0')])
def test_a_channel_dim_that_the_layers_contradict_is_told(dim, layer):
    with pytest.warns(UserWarning, match=rf"layer '{layer}'.*channel_dim={dim} was given, but .* dimension 1 for the channels") as told: fit(get_learner(GiniLossCallback(layer, start_epoch=0, channel_dim=dim)), 2)
    assert sum('was given' in str(w.message) for w in told) == 1

@pytest.mark.parametrize('dim,layer', [(1, '3'), (-3, '3'), (None, '1'), (1, '5'), (-1, '5')])
def test_no_false_alarm_about_channel_dim(dim, layer, loud): fit(get_learner(GiniLossCallback(layer, start_epoch=0, channel_dim=dim)))

def test_no_false_alarm_where_nothing_tells(loud):
    class Odd(nn.Module):
        def forward(self, x): return x.reshape(len(x), 4, 12, 4)
    net = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(192, 4))
    fit(get_learner(GiniLossCallback('0', start_epoch=0, channel_dim=3), net=net))

@pytest.mark.parametrize('n', [-7, 0, 'x', 2.5, True])
def test_what_is_no_number_of_classes(n):
    with pytest.raises(ValueError, match="n_classes must be a positive integer"): GiniLossCallback(n_classes=n)

def test_the_number_of_classes_checks_labels():
    with pytest.raises(ValueError, match="layer '3': label 3 is not below n_classes=3"): fit(get_learner(GiniLossCallback(start_epoch=0, n_classes=np.int64(3))))

@pytest.mark.parametrize('dtype', [torch.int8, torch.int64])
@pytest.mark.parametrize('column', [True, False])
def test_labels_as_tabular_data_have_them(dtype, column):
    "In a column, and in a small type: what the loss functions of fastai accept"
    values = {}
    for name, y in (('plain', Y), ('as given', (Y[:, None] if column else Y).to(dtype))):
        learn = get_learner(GiniLossCallback(start_epoch=0))
        learn.dls = DataLoaders(*[DataLoader(Pairs(zip(X, y)), bs=16, num_workers=0)]*2); learn.dls.c = 4
        learn.loss_func = lambda pred, target: nn.functional.cross_entropy(pred, target.flatten().long())
        fit(learn)
        values[name] = learn.recorder.values[0]
    assert values['plain'] == values['as given']

class Fails(Callback):
    order = 60
    def before_fit(self): raise KeyboardInterrupt

@pytest.mark.parametrize('then', ['removed', 'kept'])
def test_an_error_of_another_callback_before_the_first_epoch(then):
    learn = get_learner(GiniLossCallback(start_epoch=0))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Fails())
    if then == 'removed': learn.remove_cb(GiniLossCallback)
    names = fit(learn)
    assert ('train_gini' in names) == (then == 'kept') and len(set(names)) == len(names)
    assert not learn.metrics and '_with_events' not in learn.__dict__ and not learn.model[3]._forward_hooks

def test_a_copy_made_within_a_fit_is_a_learner_like_any_other():
    class Copy(Callback):
        def after_epoch(self): self.kept = copy.deepcopy(self.learn)
    spy = Copy()
    learn = get_learner(GiniLossCallback(start_epoch=0), spy)
    fit(learn)
    twin = spy.kept
    with twin.no_bar(): values = twin.validate()
    assert len(values) == 1 and not twin.metrics and '_with_events' not in twin.__dict__
    assert fit(twin)[1:] == learn.recorder.metric_names[1:]
