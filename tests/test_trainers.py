"""In trainers that are not fastai's: the terms arrive in the gradient once, on one process and on two, and pages say what they need."""

import copy, importlib.util, json, os, re, signal, socket, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from gini_loss.losses import GiniKLLoss
from gini_loss.tap import FeatureTap, find_channel_dim

TIMEOUT = 420  # seconds until processes that hang are ended; a run takes about a tenth of that
NBS = Path(__file__).resolve().parent.parent / 'nbs'


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


def make_batch(n=24):
    "Sorted labels: of two consecutive halves each lacks classes that the other has"
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=g), torch.randint(0, 5, (n,), generator=g).sort().values


def gradients(parts=1, aux=None, base=1.0):
    "Mean over consecutive parts of the batch of base·cross-entropy + terms, by hand, on one process"
    model, aux = make_model(), aux or GiniKLLoss(1.0, 0.7)
    with FeatureTap(model, '3') as tap:
        for x, y in zip(*(t.chunk(parts) for t in make_batch())):
            ((base * cross_entropy(model(x), y) + aux(tap.pop(), y)) / parts).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def apart(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


# ---- Two processes ----

SCRIPT = '''
import os, sys, traceback, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, os.environ["TESTS"])
try:
    import torch, torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset
    from gini_loss.losses import GiniKLLoss
    from gini_loss.tap import FeatureTap
    from test_trainers import make_batch, make_model
    torch.set_num_threads(1)
    out, rank = {}, int(os.environ["RANK"])
    data = TensorDataset(*make_batch())
    if "accelerate" in sys.argv:
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        for name, distributed in (("accelerate", True), ("alone", False)):
            model, loader = accelerator.prepare(make_model(), DataLoader(data, 12))
            aux = GiniKLLoss(1., .7, distributed=distributed)
            with FeatureTap(model, "3") as tap:
                for x, y in loader:
                    assert len(x) == 12
                    accelerator.backward(cross_entropy(model(x), y) + aux(tap.pop(), y))
            out[name] = [p.grad.clone() for p in accelerator.unwrap_model(model).parameters()]
    if "lightning" in sys.argv:
        import lightning as L
        class Module(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.aux = make_model(), GiniKLLoss(1., .7)
            def training_step(self, batch, i):
                x, y = batch
                assert len(x) == 12
                with FeatureTap(self.net, "3") as tap: return cross_entropy(self.net(x), y) + self.aux(tap.pop(), y)
            def on_before_optimizer_step(self, optimizer): out["lightning"] = [p.grad.clone() for p in self.net.parameters()]
            def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=.1)
        L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False, default_root_dir=os.getcwd()).fit(Module(), DataLoader(data, 12))
        out["world"] = dist.get_world_size()
    if rank == 0: torch.save(out, "out.pt")
    dist.barrier(); dist.destroy_process_group()
except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
sys.stdout.flush(); sys.stderr.flush()
import os; os._exit(0)
'''


def have(name):
    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "What the first of two processes found, started as `torchrun` does"
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo backend")
    names = [n for n in ('accelerate', 'lightning') if have(n)]
    if not names:
        pytest.skip("neither accelerate nor lightning is installed")
    folder = tmp_path_factory.mktemp('trainers')
    (folder / 'script.py').write_text(SCRIPT)
    root = str(Path(__file__).resolve().parent.parent)
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'TESTS': str(Path(__file__).parent),
        'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep),
    }
    interface = next((name for _, name in socket.if_nameindex() if name in ('lo', 'lo0')), None)
    if interface:
        env['GLOO_SOCKET_IFNAME'] = interface  # no need of a network that resolves this machine's name
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--local-addr',
        '127.0.0.1',
        '--nproc-per-node',
        '2',
        'script.py',
        *names,
    ]
    log = folder / 'log.txt'
    with open(log, 'w') as f:
        run = subprocess.Popen(command, cwd=folder, env=env, stdout=f, stderr=f, start_new_session=True)
    try:
        code = run.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        pytest.fail(
            f"the processes did not end in {TIMEOUT} s: one of them waits for another\n{log.read_text()[-3000:]}"
        )
    assert code == 0, log.read_text()[-4000:]
    return torch.load(folder / 'out.pt', weights_only=False)


@pytest.mark.parametrize('trainer', ['accelerate', 'lightning'])
def test_a_step_on_two_processes_is_that_of_one(two_processes, trainer):
    pytest.importorskip(trainer)
    assert apart(two_processes[trainer], gradients()) < 1e-6
    if trainer == 'lightning':
        assert two_processes['world'] == 2


