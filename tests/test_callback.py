"""The arguments of the callback and its messages. Its effect in training loops is checked in test_robustness.py."""

import copy, warnings

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip('fastai', reason="the callback needs fastai")
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401 gives Learner.no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from gini_loss.callback import CompiledMeasure, GiniLossCallback, count_classes, labels_of, mixed_targets
from gini_loss.losses import GiniKLLoss, Measured, pull
from gini_loss.tap import FeatureTap
from tiny import Pairs

X, Y = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def get_learner(*cbs, net=None):
    torch.manual_seed(0)
    net = net or nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    dl = DataLoader(Pairs(zip(X, Y)), bs=16, num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.c = 4
    return Learner(dls, net, loss_func=nn.functional.cross_entropy, cbs=list(cbs))


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3)
    return learn.recorder.metric_names


@pytest.fixture
def loud():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.filterwarnings('error', message='GiniLossCallback')
        yield


def test_no_layer_at_all():
    with pytest.raises(ValueError, match="names no layer"):
        GiniLossCallback([])


@pytest.mark.parametrize('layers', [['1', '1'], ['1', nn.ReLU]])
def test_a_layer_named_twice(layers):
    learn = get_learner()
    learn.add_cb(GiniLossCallback([learn.model[1] if o is nn.ReLU else o for o in layers], start_epoch=0))
    with pytest.raises(ValueError, match="layer '1' is named twice"):
        fit(learn)
    assert not learn.model[1]._forward_hooks


def test_two_callbacks_have_columns_of_their_own_and_no_layer_in_common(loud):
    names = fit(get_learner(GiniLossCallback('1', start_epoch=0), GiniLossCallback('3', 0.1, 0.2, start_epoch=0)))
    assert {'train_gini_1', 'train_kl_1', 'train_gini_3', 'train_kl_3'} <= set(names) and len(set(names)) == len(names)
    with pytest.raises(ValueError, match="layer '3' is named twice"):
        fit(get_learner(GiniLossCallback('3', start_epoch=0), GiniLossCallback(start_epoch=0)))


def test_two_callbacks_train_like_one_with_two_layers():
    one, two = (
        get_learner(GiniLossCallback(['1', '3'], [0.5, 0.1], [0.5, 0.2], start_epoch=0)),
        get_learner(GiniLossCallback('1', start_epoch=0), GiniLossCallback('3', 0.1, 0.2, start_epoch=0)),
    )
    fit(one), fit(two)
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('start', [np.int64(0), np.int32(2), 1])
def test_whole_numbers_of_any_kind_start(start):
    assert GiniLossCallback(start_epoch=start).start_epoch == int(start)


@pytest.mark.parametrize('start', [True, -1, np.int64(-1), 1.0, '1', None])
def test_what_is_no_epoch(start):
    with pytest.raises(ValueError, match="start_epoch must be 0 or a positive integer"):
        GiniLossCallback(start_epoch=start)


def test_a_chosen_layer_that_does_not_run_asks_for_another():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer4, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    for layer, advice in ((None, True), ('layer4', False)):
        with pytest.raises(RuntimeError, match="layer 'layer4' did not run") as e:
            fit(get_learner(GiniLossCallback(layer, start_epoch=0), net=Net()))
        assert ("chosen as the last stage" in str(e.value)) == advice


@pytest.mark.parametrize('dim,layer', [(2, '3'), (-1, '3'), (3, '1'), (-2, '0')])
def test_a_channel_dim_that_the_layers_contradict_is_told(dim, layer):
    with pytest.warns(
        UserWarning, match=rf"layer '{layer}'.*channel_dim={dim} was given, but .* dimension 1 for the channels"
    ) as told:
        fit(get_learner(GiniLossCallback(layer, start_epoch=0, channel_dim=dim)), 2)
    assert sum('was given' in str(w.message) for w in told) == 1


@pytest.mark.parametrize('dim,layer', [(1, '3'), (-3, '3'), (None, '1'), (1, '5'), (-1, '5')])
def test_no_false_alarm_about_channel_dim(dim, layer, loud):
    fit(get_learner(GiniLossCallback(layer, start_epoch=0, channel_dim=dim)))


