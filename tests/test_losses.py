"""The loss as a module: memory layouts, subclasses, compilation, copies."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from oracle import terms_and_gradients

from gini_loss.losses import GiniKLLoss, class_probs, diagnostics, gini_loss, kl_loss
from gini_loss.running import RunningGiniKLLoss

# ---- Layouts, subclasses, compilation, copies ----


def other_layouts(A):
    yield A.to(memory_format=torch.channels_last)
    yield A.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat([A, A])[: len(A)]
    big = torch.empty(A.shape[0] * 2, A.shape[1], A.shape[2] * 2, A.shape[3]).copy_(torch.rand(1))
    big[::2, :, ::2] = A
    yield big[::2, :, ::2]
    yield A.flip(0).flip(0)


def test_memory_layout_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.randn(10, 6, 4, 5), torch.randint(0, 4, (20,))
    for targets in (y[:10], torch.rand(20, 4)[:10]):
        expected = terms_and_gradients(A, targets)
        for other in other_layouts(A):
            assert torch.equal(other, A)
            for got, e in zip(terms_and_gradients(other, targets), expected):
                torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        strided = torch.stack([y, y * 1000], 1)[:10, 1]  # a column of a table: not contiguous; renumbered
        for got, e in zip(terms_and_gradients(A, strided), terms_and_gradients(A, strided.contiguous())):
            assert torch.equal(got, e)
    expanded = A[:1].expand(10, -1, -1, -1)
    for got, e in zip(terms_and_gradients(expanded, y[:10])[:2], terms_and_gradients(expanded.clone(), y[:10])[:2]):
        torch.testing.assert_close(got, e)


def test_inputs_are_not_changed():
    A, y, soft = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, 2, 0]), torch.rand(6, 4)
    before = [t.clone() for t in (A, y, soft)]
    for targets in (y, soft):
        GiniKLLoss()(A, targets)
        diagnostics(A, targets)
    assert all(torch.equal(a, b) for a, b in zip((A, y, soft), before))


def test_tensor_subclasses():
    core = pytest.importorskip('fastai.torch_core')
    torch.manual_seed(0)
    A, y = torch.randn(8, 3, 2, 2), torch.randint(0, 3, (8,))
    for kind, target in (
        (core.TensorImage, core.TensorCategory),
        (core.TensorImageBW, core.TensorCategory),
        (core.TensorBase, core.TensorBase),
    ):
        x = kind(A.clone()).requires_grad_()
        loss = GiniKLLoss()(x, target(y))
        loss.backward()
        assert type(loss) is torch.Tensor and torch.equal(loss, GiniKLLoss()(A, y)) and x.grad is not None
        assert all(type(t) in (torch.Tensor, float) for t in diagnostics(kind(A), target(y)))
        assert torch.equal(GiniKLLoss()(kind(A), core.TensorMultiCategory(torch.eye(3)[y])), loss)
    assert type(gini_loss(torch.nn.Parameter(A), y)) is torch.Tensor


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(n_classes=5),
        dict(n_classes=10**6, reverse_kl=True),
        dict(rectify='relu', channel_dim=-1),
        dict(rectify='none', n_classes=5),
    ],
    ids=str,
)
@pytest.mark.parametrize('soft', [False, True])
def test_compiled_with_fullgraph(kwargs, soft):
    torch.manual_seed(0)
    torch._dynamo.reset()
    A, y = torch.randn(16, 8, 6), torch.randint(0, 5, (16,))
    y[3] = -100
    if kwargs.get('rectify') == 'none':
        A = A.abs()
    if soft:
        y = torch.rand(16, 5)
        kwargs = {**kwargs, 'n_classes': 5}
    compiled = torch.compile(GiniKLLoss(**kwargs).terms, fullgraph=True, backend='aot_eager')
    x = A.clone().requires_grad_()
    gini, kl = compiled(x, y)
    for got, expected in zip(
        (gini, kl, *(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (gini, kl))),
        terms_and_gradients(A, y, **kwargs),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="the exporter of an older torch fixes the size of the batch")
@pytest.mark.parametrize('soft', [False, True])
def test_exported_with_a_batch_of_any_size(soft):
    "The batch dimension stays dynamic"
    A, y = torch.rand(6, 4, 3, 3), torch.rand(6, 3).softmax(1) if soft else torch.arange(6) % 3
    size = torch.export.Dim('size', min=2)
    exported = torch.export.export(GiniKLLoss(), (A, y), dynamic_shapes=({0: size}, {0: size})).module()
    twice = torch.cat([A, A.flip(1)]), torch.cat([y, y])
    torch.testing.assert_close(exported(*twice), GiniKLLoss()(*twice))


@pytest.mark.parametrize('bad', ['nan', 'label too large', 'label below 0', 'negative', 'soft'])
def test_compiled_checks_are_not_lost(bad):
    torch._dynamo.reset()
    A, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    compiled = torch.compile(GiniKLLoss(n_classes=3, rectify='none').terms, fullgraph=True, backend='aot_eager')
    compiled(A, y)
    if bad == 'nan':
        A[1, 1] = math.nan
    if bad == 'negative':
        A[1, 1] = -1
    if bad == 'label too large':
        y[0] = 3
    if bad == 'label below 0':
        y[0] = -1
    if bad == 'soft':
        y = -torch.eye(3)[y]
    with pytest.raises((RuntimeError, AssertionError), match="check on the loss's input"):
        compiled(A, y)


def test_module_is_plain():
    "The loss has no parameters, buffers or state, and can be copied, pickled and moved like any module"
    loss = GiniKLLoss(0.25, 0.75, rectify='relu', reverse_kl=True, n_classes=7)
    A, y = torch.randn(6, 3), torch.arange(6)
    assert not list(loss.parameters()) and not loss.state_dict()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half().train()):
        assert torch.equal(twin(A, y), loss(A, y))
    assert "lambda_gini=0.25, lambda_kl=0.75" in repr(loss)


def test_made_on_the_meta_device():
    "As in a network that is made without memory and filled later: the prior is kept"
    A, y = torch.rand(6, 3), torch.arange(6) % 3
    with torch.device('meta'):
        plain, running = GiniKLLoss(class_prior=[1, 2, 3]), RunningGiniKLLoss(class_prior=[1, 2, 3])
    expected = GiniKLLoss(class_prior=[1, 2, 3])(A, y)
    assert plain(A, y) == expected and running.to_empty(device='cpu')(A, y) == expected


def test_works_without_gradients():
    A, y = torch.rand(6, 3), torch.arange(6)
    with torch.no_grad():
        a = GiniKLLoss()(A.clone().requires_grad_(), y)
    with torch.inference_mode():
        b = GiniKLLoss()(A, y)
    assert not a.requires_grad and torch.equal(a, b)


# ---- Promises of a docstring ----


@pytest.mark.parametrize('total, dead', [(1e-26, True), (1.1e-26, False)])
def test_a_channel_is_dead_whose_class_means_sum_to_1e_26_or_less(total, dead):
    P = class_probs(torch.tensor([[total, 0.0]], dtype=torch.float64))
    assert P.tolist() == ([[0, 0]] if dead else [[1, 0]])


@pytest.mark.parametrize('reverse', [False, True])
def test_diagnostics_have_the_divergence_in_the_direction_that_was_asked_for(reverse):
    A, y = torch.rand(8, 5), torch.arange(8) % 3
    found = diagnostics(A, y, reverse_kl=reverse).kl
    assert found == pytest.approx(kl_loss(A, y, reverse=reverse).item())
    assert found != pytest.approx(kl_loss(A, y, reverse=not reverse).item(), rel=1e-3)
