"""Value and gradient of the loss in all kinds of training loops: the table of nbs/51_robustness.ipynb, row by row.

Further rows are checked in test_losses.py (precision, layouts, bad input), test_tap.py (hooks, compilation,
checkpointing, copies), test_distributed.py (several processes), test_running.py (small batches) and test_files.py (fuzz
of records, checkpoints and studies).
"""

import copy, gc, pickle, warnings, weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip('fastai', reason="the callback needs fastai")
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
import fastai.callback.schedule  # noqa: F401, adds fit_one_cycle to Learner
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.foundation import L

from gini_loss import health
from gini_loss.callback import GiniLossCallback, mixed_targets
from gini_loss.losses import GiniKLLoss, Measured
from gini_loss.tap import FeatureTap
from tiny import Pairs, hooks


pytestmark = [pytest.mark.usefixtures('fresh_compiler'), pytest.mark.filterwarnings('ignore')]


N, M = 4, 64  # classes, images
_g = torch.Generator().manual_seed(0)
Y = torch.arange(M) % N
X = torch.randn(M, 3, 6, 6, generator=_g)
for _i, _k in enumerate(Y):
    X[_i, :, 3 * (_k // 2) : 3 * (_k // 2) + 3, 3 * (_k % 2) : 3 * (_k % 2) + 3] += 1


class Loader(DataLoader):
    "fastai's own show_results needs its data blocks; this one keeps what it is asked to show"

    shown = None

    def show_results(self, b, out, max_n=9, **kwargs):
        Loader.shown = out
        return b[0], b[1], [], [(o,) for o in out]


def get_dls(bs=16, shuffle=False, one_hot=False, images=M):
    y = F.one_hot(Y, N).float() if one_hot else Y
    data = Pairs(zip(X[:images], y[:images]))
    dls = DataLoaders(Loader(data, bs=bs, shuffle=shuffle), Loader(Pairs(data[:32]), bs=16), device='cpu')
    dls.c = N
    return dls


def get_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(432, N),
    )


def get_learner(*cbs, model=None, loss=None, dls=None, lr=0.05, **kwargs):
    learn = Learner(
        dls or get_dls(),
        model or get_model(),
        loss_func=loss or CrossEntropyLossFlat(),
        opt_func=SGD,
        lr=lr,
        cbs=list(cbs),
        **kwargs,
    )
    learn.remove_cb(ProgressCallback)
    return learn


def fit(learn, n=1, **kwargs):
    set_seed(1)
    with learn.no_logging():
        learn.fit(n, **kwargs)
    return weights(learn.model)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def columns(learn):
    return [m.name for m in learn.metrics]


def terms(**kwargs):
    return GiniLossCallback(**{**dict(start_epoch=0), **kwargs})


def clean(learn):
    return hooks(learn.model) == 0 and columns(learn) == [] and '_with_events' not in learn.__dict__


def zero_loss(pred, y):
    return pred.sum() * 0


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope='module')
def trained():
    "The weights after two epochs with the terms and nothing else"
    torch.set_num_threads(1)
    return fit(get_learner(terms()), 2)


class KeepGrad(Callback):
    "Keeps the gradient that the optimizer gets"

    order = 20

    def before_step(self):
        self.grad = torch.cat([p.grad.flatten().clone() for p in self.learn.model.parameters() if p.grad is not None])


# ---- Precision ----


class OnCPU(MixedPrecision):
    "fastai's MixedPrecision asks for CUDA; the same with the CPU's autocast and GradScaler"

    def before_fit(self):
        half = torch.float16 if self.amp_mode == AMPMode.FP16 else torch.bfloat16
        self.autocast, self.learn.scaler, self.scales = (
            torch.autocast('cpu', half),
            torch.amp.GradScaler('cpu', init_scale=2.0**10, enabled=half == torch.float16),
            L(),
        )


def terms_in_double(A, y):
    "The two terms and their gradients at A, in float64 on the CPU"
    x = A.detach().cpu().double().requires_grad_()
    values = GiniKLLoss().terms(x, y)
    return values, [torch.autograd.grad(v, x, retain_graph=True)[0] for v in values]


def fit_against_float64(learn, cb, keep, dtype, tolerance):
    """Fit. In each of the four steps the terms and their gradients must be those of float64 from the same activations,
    which are of `dtype`. In the last, the gradient of the network must be that of float64's gradient at the
    activations,
    brought back through the same half-precision network: the network's own rounding is in both"""
    seen, real, scale = [], cb.losses[0].measure, 2.0**10  # float16 needs the scaler, here by hand

    def spy(A, y, mask=None):
        out, y = real(A, y, mask), y.detach().as_subclass(torch.Tensor).cpu()
        found = [torch.autograd.grad(t * scale, A, retain_graph=True)[0] / scale for t in out[:2]]
        values, exact = terms_in_double(A, y)
        assert A.dtype == dtype and all(v.dtype == torch.float32 and v.isfinite() for v in out[:2])
        for got, right in [*zip(out[:2], values), *zip(found, exact)]:
            assert relative(got.detach().cpu(), right.detach()) < tolerance
        at_A = (scale * sum(exact) / 2).to(A)
        back = torch.autograd.grad(A, list(learn.model.parameters()), at_A, retain_graph=True, allow_unused=True)
        seen[:] = [*seen, torch.cat([g.flatten().double() / scale for g in back if g is not None])]
        return out

    cb.losses[0].measure = spy
    fit(learn)
    assert len(seen) == 4 and relative(keep.grad[: len(seen[-1])], seen[-1]) < tolerance
    assert keep.grad[len(seen[-1]) :].abs().sum() == 0  # the classifier, behind the layer