def test_no_false_alarm_where_nothing_tells(loud):
    class Odd(nn.Module):
        def forward(self, x):
            return x.reshape(len(x), 4, 12, 4)

    net = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(192, 4))
    fit(get_learner(GiniLossCallback('0', 0, 0, start_epoch=0, channel_dim=3), net=net))


@pytest.mark.parametrize('n', [-7, 0, 'x', 2.5, True])
def test_what_is_no_number_of_classes(n):
    with pytest.raises(ValueError, match="n_classes must be a positive integer"):
        GiniLossCallback(n_classes=n)


@pytest.mark.parametrize('dim', ['x', 0, 1.0])
def test_what_is_no_channel_dim(dim):
    with pytest.raises((TypeError, ValueError), match="channel_dim"):
        GiniLossCallback(channel_dim=dim)


def test_the_number_of_classes_checks_labels():
    with pytest.raises(ValueError, match="layer '3': label 3 is not below n_classes=3"):
        fit(get_learner(GiniLossCallback(start_epoch=0, n_classes=np.int64(3))))


@pytest.mark.parametrize('dtype', [torch.int8, torch.int64])
@pytest.mark.parametrize('column', [True, False])
def test_labels_as_tabular_data_have_them(dtype, column):
    "Labels in a column or of a small type, as fastai's loss functions accept them"
    values = {}
    for name, y in (('plain', Y), ('as given', (Y[:, None] if column else Y).to(dtype))):
        learn = get_learner(GiniLossCallback(start_epoch=0))
        learn.dls = DataLoaders(*[DataLoader(Pairs(zip(X, y)), bs=16, num_workers=0)] * 2)
        learn.dls.c = 4
        learn.loss_func = lambda pred, target: nn.functional.cross_entropy(pred, target.flatten().long())
        fit(learn)
        values[name] = learn.recorder.values[0]
    assert values['plain'] == values['as given']


class Fails(Callback):
    order = 60

    def before_fit(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize('then', ['removed', 'kept'])
def test_an_error_of_another_callback_before_the_first_epoch(then):
    learn = get_learner(GiniLossCallback(start_epoch=0))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Fails())
    if then == 'removed':
        learn.remove_cb(GiniLossCallback)
    names = fit(learn)
    assert ('train_gini' in names) == (then == 'kept') and len(set(names)) == len(names)
    assert not learn.metrics and '_with_events' not in learn.__dict__ and not learn.model[3]._forward_hooks


def test_a_copy_made_within_a_fit_is_a_learner_like_any_other():
    class Copy(Callback):
        def after_epoch(self):
            self.kept = copy.deepcopy(self.learn)

    spy = Copy()
    learn = get_learner(GiniLossCallback(start_epoch=0), spy)
    fit(learn)
    twin = spy.kept
    with twin.no_bar():
        values = twin.validate()
    assert len(values) == 1 and not twin.metrics and '_with_events' not in twin.__dict__
    assert fit(twin)[1:] == learn.recorder.metric_names[1:]


def test_one_callback_in_two_learners():
    "In the last one that it was given to it works; the other one could not train on its terms and says so"
    cb = GiniLossCallback(start_epoch=0)
    first = get_learner(cb)
    fit(first)
    second = get_learner(cb)
    for _ in range(2):
        assert 'train_gini' in fit(second)
        with pytest.raises(RuntimeError, match="make a GiniLossCallback for each Learner"):
            fit(first)
        assert len(first.validate()) == 1  # evaluation has no terms
    first.remove_cb(cb)
    assert 'train_gini' not in fit(first)


# ---- The columns ----


def row(learn, epoch=0):
    return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[epoch]))


@pytest.mark.parametrize('valid_metrics', [True, False])
def test_columns_beside_training_metrics(valid_metrics):
    "Recorder(train_metrics=True) names each metric twice; the terms are measured only in training and have one column"
    from fastai.metrics import accuracy

    learn = get_learner(GiniLossCallback(start_epoch=0, pull=True))
    learn.metrics = accuracy
    learn.recorder.train_metrics, learn.recorder.valid_metrics = True, valid_metrics
    names = fit(learn)
    assert names[-5:-1] == ['train_gini', 'train_kl', 'pull_gini', 'pull_kl'] and not any(
        'valid_train' in n for n in names
    )
    assert len(learn.recorder.values[0]) == len(names) - 2 and 0 < row(learn)['train_gini'] < 1