def test_without_the_sums_over_processes_it_would_not_be(two_processes):
    "The comparison above can fail: each process with terms of its own takes another step, the mean over the halves"
    pytest.importorskip('accelerate')
    assert apart(two_processes['alone'], gradients()) > 1e-3
    assert apart(two_processes['alone'], gradients(parts=2)) < 1e-6


# ---- Gradient accumulation in Hugging Face's Trainer ----


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    "A function (steps, weight, accepts) → gradients before the first step of the optimiser"
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    folder = str(tmp_path_factory.mktemp('hf'))
    x, y = make_batch()

    class Model(nn.Module):
        "Takes extra keywords, as the models of transformers do"

        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x=None, labels=None, **kwargs):
            logits = self.net(x)
            if labels is None:
                return dict(logits=logits)
            n = kwargs.get('num_items_in_batch')
            return dict(
                loss=cross_entropy(logits, labels) if n is None else cross_entropy(logits, labels, reduction='sum') / n,
                logits=logits,
            )

    class GiniTrainer(transformers.Trainer):
        "As on the page about transformers"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs['labels']
            with FeatureTap(model, 'net.3') as tap:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                loss = loss + self.aux(tap.pop(), labels)
            return (loss, outputs) if return_outputs else loss

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.grads = [p.grad.clone() for p in model.parameters()]

    def run(steps, weight, accepts):
        args = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=24 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0,
            save_strategy='no',
            logging_strategy='no',
            report_to='none',
            use_cpu=True,
            disable_tqdm=True,
        )
        look = Look()
        trainer = GiniTrainer(
            Model(), args, train_dataset=[dict(x=a, labels=b) for a, b in zip(x, y)], callbacks=[look]
        )
        trainer.aux, trainer.model_accepts_loss_kwargs = GiniKLLoss(weight, 0.7 * weight), accepts
        trainer.train()
        return look.grads

    return run


@pytest.mark.parametrize('accepts, factor', [(False, 1), (True, 4)], ids=['as on the page', 'left to Trainer'])
def test_weight_of_the_terms_in_an_accumulated_step(hf, accepts, factor):
    "The page's line makes the terms count once. Without it a model that takes extra keywords gets them as often as there are small batches"
    added = [t - w for t, w in zip(hf(4, 1.0, accepts), hf(4, 0.0, accepts))]
    terms = gradients(4, base=0)
    assert max(t.abs().max() for t in terms) > 1e-2
    assert apart(added, [factor * t for t in terms]) < 1e-5


def test_the_whole_step_of_the_trainer(hf):
    assert apart(hf(4, 1.0, False), gradients(4)) < 1e-6
    assert apart(hf(1, 1.0, False), gradients()) < 1e-6


# ---- What the pages say of DataParallel, and of a library that is not there ----


def test_copies_of_data_parallel_are_noticed():
    "DataParallel runs shallow copies of each layer, which share its hooks: the tap must not hand out a part of the batch"
    model, (x, _) = make_model(), make_batch()
    with FeatureTap(model, '3') as tap:
        replica = copy.copy(model)
        replica._modules = {k: m._replicate_for_data_parallel() for k, m in model._modules.items()}
        for k in ('0', '2', '4'):  # a copy has no parameters of its own
            for p in ('weight', 'bias'):
                setattr(replica._modules[k], p, getattr(model._modules[k], p).clone())
        model(x[:12]), replica(x[12:])
        with pytest.raises(RuntimeError, match="layer '3' ran 2 times"):
            tap.pop()