@pytest.mark.parametrize(
    'mode,dtype,tolerance', [(AMPMode.FP16, torch.float16, 1e-3), (AMPMode.BF16, torch.bfloat16, 1e-2)]
)
def test_autocast_and_gradscaler(mode, dtype, tolerance):
    "Half-precision activations give float32 terms, right to the precision of the input; the scaler scales them too"
    cb, keep = terms(), KeepGrad()
    learn = get_learner(OnCPU(mode), cb, keep, loss=zero_loss, lr=0.0)
    fit_against_float64(learn, cb, keep, dtype, tolerance)
    assert clean(learn)


@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
def test_mixed_precision_as_a_user_switches_it_on(how):
    "Without CUDA, fastai's switches do nothing and do not change the terms"
    learn = get_learner(terms())
    getattr(learn, how)()
    assert torch.isfinite(fit(learn)).all() and clean(learn) and learn.recorder.values[0][-2] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize('how,dtype,tolerance', [('to_fp16', torch.float16, 1e-3), ('to_bf16', torch.bfloat16, 1e-2)])
def test_mixed_precision_on_a_gpu(how, dtype, tolerance):
    "The same with fastai's own switch"
    cb, keep, dls = terms(), KeepGrad(), get_dls()
    dls.cuda()
    dls.c = N
    learn = getattr(get_learner(cb, keep, model=get_model().cuda(), loss=zero_loss, lr=0.0, dls=dls), how)()
    fit_against_float64(learn, cb, keep, dtype, tolerance)
    assert clean(learn)


def test_a_step_that_the_scaler_skips_leaves_the_next_one_right():
    class Overflow(Callback):
        order, run_valid = 9, False

        def before_backward(self):
            if self.learn.iter == 1:
                self.learn.loss_grad = self.learn.loss_grad * float('inf')

    learn = get_learner(OnCPU(AMPMode.FP16), terms(), Overflow())
    w = fit(learn, 2)
    assert w.isfinite().all() and clean(learn) and not torch.equal(w, weights(get_model()))


# ---- Accumulation and clipping ----


def by_hand(batches, model):
    "Mean over batches of the gradient of the terms"
    grads = []
    for x, y in batches:
        model.zero_grad()
        with FeatureTap(model, '3') as tap:
            model(x)
            GiniKLLoss()(tap.pop(), y).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return torch.stack(grads).mean(0)


ORDERS = {
    'alone': lambda g: [g],
    'accumulate, terms': lambda g: [GradientAccumulation(64), g],
    'terms, accumulate': lambda g: [g, GradientAccumulation(64)],
    'clip, accumulate, terms': lambda g: [GradientClip(1e6), GradientAccumulation(64), g],
    'terms, accumulate, clip': lambda g: [g, GradientAccumulation(64), GradientClip(1e6)],
    'accumulate, terms, half precision': lambda g: [GradientAccumulation(64), g, OnCPU(AMPMode.BF16)],
}


@pytest.mark.parametrize('name', ORDERS)
def test_gain_is_one(name):
    "Callbacks that scale the loss scale the terms too, in any order of the callbacks"
    keep = KeepGrad()
    learn = get_learner(*ORDERS[name](terms()), keep, loss=zero_loss, lr=0.0)
    fit(learn)
    expected = by_hand(list(learn.dls.train)[-1 if name == 'alone' else -4 :], learn.model)
    grad = keep.grad[: len(expected)]
    tolerance = 2e-2 if 'half' in name else 1e-4
    assert (grad @ expected / (expected @ expected)).item() == pytest.approx(1, abs=tolerance) and relative(
        grad, expected
    ) < 2 * tolerance


def test_clipping_clips_the_sum():
    plain, clipped = KeepGrad(), KeepGrad()
    fit(get_learner(terms(), plain, lr=0.0))
    fit(get_learner(GradientClip(0.01), terms(), clipped, lr=0.0))
    assert clipped.grad.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped.grad / clipped.grad.norm(), plain.grad / plain.grad.norm())


# ---- Labels ----

LABELS = {
    'cross-entropy': (CrossEntropyLossFlat, False),
    'label smoothing': (LabelSmoothingCrossEntropyFlat, False),
    'one-hot targets': (BCEWithLogitsLossFlat, True),
}


@pytest.mark.parametrize('loss', LABELS)
@pytest.mark.parametrize('mix', [None, MixUp, CutMix])
def test_the_term_sees_the_labels_of_the_mixed_images(mix, loss):
    """Recomputed from the random numbers of the mixing callback. Label smoothing inside the loss function does not
    affect the terms, which use the labels of the batch"""
    func, one_hot = LABELS[loss]

    class Spy(Callback):
        order, run_valid, n = 4, False, 0

        def after_loss(self):
            self.before = self.learn.loss_grad.detach().clone()

        def before_backward(self):
            y = self.learn.yb[0]
            if mix is not None and not one_hot:
                m = next(cb for cb in learn.cbs if isinstance(cb, mix))
                lam = m.lam.reshape(-1, 1)
                y = lam * F.one_hot(self.learn.yb[0], N) + (1 - lam) * F.one_hot(m.yb1[0], N)
            A = self.learn.model[:4](self.learn.xb[0])
            expected = 0.5 * sum(GiniKLLoss().terms(A, y.float() if y.ndim == 2 else y))
            torch.testing.assert_close(
                self.learn.loss_grad.detach() - self.before, expected.detach(), rtol=1e-4, atol=1e-5
            )
            assert mix is None or ((y > 0).sum(1) == 2).any()
            self.n += 1

    spy = Spy()
    learn = get_learner(*([mix()] if mix else []), terms(), spy, loss=func(), dls=get_dls(one_hot=one_hot))
    fit(learn)
    assert spy.n == 4 and clean(learn)