def test_the_callback_leaves_with_its_columns():
    learn = get_learner(GiniLossCallback(start_epoch=0))
    fit(learn)
    n = len(learn.cbs)
    learn.remove_cb(GiniLossCallback)
    assert 'train_gini' not in fit(learn) and not hasattr(learn, 'gini_loss') and len(learn.cbs) == n - 2
    learn.add_cb(GiniLossCallback(start_epoch=0))
    assert 'train_gini' in fit(learn) and len(learn.cbs) == n
    with learn.removed_cbs(learn.gini_loss):
        assert 'train_gini' not in fit(learn)


class ShownLosses(Callback):
    "The loss that is shown, the one that is differentiated, and cross-entropy, in each training batch"

    order = 5.5  # after the terms

    def __init__(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            plain = nn.functional.cross_entropy(self.pred, self.y)
            self.seen.append([o.item() for o in (self.learn.loss, self.learn.loss_grad, plain)])


def test_the_loss_that_is_shown_has_the_terms_that_are_differentiated():
    shown_losses = ShownLosses()
    fit(get_learner(GiniLossCallback(start_epoch=0), shown_losses))
    for shown, differentiated, plain in shown_losses.seen:
        assert shown == pytest.approx(differentiated) and shown > plain + 0.1


# ---- The pull ----


def by_hand(model, x, y, layer='3', **options):
    with FeatureTap(model, layer) as tap:
        loss = nn.functional.cross_entropy(model(x), y)
        A = tap.pop()
    p = pull(A, y, loss, **options)
    return p.gini / p.main, p.kl / p.main


def pulls(learn, epoch=0, suffix=''):
    return [row(learn, epoch)[f'pull_{t}{suffix}'] for t in ('gini', 'kl')]


@pytest.mark.parametrize('start', [0, 5])
def test_the_pull_is_measured_in_the_first_batch_also_before_the_terms_start(start):
    cb = GiniLossCallback(start_epoch=start, lambda_gini=0.5, lambda_kl=2.0, pull=True)
    learn = get_learner(cb)
    gini, kl = by_hand(copy.deepcopy(learn.model), X[:16], Y[:16])
    fit(learn)
    assert pulls(learn) == pytest.approx([0.5 * gini, 2 * kl], rel=1e-4) and len(cb.pulls[0]) == 3


def test_the_pull_of_several_layers_and_with_weights_of_zero():
    learn = get_learner(GiniLossCallback(['1', '3'], [0.5, 0], start_epoch=0, pull=True))
    expected = [by_hand(copy.deepcopy(learn.model), X[:16], Y[:16], layer) for layer in '13']
    fit(learn)
    assert pulls(learn, suffix='_1') == pytest.approx([0.5 * t for t in expected[0]], rel=1e-4)
    assert pulls(learn, suffix='_3') == pytest.approx([0, 0.5 * expected[1][1]], rel=1e-4)


@pytest.mark.parametrize('options', [{}, dict(running=3), dict(class_prior='train'), dict(layer=['1', '3'])], ids=str)
def test_measuring_the_pull_changes_no_number(options):
    "Bit for bit, with dropout and batch normalisation"

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(256, 4),
        )

    found = []
    for on in (False, True):
        learn = get_learner(GiniLossCallback(**{**dict(layer='3', start_epoch=1), **options}, pull=on), net=net())
        fit(learn, 3)
        found.append(([v[:4] for v in learn.recorder.values], learn.model.state_dict()))
    assert found[0][0] == found[1][0] and all(
        torch.equal(a, b) for a, b in zip(found[0][1].values(), found[1][1].values())
    )


def test_the_pull_with_gradient_accumulation():
    from fastai.callback.training import GradientAccumulation

    plain, accumulated = (
        get_learner(GiniLossCallback(start_epoch=0, pull=True), *cbs) for cbs in ((), (GradientAccumulation(32),))
    )
    fit(plain), fit(accumulated)
    assert pulls(plain) == pytest.approx(pulls(accumulated), rel=1e-6)