@pytest.mark.parametrize(
    'page, library',
    [
        ('15_lightning', 'lightning'),
        ('16_transformers', 'transformers'),
        ('16_transformers', 'accelerate'),
        ('17_timm', 'timm'),
        ('18_accelerate', 'accelerate'),
    ],
)
def test_a_page_says_in_a_line_how_to_install_what_it_needs(page, library):
    "In its introduction for the reader's machine, in its first code cell for Colab"
    cells = json.loads((NBS / f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    introduction = ''.join(cells[1]['source'])
    first = ''.join(next(c['source'] for c in cells if c['cell_type'] == 'code'))
    assert re.search(rf"`pip install [^`]*\b{library}\b", introduction)
    assert first.startswith('#| hide') and re.search(rf"pip install [^\n]*\b{library}\b", first)


def test_the_block_of_plain_pytorch_runs_as_copied(capsys):
    "In an empty namespace, with its own data, and it learns"
    pytest.importorskip('sklearn')
    cells = json.loads((NBS / '14_pytorch.ipynb').read_text(encoding='utf-8'))['cells']
    at = next(i for i, c in enumerate(cells) if ''.join(c['source']).startswith('## In one block'))
    torch.manual_seed(0)
    namespace = {}
    exec(''.join(cells[at + 1]['source']), namespace)
    assert 'epoch 4: loss' in capsys.readouterr().out and not namespace['model'][3]._forward_hooks
    with torch.no_grad():
        accuracy = (namespace['model'](namespace['x']).argmax(1) == namespace['y']).float().mean()
    assert accuracy > 0.7


# --- transformers: the layer that is tapped when none is named


@pytest.mark.parametrize(
    'make,name,channel_dim',
    [
        (
            lambda t: t.ResNetForImageClassification(
                t.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
            ),
            'resnet.encoder.stages.1',
            1,
        ),
        (
            lambda t: t.ResNetModel(
                t.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
            ),
            'encoder.stages.1',
            1,
        ),
        (
            lambda t: t.ConvNextForImageClassification(
                t.ConvNextConfig(num_channels=1, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=10)
            ),
            'convnext.encoder.stages.1',
            1,
        ),
    ],
    ids=['ResNet', 'ResNet without a head', 'ConvNeXt'],
)
def test_the_last_stage_of_a_model_of_transformers(make, name, channel_dim):
    "Its outer parts return records, the last stage a tensor with as many channels as the classifier reads"
    transformers = pytest.importorskip('transformers')
    model = make(transformers)
    with FeatureTap(model) as tap:
        model(pixel_values=torch.rand(2, 1, 32, 32))
        A = tap.pop()
    assert tap.name == name and A.shape[:2] == (2, 16) and find_channel_dim(model, A) == channel_dim


SMALL = dict(vocab_size=60, num_labels=4, pad_token_id=0)
TEXT = {
    'BART: its decoder': (
        lambda t: t.BartForSequenceClassification(
            t.BartConfig(
                **SMALL,
                d_model=16,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                eos_token_id=2,
            )
        ),
        'model.decoder.layers.1',
    ),
    'DistilBERT': (
        lambda t: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
        ),
        'distilbert.transformer.layer.1',
    ),
    'GPT-2': (
        lambda t: t.GPT2ForSequenceClassification(t.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2)),
        'transformer.h.1',
    ),
}


@pytest.mark.parametrize('kind', TEXT)
def test_the_last_stage_of_a_text_model_of_transformers(kind):
    make, name = TEXT[kind]
    model = make(pytest.importorskip('transformers'))
    ids = torch.randint(5, 60, (4, 6))
    ids[:, -1] = 2
    with FeatureTap(model) as tap:
        model(input_ids=ids)
        A = tap.pop()
    assert tap.name == name and A.shape == (4, 6, 16) and find_channel_dim(model, A, tap.module) in (-1, 2)


def test_the_last_stage_of_a_model_of_timm_in_transformers():
    "Not the model of timm itself, which returns the logits"
    pytest.importorskip('timm')
    t = pytest.importorskip('transformers')
    options = dict(layers=(1, 1, 1, 1), channels=(4, 8, 12, 16), stem_width=4)
    config = t.TimmWrapperConfig(architecture='resnet18', num_labels=4, model_args=options)
    model = t.TimmWrapperForImageClassification(config)
    with FeatureTap(model) as tap:
        model(pixel_values=torch.rand(2, 3, 32, 32))
        assert tap.name == 'timm_model.layer4' and tap.pop().shape[:2] == (2, 16)


def test_padding_tokens_do_not_count():
    "The same texts have the same terms whatever they are padded to, with a mask; without one they have not"
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=4,
        )
    ).eval()
    ids, y, found = torch.randint(5, 60, (4, 6)), torch.tensor([0, 1, 0, 2]), []
    for pad in (0, 50):
        real = nn.functional.pad(torch.ones_like(ids), (0, pad))
        with FeatureTap(model) as tap:
            model(input_ids=nn.functional.pad(ids, (0, pad)), attention_mask=real)
            A = tap.pop()
        aux = GiniKLLoss(channel_dim=find_channel_dim(model, A, tap.module))
        found.append((torch.stack(aux.terms(A, y, real.bool())), torch.stack(aux.terms(A, y))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][0], found[0][1], rtol=1e-5, atol=1e-7)
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3