@pytest.mark.parametrize('running', [None, 3])
def test_ignored_labels_among_mixed_ones(running):
    "An image mixed with one that has no class counts with the share of its class"
    dls = get_dls()
    y = Y.clone()
    y[::5] = -100
    dls.train.dataset[:] = list(zip(X, y))
    learn = get_learner(MixUp(), terms(running=running), loss=CrossEntropyLossFlat(ignore_index=-100), dls=dls)
    assert fit(learn).isfinite().all() and learn.recorder.values[-1][-2] > 0


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_do_not_grow_with_the_number_of_classes(mix):
    "No matrix of all classes is made: with a million classes, values are the same and memory does not grow"
    found = {}
    for n in (1000, 10**6):
        learn, mixer = get_learner(), mix()
        mixer.learn, mixer.stack_y, mixer.lam, mixer.yb1 = learn, True, torch.linspace(0, 1, 16), (Y[:16].flip(0),)
        learn.cbs, learn.yb = L(mixer), (Y[:16],)
        A, sizes = torch.rand(16, 12, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(), []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                out = op(*args, **(kwargs or {}))
                sizes.extend(
                    t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)
                )
                return out

        with Sizes():
            y = mixed_targets(learn)
            values = GiniKLLoss(n_classes=n).measure(A, y)
            bounds = health.batch_signs(values)
            (grad,) = torch.autograd.grad(values[0] + values[1], A)
        found[n] = *values[:2], grad, *bounds
        assert max(sizes) <= A.numel()  # neither (m, n) nor (c, n): 16,000 and 12,000 at a thousand classes
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    dense = mixer.lam[:, None] * F.one_hot(Y[:16], N) + (1 - mixer.lam[:, None]) * F.one_hot(Y[:16].flip(0), N)
    x = A.detach().requires_grad_()
    values = GiniKLLoss().measure(x, dense)
    for a, b in zip(
        found[10**6], (*values[:2], torch.autograd.grad(values[0] + values[1], x)[0], *health.batch_signs(values))
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- Not finite ----


def test_on_a_gpu_the_callback_looks_for_what_is_not_finite_itself():
    """A failed device assert would poison the CUDA context, so on a GPU `after_train` checks the values and names the
    layer. On the CPU the loss raises at once"""
    seen = []
    for on_gpu in (False, True):
        cb = terms()
        learn = get_learner(cb, loss=zero_loss)
        real = cb.losses[0].measure

        def spy(A, y, mask=None):
            seen.append(cb.losses[0].check_finite)
            cb.losses[0].check_finite = seen[-1] and not on_gpu  # this machine's tensors are on the CPU
            return real(A * float('nan'), y, mask)

        cb.losses[0].measure = spy
        with pytest.raises(ValueError) as e:
            fit(learn)
        assert "layer '3'" in str(e.value) and (
            'became NaN or infinite in epoch 0' if on_gpu else 'in 12 of 12 channels'
        ) in str(e.value)
        assert clean(learn)
    assert seen == [True] * 5

    class OnGPU(torch.Tensor):
        is_cuda = True

    cb = terms()
    learn = get_learner(cb, loss=zero_loss)
    flags = []

    def stop(A, y, mask=None):
        flags.append(cb.losses[0].check_finite)
        raise KeyboardInterrupt

    cb.losses[0].measure = stop
    real = FeatureTap.pop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureTap, 'pop', lambda self: real(self).as_subclass(OnGPU))
        with pytest.raises(KeyboardInterrupt):
            fit(learn)
    assert flags == [False] and GiniKLLoss().check_finite


# ---- The other things that a Learner does ----

USES = {
    'validate': lambda learn: learn.validate(),
    'get_preds': lambda learn: learn.get_preds(),
    'get_preds on the training set': lambda learn: learn.get_preds(0),
    'show_results': lambda learn: learn.show_results(),
    'freeze': lambda learn: (learn.freeze(), learn.unfreeze()),
    'lr_find': lambda learn: learn.lr_find(show_plot=False, num_it=8),
    'a fit of no epochs': lambda learn: learn.fit(0),
}


@pytest.mark.parametrize('use', USES)
def test_what_comes_before_a_fit_leaves_it_alone(use, trained, tmp_path):
    learn = get_learner(terms(), path=tmp_path)
    with learn.no_logging(), learn.no_bar():
        USES[use](learn)
    assert clean(learn)
    torch.testing.assert_close(fit(learn, 2, reset_opt=True), trained, rtol=0, atol=0)
    assert clean(learn) and (use != 'show_results' or Loader.shown is not None)