@pytest.mark.parametrize('how', ['wrapped', 'in place'])
def test_the_pull_of_a_compiled_model(how):
    "The gradient at the layer is inside the compiled code: one batch runs uncompiled, and nothing else changes"

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
        )

    found = []
    for compiled in (False, True):
        for on in (True, False):
            torch._dynamo.reset()
            model = plain = net()
            if compiled and how == 'wrapped':
                model = torch.compile(plain, backend='aot_eager')
            if compiled and how == 'in place':
                plain.compile(backend='aot_eager')
            learn = get_learner(GiniLossCallback('3', start_epoch=0, pull=on), net=model)
            fit(learn)
            found.append((pulls(learn) if on else None, list(plain.state_dict().values())))
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-4)
    for a, b in zip(found[2][1], found[3][1]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('dtype, size', [(torch.bfloat16, 1), (torch.float16, 1), (torch.float16, 1e-5)])
def test_the_pull_in_half_precision(dtype, size):
    "In float16 the gradient of a loss of this size at a map would be zero, and its pull infinite"

    class Half(Callback):
        order, run_valid = 10, False

        def before_batch(self):
            self.ctx = torch.autocast('cpu', dtype)
            self.ctx.__enter__()

        def after_loss(self):
            self.ctx.__exit__(None, None, None)

    found = []
    for cbs in ((), (Half(),)):
        learn = get_learner(GiniLossCallback(start_epoch=0, pull=True), *cbs)
        learn.loss_func = lambda pred, y: size * nn.functional.cross_entropy(pred, y)
        fit(learn)
        found.append(pulls(learn))
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_the_pull_on_layers_that_do_not_learn():
    frozen = get_learner(GiniLossCallback(start_epoch=0, pull=True))
    for p in frozen.model[:4].parameters():
        p.requires_grad_(False)
    fit(frozen)
    assert np.isnan(pulls(frozen)).all()


def test_the_pull_where_the_main_loss_was_not_computed_from_what_is_tapped():
    "Not infinite: `select` returned a copy, so its gradient is unknown. The terms work as ever"
    cb = GiniLossCallback('3', start_epoch=0, pull=True, select=lambda A: A[:, :8])
    with pytest.warns(UserWarning, match="layer '3', epoch 0: its pulls are nan, because the main loss") as told:
        fit(learn := get_learner(cb), 2)
    assert sum('pulls are nan' in str(w.message) for w in told) == 1
    assert np.isnan(pulls(learn)).all() and 0 < row(learn)['train_gini'] < 1


# ---- Layers without a gradient ----


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


def frozen(*cbs):
    learn = get_learner(*cbs)
    for p in learn.model[:4].parameters():
        p.requires_grad_(False)
    return learn


def detached(*cbs):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Detached(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return get_learner(*cbs, net=net)


@pytest.mark.parametrize('make, layer', [(frozen, '3'), (detached, '1')])
def test_terms_that_train_nothing_are_told_once(make, layer):
    with pytest.warns(UserWarning, match=f"layer '{layer}', epoch 1: its output has no gradient") as told:
        fit(make(GiniLossCallback(layer, start_epoch=1)), 3)
    assert sum('no gradient' in str(w.message) for w in told) == 1


@pytest.mark.parametrize('options', [dict(start_epoch=9), dict(lambda_gini=0, lambda_kl=0, start_epoch=0)], ids=str)
def test_a_frozen_layer_is_fine_where_the_terms_are_not_trained_on(options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        fit(frozen(GiniLossCallback('3', **options)), 2)
    assert not any('no gradient' in str(w.message) for w in told)


# ---- Mixed labels ----


@pytest.mark.parametrize('mix', ['MixUp', 'CutMix'])
def test_labels_are_not_mixed_while_the_mixing_is_switched_off(mix):
    "Its last partners must not be used again: with it off, an epoch has the loss of the plain labels"
    from fastai.callback import mixup
    from fastai.losses import CrossEntropyLossFlat

    class Off(Callback):
        order, run_valid, found = -20, False, []

        def before_epoch(self):
            self.mix = next(cb for cb in self.learn.cbs if isinstance(cb, mixup.MixHandler))
            self.mix.run = self.epoch < 1

        def after_loss(self):
            self.found.append(type(mixed_targets(self.learn)).__name__)

    off = Off()
    learn = get_learner(getattr(mixup, mix)(), off, GiniLossCallback(start_epoch=0))
    learn.loss_func = CrossEntropyLossFlat()
    fit(learn, 2)
    assert off.found == ['MixedTargets'] * 2 + ['Tensor'] * 2


# ---- The class prior ----


class Reads(torch.utils.data.Dataset):
    "A data set that fails if an image is read"

    def __init__(self, **labels):
        self.__dict__.update(labels)

    def __len__(self):
        return 32

    def __getitem__(self, i):
        raise AssertionError("an image was read")


SETS = {
    'labels': lambda: Reads(labels=Y),
    'targets': lambda: Reads(targets=Y.tolist()),
    'a column': lambda: Reads(labels=Y[:, None].to(torch.int32)),
    'tensors': lambda: torch.utils.data.TensorDataset(X, Y),
    'pairs': lambda: Pairs(zip(X, Y)),
    'subset': lambda: torch.utils.data.Subset(Reads(labels=Y), list(range(32))),
    'parts': lambda: torch.utils.data.ConcatDataset(
        [
            torch.utils.data.Subset(Reads(labels=Y), [*range(16)]),
            torch.utils.data.Subset(Reads(labels=Y), [*range(16, 32)]),
        ]
    ),
    'soft': lambda: Reads(labels=nn.functional.one_hot(Y, 4).float()),
}


@pytest.mark.parametrize('kind', SETS)
def test_labels_are_counted_without_reading_an_image(kind):
    assert count_classes(labels_of(SETS[kind]()), 5 if kind != 'soft' else None).tolist()[:4] == [8] * 4


def test_labels_of_fastai_s_data_sets():
    from fastai.data.core import Datasets

    read = []
    data = Datasets(list(range(8)), [[lambda i: read.append(i) or i], [lambda i: i % 3]], n_inp=1)
    read.clear()
    assert count_classes(labels_of(data)).tolist() == [3, 3, 2] and not read
    import pandas as pd
    from fastai.tabular.core import Categorify, TabularPandas
    from fastai.data.block import CategoryBlock

    table = TabularPandas(
        pd.DataFrame(dict(a=[1.0, 2, 3, 4], y=list('bbab'))),
        [Categorify],
        cont_names=['a'],
        y_names='y',
        y_block=CategoryBlock(),
    )
    assert count_classes(labels_of(table.train)).tolist() == [1, 3]


def test_labels_that_only_images_tell_are_asked_for():
    with pytest.raises(
        ValueError,
        match="a Reads does not keep them apart from its images: pass the number of images of each class",
    ):
        labels_of(Reads())


def test_ignored_labels_are_not_counted():
    assert count_classes(torch.tensor([0, -100, 2, 2]), 4).tolist() == [1, 0, 2, 0]


def unequal(class_prior):
    y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(1))
    learn = get_learner(GiniLossCallback(start_epoch=0, class_prior=class_prior))
    learn.dls = DataLoaders(*[DataLoader(Pairs(zip(X, y)), bs=8, num_workers=0)] * 2)
    learn.dls.c = 4
    fit(learn)
    return learn.recorder.values[0], y


def test_the_class_prior_is_that_of_the_training_set():
    "Counted from the data set or given as a tensor, which differs from the labels of the batch"
    (train, y), (batch, _) = unequal('train'), unequal('batch')
    given, _ = unequal(torch.bincount(y, minlength=4))
    assert train == given and train[-1] != batch[-1]
    model = get_learner().model
    with FeatureTap(model) as tap:
        model(X[:8])
        kl = GiniKLLoss(class_prior=torch.bincount(y, minlength=4)).terms(tap.pop(), y[:8])[1]
    learn = get_learner(GiniLossCallback(start_epoch=0, class_prior='train', lambda_gini=0, lambda_kl=0))
    learn.dls = DataLoaders(DataLoader(Pairs(zip(X, y)), bs=8, num_workers=0), DataLoader(Pairs(zip(X, y)), bs=8))
    learn.dls.c = 4
    seen = []

    class First(Callback):
        order, run_valid = 5.5, False

        def after_loss(self):
            seen.append(learn.gini_loss.values['train_kl'].item())

    learn.add_cb(First())
    fit(learn)
    assert seen[0] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize(
    'prior,message',
    [
        ('all', "class_prior='all' is not known: use 'batch', 'train' or a tensor"),
        (torch.tensor([1.0, -1]), "finite and not negative"),
        (torch.ones(2, 2), "one share or count"),
    ],
)
def test_bad_class_priors(prior, message):
    with pytest.raises(ValueError, match=message):
        GiniLossCallback(class_prior=prior)


def test_words_as_a_class_prior():
    "The callback counts the training labels; the loss alone has none, and says where to go"
    with pytest.raises(TypeError, match="None stands for the batch's own labels"):
        GiniKLLoss(class_prior='train')


def test_negative_labels_are_not_counted_silently():
    with pytest.raises(ValueError, match='labels must not be negative, got -1'):
        count_classes(torch.tensor([0, 2, -1]), 3)
    assert count_classes(torch.tensor([0, 2, -1]), 3, ignore_index=-1).tolist() == [1, 0, 1]


def test_a_class_prior_of_other_classes():
    with pytest.raises(ValueError, match="class_prior must have one share or count for each of the 4 classes"):
        fit(get_learner(GiniLossCallback(class_prior=torch.ones(5))))


# ---- Masks ----


def test_a_mask_is_a_function_of_the_batch():
    "Masked positions do not count: terms and gradient are those of the other positions"

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, ids):
            real = (ids > 0).float()[..., None]
            return self.head((self.body(self.embed(ids)) * real).sum(1) / real.sum(1))

    ids = torch.randint(1, 20, (32, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for pad in (0, 7):
        x = nn.functional.pad(ids, (0, pad))
        learn = get_learner(
            GiniLossCallback('body', start_epoch=0, channel_dim=-1, pull=True, mask=lambda x: x > 0), net=Tokens()
        )
        learn.dls = DataLoaders(*[DataLoader(Pairs(zip(x, Y)), bs=16, num_workers=0)] * 2)
        learn.dls.c = 4
        fit(learn)
        found.append((list(learn.recorder.values[0]), torch.cat([p.flatten() for p in learn.model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_a_mask_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match="layer '3': mask of shape"):
        fit(get_learner(GiniLossCallback('3', start_epoch=0, mask=lambda x: torch.ones(len(x), 3, dtype=torch.bool))))
    with pytest.raises(TypeError, match="mask must be a function, got Tensor"):
        GiniLossCallback(mask=torch.ones(3))


# ---- Compiled terms ----


def measured(gini, kl):
    return Measured(gini, kl, torch.ones(1, dtype=torch.bool), torch.ones(1))


@pytest.mark.parametrize(
    'wrong',
    [
        lambda A: measured(A.mean(), A.square().mean().detach() + 0 * A.sum()),
        lambda A: measured(2 * A.mean() - A.mean().detach(), A.square().mean()),
    ],
)
def test_a_wrong_gradient_of_compiled_terms_is_found(wrong):
    "Right values are not enough: the first step with a gradient compares the gradients"
    loss, A = GiniKLLoss(), torch.rand(4, 3, requires_grad=True)
    loss.measure = lambda A, y, mask=None: measured(A.mean(), A.square().mean())
    bad = CompiledMeasure(loss, compile=lambda f: lambda A, y, mask=None: wrong(A))
    with pytest.raises(RuntimeError, match="compiles the terms to a gradient that is .*% off: use compile=False"):
        bad(A, None)


def test_right_compiled_terms_are_compared_once():
    loss, A, calls = GiniKLLoss(), torch.rand(4, 3, requires_grad=True), []
    right = lambda A, y, mask=None: measured(A.mean(), A.square().mean())
    loss.measure = lambda *args: calls.append(1) or right(*args)
    good = CompiledMeasure(loss, compile=lambda f: right)
    with torch.no_grad():
        good(A, None)
    assert not calls  # nothing to compare without a gradient
    for _ in range(3):
        good(A, None)
    assert len(calls) == 1 and good(A, None).gini == A.mean()


def test_compiled_terms_and_eager_ones_agree(code_generator):
    rows = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        learn = get_learner(GiniLossCallback(start_epoch=1, compile_terms=compiled))
        fit(learn, 2)
        rows.append(learn.recorder.values)
    stats = torch._dynamo.utils.counters
    assert stats['stats']['unique_graphs'] == 2 and not stats['graph_break']  # with and without a gradient
    assert np.allclose(rows[0], rows[1], rtol=1e-3, atol=1e-4)