@pytest.mark.parametrize('event', ['after_batch', 'after_train', 'before_validate', 'after_epoch'])
def test_evaluation_inside_a_fit_leaves_it_alone(event, trained):
    "Nested validate and get_preds at different moments do not change the weights"

    class Evaluate(Callback):
        order, run_valid, inside, n = 40, False, False, 0

    def evaluate(self):
        if self.inside or event == 'after_batch' and self.learn.iter != 1:
            return
        self.inside = True
        self.n += 1
        keep = {k: getattr(self.learn, k) for k in ('dl', 'training', 'iter', 'n_iter', 'xb', 'yb', 'pred', 'loss')}
        assert len(self.learn.validate()) == 1 + len(self.learn.metrics)
        assert len(self.learn.get_preds(inner=True)[0]) == 32
        for k, v in keep.items():
            setattr(self.learn, k, v)
        self.learn.model.train(self.learn.training)
        self.inside = False

    setattr(Evaluate, event, evaluate)
    inner = Evaluate()
    learn = get_learner(terms(), inner)
    torch.testing.assert_close(fit(learn, 2), trained, rtol=0, atol=0)
    assert clean(learn) and inner.n == 2


def test_several_fits_and_schedules(tmp_path):
    "fit, fit_one_cycle, fine_tune, freezing: each counts its epochs afresh, each has its columns, none leaves anything"
    learn = get_learner(terms(), path=tmp_path, splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    with learn.no_logging(), learn.no_bar():
        for run in (
            lambda: learn.fit(1),
            lambda: learn.fit_one_cycle(2),
            lambda: learn.fine_tune(1),
            lambda: (learn.freeze(), learn.fit(1)),
            lambda: (learn.unfreeze(), learn.fit(2)),
        ):
            run()
            assert (
                clean(learn)
                and learn.recorder.metric_names[-3:-1] == ['train_gini', 'train_kl']
                and learn.recorder.values[-1][-2] > 0
            )


def test_layers_in_front_of_the_tap_that_are_frozen():
    "If nothing before the tap is trained, the terms have no gradient, and training goes on as without them"
    models = [get_model() for _ in range(2)]
    for m in models:
        for p in m[:4].parameters():
            p.requires_grad_(False)
    with_terms, without = fit(get_learner(terms(), model=models[0])), fit(get_learner(model=models[1]))
    assert torch.equal(with_terms, without)


def test_tensorboard(tmp_path, trained):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback

    learn = get_learner(terms(), TensorBoardCallback(tmp_path, trace_model=True, log_preds=False), path=tmp_path)
    torch.testing.assert_close(fit(learn, 2), trained, rtol=0, atol=0)
    assert clean(learn)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {'train_gini', 'train_kl'} <= set(events.Tags()['scalars']) and len(events.Scalars('train_gini')) == 2


# ---- Interruptions ----

ERRORS = [
    KeyboardInterrupt,
    SystemExit,
    torch.OutOfMemoryError,
    RuntimeError,
    CancelBatchException,
    CancelBackwardException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    CancelEpochException,
    CancelFitException,
]
EVENTS = [
    'before_epoch',
    'before_train',
    'before_batch',
    'after_pred',
    'after_loss',
    'before_backward',
    'after_backward',
    'before_step',
    'after_step',
    'after_batch',
    'after_train',
    'before_validate',
    'after_validate',
    'after_epoch',
]


@pytest.mark.parametrize('error', ERRORS, ids=lambda e: e.__name__)
def test_after_an_interruption_the_next_fit_is_right(error, trained):
    "At any moment of the loop: no hook and no column is left, and the learner then trains like a new one"
    for event in EVENTS:
        for order in (1, 30):
            if error is CancelEpochException and event == 'before_epoch':
                continue  # fastai's Recorder fails there
            bad = Callback()
            bad.order, bad.run_valid = order, False

            def fail():
                raise error("stop")

            setattr(bad, event, fail)
            learn = get_learner(terms(), bad)
            start = copy.deepcopy(learn.model.state_dict())
            try:
                fit(learn)
            except BaseException as e:
                assert isinstance(e, error), (event, e)
            assert clean(learn), event
            learn.remove_cb(bad)
            learn.model.load_state_dict(start)
            learn.model.zero_grad()
            if event in ('after_backward', 'after_step', 'after_epoch'):
                torch.testing.assert_close(fit(learn, 2, reset_opt=True), trained, rtol=0, atol=0)


@pytest.mark.parametrize('error', [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_layer_that_fails_in_its_forward_pass(error, trained):
    learn = get_learner(terms())
    handle = learn.model[4].register_forward_pre_hook(lambda m, args: (_ for _ in ()).throw(error("stop")))
    with pytest.raises(error):
        fit(learn)
    handle.remove()
    assert clean(learn) and torch.equal(fit(learn, 2, reset_opt=True), trained)


def test_a_callback_that_fails_before_the_fit():
    "The next fit removes what is left until then: there was no hook yet"

    class Fail(Callback):
        order = 50

        def before_fit(self):
            raise RuntimeError("stop")

    bad = Fail()
    learn = get_learner(terms(), bad)
    with pytest.raises(RuntimeError):
        fit(learn)
    assert hooks(learn.model) == 0
    learn.remove_cb(bad)
    fit(learn)
    assert clean(learn)


# ---- Nothing retained ----


def n_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_a_thousand_steps_keep_nothing():
    "In a plain loop: no more tensors alive after 1,000 steps than after 100"
    model, aux, counts = get_model(), GiniKLLoss(), {}
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with FeatureTap(model, '3') as tap:
        for step in range(1, 1001):
            i = slice(16 * (step % 4), 16 * (step % 4) + 16)
            loss = F.cross_entropy(model(X[i]), Y[i]) + aux(tap.pop(), Y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            if step in (100, 1000):
                counts[step] = n_tensors()
    assert counts[1000] <= counts[100]


class LiveBytes(TorchDispatchMode):
    "Bytes of all storages that are still alive, whether Python, autograd or another tensor holds them"

    def __init__(self):
        super().__init__()
        self.bytes, self.known = 0, set()

    def freed(self, key, size):
        self.bytes -= size
        self.known.discard(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(t, torch.Tensor):
                continue
            s = t.untyped_storage()
            if s._cdata not in self.known:
                self.known.add(s._cdata)
                self.bytes += s.nbytes()
                weakref.finalize(s, self.freed, s._cdata, s.nbytes())
        return out


def test_live_bytes_sees_what_autograd_holds():
    "The measure of the next test"
    with LiveBytes() as live:
        x = torch.ones(1000, requires_grad=True)
        before = live.bytes
        y = (x * 2).exp().sum()
        gc.collect()
        assert live.bytes - before >= 4000  # the result of exp, which only autograd holds
        del y
        gc.collect()
        assert live.bytes == before


def growth(*cbs, epochs=250):
    "Tensors and bytes alive after so many epochs of 4 steps, more than after 2"
    with LiveBytes() as live:
        learn = get_learner(*cbs, dls=get_dls(bs=4, images=16))
        learn._do_epoch_validate = lambda *args, **kwargs: None  # steps of training alone
        fit(learn, 2)
        gc.collect()
        before = n_tensors(), live.bytes
        fit(learn, epochs)
        gc.collect()
        return n_tensors() - before[0], live.bytes - before[1]


def test_a_thousand_steps_of_a_learner_keep_no_more_than_without_the_terms():
    "fastai's recorder itself keeps numbers of each batch; the callback adds nothing to that, neither tensors nor bytes"
    (tensors, size), (tensors_without, size_without) = growth(terms()), growth()
    assert tensors <= tensors_without + 4 and size <= size_without + 1000  # a few of the last epoch's sums may be there


def test_what_grows_is_seen():
    "The test above fails if a number, or its graph, is kept in each step"

    class Keep(Callback):
        run_valid = False

        def __init__(self, graph):
            self.kept, self.graph = [], graph

        def after_loss(self):
            self.kept.append(
                self.learn.model[:2](self.learn.x).square().sum() if self.graph else self.learn.loss.detach().clone()
            )

    plain = growth(epochs=10)
    for graph in (False, True):
        tensors, size = growth(Keep(graph), epochs=10)
        assert tensors >= plain[0] + 40 and size >= plain[1] + (40_000 if graph else 160)


def test_activations_do_not_outlive_their_step():
    refs, cb = [], terms()
    learn = get_learner(cb)
    real = cb.losses[0].measure

    def spy(A, y, mask=None):
        refs.append(weakref.ref(A))
        return real(A, y, mask)

    cb.losses[0].measure = spy

    class Look(Callback):
        order, run_valid, alive = 60, False, []

        def before_batch(self):
            self.alive.append(sum(r() is not None for r in refs))

    look = Look()
    learn.add_cb(look)
    gc.disable()
    try:
        fit(learn, 2)
    finally:
        gc.enable()
    assert len(refs) == 8 and max(look.alive) == 0


# ---- Compilation ----


@pytest.mark.parametrize('when', ['before the learner', 'between two fits', 'in place'])
def test_a_compiled_model_trains_to_the_same_weights(when, trained):
    net = get_model()
    learn = get_learner(terms(), model=torch.compile(net, backend='aot_eager') if when == 'before the learner' else net)
    if when == 'between two fits':
        start = copy.deepcopy(net.state_dict())
        fit(learn)
        net.load_state_dict(start)
        learn.model = torch.compile(net, backend='aot_eager')
    if when == 'in place':
        net.compile(backend='aot_eager')
    torch.testing.assert_close(fit(learn, 2, reset_opt=True), trained, rtol=0, atol=1e-6)
    assert hooks(net) == 0


def test_a_model_that_was_compiled_and_run_before_gives_the_same_or_an_error(trained):
    "Compiled code may ignore hooks that are added later: the fit then raises, and never trains without the terms"
    net = get_model()
    model = torch.compile(net, backend='aot_eager')
    model(X[:16])
    learn = get_learner(terms(), model=model)
    try:
        w = fit(learn, 2)
    except RuntimeError as e:
        assert 'did not run' in str(e) and 'compiled' in str(e)
    else:
        torch.testing.assert_close(w, trained, rtol=0, atol=1e-6)
    assert hooks(net) == 0


def test_reduce_overhead(code_generator):
    "torch.compile's own code generator, in the mode that uses CUDA graphs where there is CUDA"
    found = []
    for compiled in (False, True):
        net = get_model()
        model = torch.compile(net, mode='reduce-overhead') if compiled else net
        opt = torch.optim.SGD(net.parameters(), lr=0.05)
        with FeatureTap(model, '3') as tap:
            for i in (slice(0, 16), slice(16, 32)):
                loss = F.cross_entropy(model(X[i]), Y[i]) + GiniKLLoss()(tap.pop(), Y[i])
                opt.zero_grad()
                loss.backward()
                opt.step()
        found.append(weights(net))
        assert hooks(net) == 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert not torch.equal(found[0], weights(get_model()))


SYNC = (
    '_local_scalar_dense',
    'aten.item',
    'nonzero',
    'unique',
    'masked_select',
    'bincount',
    'aten.equal',
    'repeat_interleave.Tensor',
)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(n_classes=N),
        dict(n_classes=10**6),
        dict(n_classes=None, reverse_kl=True),
        dict(rectify='none', n_classes=N),
    ],
    ids=str,
)
@pytest.mark.parametrize('soft', [False, True])
def test_the_traced_graph_waits_for_no_device(kwargs, soft):
    "One forward and one backward graph of static shapes, in which no operation reads a value; checks are asserts in it"
    from torch._dynamo.backends.common import aot_autograd
    from functorch.compile import make_boxed_func

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    A, y = torch.rand(16, 8, 6).requires_grad_(), F.one_hot(Y[:16], N).float() if soft else Y[:16]
    if soft:
        kwargs = {**kwargs, 'n_classes': N}
    f = torch.compile(
        GiniKLLoss(**kwargs).__call__, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    f(A, y).backward()
    torch.testing.assert_close(A.grad, torch.autograd.grad(GiniKLLoss(**kwargs)(A, y), A)[0], rtol=1e-5, atol=1e-7)
    assert len(graphs) == 2
    ops = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == 'call_function']
    assert (
        len(ops) > 20 and [o for o in ops if any(s in o for s in SYNC)] == [] and any('_assert_async' in o for o in ops)
    )
    shapes = [
        d
        for g in graphs
        for n in g.graph.nodes
        if isinstance(n.meta.get('val'), torch.Tensor)
        for d in n.meta['val'].shape
    ]
    assert shapes and all(isinstance(d, int) for d in shapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph():
    "Captured once and replayed on other numbers, it gives the value and gradient of an ordinary call"
    loss, y = GiniKLLoss(n_classes=N), Y.cuda()
    A = torch.rand(M, 8, device='cuda').requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(A, y), A)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(A, y)
        (grad,) = torch.autograd.grad(value, A)
    with torch.no_grad():
        A.copy_(torch.rand(M, 8))
    graph.replay()
    torch.testing.assert_close(value, loss(A, y))
    torch.testing.assert_close(grad, torch.autograd.grad(loss(A, y), A)[0])


# ---- Layouts and modules of other kinds ----


def test_channels_last(trained):
    learn = get_learner(terms(), model=get_model().to(memory_format=torch.channels_last))
    torch.testing.assert_close(fit(learn, 2), trained, rtol=0, atol=1e-5)
    assert learn.model[2].weight.is_contiguous(memory_format=torch.channels_last)


class Odd(nn.Module):
    "The network of `get_model` with a middle module that returns or is used in another way"

    def __init__(self, kind):
        super().__init__()
        net = get_model()
        self.kind, self.stem, self.body, self.head = kind, net[:2], Middle(kind, net[2:4]), net[4:]

    def forward(self, x):
        if self.kind.startswith('checkpoint'):
            h = checkpoint(self.body, self.stem(x), use_reentrant=self.kind == 'checkpoint, reentrant')
        else:
            h = self.body(self.stem(x))
        if self.kind == 'twice':
            h = self.body(self.stem(x))
        return self.head(
            h[0]
            if self.kind == 'tuple'
            else h['hidden']
            if self.kind == 'dict'
            else h.permute(0, 3, 1, 2)
            if self.kind == 'non-contiguous'
            else h
        )


class Middle(nn.Module):
    def __init__(self, kind, layers):
        super().__init__()
        self.kind, self.layers = kind, layers

    def forward(self, x):
        h = self.layers(x)
        return (
            (h, h.sum())
            if self.kind == 'tuple'
            else {'hidden': h}
            if self.kind == 'dict'
            else h.permute(0, 2, 3, 1)
            if self.kind == 'non-contiguous'
            else h
        )


@pytest.mark.parametrize(
    'kind,kwargs',
    [
        ('tuple', dict(select=lambda out: out[0])),
        ('dict', dict(select=lambda out: out['hidden'])),
        ('non-contiguous', dict(channel_dim=-1)),
        ('checkpoint', {}),
    ],
)
def test_layers_of_other_kinds_train_to_the_same_weights(kind, kwargs, trained):
    learn = get_learner(terms(layer='body', **kwargs), model=Odd(kind))
    torch.testing.assert_close(fit(learn, 2), trained, rtol=0, atol=1e-6)
    assert clean(learn)


@pytest.mark.parametrize(
    'kind,message',
    [
        ('tuple', "returned a tuple, not a tensor: pass select"),
        ('dict', "returned a dict, not a tensor: pass select"),
        ('twice', "ran 2 times"),
        ('checkpoint, reentrant', "ran without gradients: reentrant checkpointing"),
    ],
)
def test_layers_that_cannot_be_tapped_end_the_fit_with_a_reason(kind, message):
    learn = get_learner(terms(layer='body'), model=Odd(kind))
    with pytest.raises((RuntimeError, TypeError), match=message):
        fit(learn)
    assert clean(learn)


# ---- Copies, export, inference ----


def test_an_average_of_the_weights_made_during_the_fit(trained):
    "Deep copies in the middle of a batch and of an epoch, evaluated during the fit"

    class Average(Callback):
        order, run_valid = 30, False

        def before_fit(self):
            self.averaged = torch.optim.swa_utils.AveragedModel(self.learn.model)

        def after_step(self):
            self.averaged.update_parameters(self.learn.model)
            if self.learn.iter == 2:
                self.twin = copy.deepcopy(self.learn.model)
            with torch.no_grad():
                self.averaged(self.learn.xb[0])

    average = Average()
    learn = get_learner(terms(), average)
    torch.testing.assert_close(fit(learn, 2), trained, rtol=0, atol=0)
    assert hooks(average.averaged) == 0 and list(average.twin.state_dict()) == list(get_model().state_dict())
    plain = get_model()
    plain.load_state_dict(average.twin.state_dict())
    torch.testing.assert_close(
        fit(get_learner(terms(), model=average.twin)), fit(get_learner(terms(), model=plain)), rtol=0, atol=0
    )


class ExportInside(Callback):
    order = 70

    def after_epoch(self):
        dls = self.learn.dls
        self.learn.export('inside.pkl')
        self.learn.dls = dls


@pytest.mark.parametrize('when', ['after the fit', 'inside the fit'])
def test_export_and_load(when, tmp_path):
    "A learner exported at the end or by a callback loads, predicts the same, has no hook, and trains again"
    learn = get_learner(terms(), path=tmp_path)
    if when == 'inside the fit':
        learn.add_cb(ExportInside())
        fit(learn)
        file = tmp_path / 'inside.pkl'
    else:
        fit(learn)
        learn.export('after.pkl')
        file = tmp_path / 'after.pkl'
    loaded = load_learner(file)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(X), learn.model.eval()(X))
    assert hooks(loaded.model) == 0
    loaded.dls = get_dls()
    loaded.remove_cb(ExportInside)
    fit(loaded, reset_opt=True)
    assert clean(loaded)


def graph_of(model):
    program = torch.export.export(model.eval(), (X[:2],))
    return program, [(n.op, str(n.target)) for n in program.graph.nodes]


def test_inference_costs_nothing():
    "After the fit, the network has the same graph as one without the loss, node for node"
    learn = get_learner(terms(layer=['1', '3']))
    fit(learn)
    program, graph = graph_of(learn.model)
    assert graph == graph_of(get_model())[1]
    torch.testing.assert_close(program.module()(X[:2]), learn.model(X[:2]), rtol=0, atol=1e-6)
    assert list(learn.model.state_dict()) == list(get_model().state_dict()) and hooks(learn.model) == 0


def test_onnx():
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    from onnx.reference import ReferenceEvaluator

    learn = get_learner(terms())
    fit(learn)

    def export(model):
        return torch.onnx.export(model.eval(), (X[:2],), input_names=['x'], dynamo=True, verbose=False).model_proto

    trained, fresh = export(learn.model), export(get_model())
    onnx.checker.check_model(trained)
    assert [n.op_type for n in trained.graph.node] == [n.op_type for n in fresh.graph.node]
    (got,) = ReferenceEvaluator(trained).run(None, {trained.graph.input[0].name: X[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(got), learn.model(X[:2]).detach(), rtol=1e-4, atol=1e-4)


def test_the_callback_itself_copies_and_pickles():
    cb = terms(layer='3', lambda_kl=0.25, reverse_kl=True)
    for twin in (copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
        assert torch.equal(fit(get_learner(twin)), fit(get_learner(terms(layer='3', lambda_kl=0.25, reverse_kl=True))))


# ---- Warnings ----


def told(learn, n=1):
    "The warnings of the callback"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(learn, n)
    return [str(w.message) for w in caught if 'GiniLossCallback' in str(w.message)]


def dead_model(share):
    model = get_model()
    with torch.no_grad():
        model[2].bias[: round(12 * share)] = -1e3
    return model


def one_class_first():
    order = Y.argsort()
    dls = get_dls(bs=16)
    dls.train.dataset = Pairs(zip(X[order], Y[order]))
    return dls


class Constant(nn.Module):
    "Channels that fire equally for everything"

    def forward(self, x):
        return torch.ones_like(x) + 0 * x


class Forced(nn.Module):
    "Channels that fire only for the given classes, which it reads from the colour of the images"

    def __init__(self, per_channel):
        super().__init__()
        self.scale, self.register = nn.Parameter(torch.ones(1)), per_channel
        self.head = nn.Linear(len(per_channel), N)
        self.tap = 'body'
        self.body = nn.Identity()

    def forward(self, x):
        label = torch.tensor([(x[i] - X).flatten(1).norm(dim=1).argmin() for i in range(len(x))]) % N
        A = (label[:, None] == torch.tensor(self.register)).float() * self.scale
        return self.head(self.body(A))


STUCK = {
    'dead channels': (lambda: get_learner(terms(), model=dead_model(0.75)), "9 of 12 channels never fired"),
    'all channels dead': (lambda: get_learner(terms(), model=dead_model(1)), "12 of 12 channels never fired"),
    'one class per batch': (lambda: get_learner(terms(), dls=one_class_first()), "no batch held images of two classes"),
    'alike for all': (
        lambda: get_learner(terms(layer='4'), model=nn.Sequential(*get_model()[:4], Constant(), *get_model()[4:])),
        "L_Gini stayed at its maximum",
    ),
    'collapsed': (
        lambda: get_learner(terms(), model=Forced([2] * 6), lr=0.0),
        "all channels fire for the same class",
    ),
    'collapsed, reversed': (
        lambda: get_learner(terms(reverse_kl=True), model=Forced([2] * 6), lr=0.0),
        "all channels fire for the same class",
    ),
    'pure': (lambda: get_learner(terms(), model=Forced([0, 1, 2, 3]), lr=0.0), "each channel fires for a single class"),
    'started too late': (lambda: get_learner(terms(start_epoch=3)), "this fit ends with epoch 1"),
}


@pytest.mark.parametrize('name', STUCK)
def test_it_warns_once_of_what_is_stuck(name):
    make, message = STUCK[name]
    first = told(make(), 2)
    assert len(first) == 1 and message in first[0], first
    learn = make()
    told(learn, 2)
    assert len(told(learn, 2)) == 1  # again in the next fit, once


def test_it_does_not_warn_of_terms_that_are_off():
    assert told(get_learner(terms(lambda_gini=0, lambda_kl=0), model=dead_model(1))) == []
    assert told(get_learner(terms(lambda_gini=0, lambda_kl=0), dls=one_class_first())) == []


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(reverse_kl=True),
        dict(layer=['1', '3']),
        dict(layer='5', rectify='abs'),
        dict(rectify='relu'),
        dict(running=5),
    ],
    ids=str,
)
def test_no_false_warning(kwargs):
    "No warning in four epochs of ordinary training, nor in lr_find, with a dead channel or two"
    learn = get_learner(terms(**kwargs), dls=get_dls(shuffle=True), model=dead_model(0.2))
    assert told(learn, 4) == []


def test_no_false_warning_in_lr_find(tmp_path):
    learn = get_learner(GiniLossCallback(), path=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with learn.no_logging(), learn.no_bar():
            learn.lr_find(show_plot=False, num_it=8)
    assert [w for w in caught if 'GiniLossCallback' in str(w.message)] == []


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    "Raises for operations that read a value or whose shape depends on values"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(s in str(func) for s in SYNC), f"{func} waits for the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('running', [None, 3])
def test_judging_waits_for_no_device_in_a_step(running):
    "The sums for the warnings stay on the device and are read once per epoch"
    cb = terms(running=running)
    learn = get_learner(cb)
    fit(learn)
    A = torch.rand(16, 12).requires_grad_()
    for y in (Y[:16], F.one_hot(Y[:16], N).float()):
        measured, seen = cb.losses[0].measure(A, y), health.LayerEpoch()
        with NoWaiting():
            for i in range(2):
                seen.add(measured, 16, i)
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            measured.gini.item()  # the check can fail


def test_no_false_warning_in_the_demonstration():
    pytest.importorskip('sklearn')
    from gini_loss.demo import run_demo

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run_demo(epochs=3, start_epoch=1, per_class=40, width=4, device='cpu')
    assert [str(w.message) for w in caught if 'GiniLossCallback' in str(w.message)] == []


def test_an_epoch_without_a_batch_is_not_judged():
    assert health.find_problems(health.LayerEpoch()) == []


def test_judging_goes_by_the_labels_of_all_processes():
    "The label mass is summed over processes: one class here may be several in the whole batch, and so is n"
    live, gini, kl = torch.ones(3, dtype=torch.bool), torch.tensor(0.75), torch.tensor(0.0)
    usable, g, flat, one = health.batch_signs(Measured(gini, kl, live, torch.tensor([2.0, 1, 1, 0, 1])))
    assert usable == 1 and g == 0.75 and flat == 0
    assert (
        health.batch_signs(Measured(gini, kl, live, torch.tensor([3.0, 0])))[0] == 0
        and sum(health.batch_signs(Measured(gini, kl, live, torch.zeros(0)))) == 0
    )


@pytest.mark.parametrize('skipped', [0, 20])
def test_judging_some_batches_of_an_epoch(skipped, monkeypatch):
    "The first sixteen batches, every sixteenth after that, and the first that is trained on; the terms average over all"
    judged, seen = [], []
    real = health.batch_signs
    monkeypatch.setattr(health, 'batch_signs', lambda measured: judged.append(cb.learn.iter) or real(measured))

    class Skip(Callback):
        order = -1

        def before_batch(self):
            if self.training and self.iter < skipped:
                raise CancelBatchException

        def after_loss(self):
            pass

    class See(Callback):
        order = 5.5

        def after_loss(self):
            if self.training:
                seen.append(list(cb.values.values()))

    cb = terms()
    k = -(-200 // len(X))
    data = Pairs(zip(torch.cat([X] * k)[:200], torch.arange(200) % N))
    dls = DataLoaders(Loader(data, bs=4), Loader(Pairs(data[:32]), bs=16), device='cpu')
    dls.c = N
    learn = get_learner(cb, Skip(), See(), dls=dls)
    assert told(learn) == []
    assert judged == ([*range(16), 16, 32, 48] if not skipped else [20, 32, 48]) and len(seen) == 50 - skipped
    means = [float(o) for o in seen[-1]]
    assert means == pytest.approx(learn.recorder.values[-1][-2:]) and 0 < means[0] < 1
