"""What the loss costs: time and memory beside other losses, how they grow, their share of a training step, inference,
training throughput, and start-up.

    python benchmarks/cost.py            # everything, some 6 minutes on two quiet cores; writes a record to results/
    python benchmarks/cost.py --quick    # a minute, fewer rounds and sizes; writes nothing unless --out is given
    python benchmarks/cost.py --only import step

Each round runs all candidates in turn, so other load on the machine affects all of them. Shown are the median over the
rounds, the smallest and the largest. A ratio is the median of the ratios within each round. Times are forward and
backward together. On one CPU thread they are CPU seconds of the process, which do not count the time of other programs;
else, and for throughput, they are seconds of the wall clock. On Linux, the C library keeps memory that was
freed, as a GPU's allocator does. Otherwise a candidate would pay, by chance, for pages that another one gave back.
The other losses come from pytorch-metric-learning, and are left out without it (pip install pytorch-metric-learning).
"""

import argparse, ctypes, datetime, json, math, os, platform, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '5')
warnings.filterwarnings('ignore')
import torch
from torch.nn import functional as F

from gini_loss.losses import GiniKLLoss
from gini_loss.tap import FeatureTap

SECTIONS = ('losses', 'classes', 'sizes', 'step', 'inference', 'throughput', 'import')
DEFAULT = dict(m=256, c=512, side=4, n=100)


def keep_freed_memory():
    "True if the C library now keeps all memory that was freed"
    try:
        libc = ctypes.CDLL('libc.so.6')
    except OSError:
        return False
    return bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def plain_terms(A, y, n):
    "Equations 1 to 8 as in the derivation, with a one-hot matrix of all n classes and the authors' epsilon"
    eps = 1e-10
    M = A.abs().mean((2, 3))
    Y = F.one_hot(y, n).float()
    S = M.T @ (Y / (Y.sum(0) + eps))  # Eqs. 4 and 3
    P = S / (S.sum(1, keepdim=True) + eps)  # Eq. 2
    hS, hY = P.sum(0) / P.sum(), Y.sum(0) / len(Y)  # Eqs. 6 and 7
    return (1 - P.square().sum(1)).mean(), (hS * ((hS + eps) / (hY + eps)).log()).sum()  # Eqs. 1 and 5


class Timer:
    "Runs candidates in turns and keeps the seconds of each"

    def __init__(self, device, rounds, clock=time.perf_counter):
        self.device, self.rounds, self.clock = device, rounds, clock

    def wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def once(self, f, k=1):
        self.wait()
        start = self.clock()
        for _ in range(k):
            f()
        self.wait()
        return (self.clock() - start) / k

    def compare(self, candidates, rounds=None, at_least=0.02):
        """`{name: {median, low, high, rounds}}` in seconds. Two runs before the first round warm up and determine how
        often to repeat short candidates"""
        for f in candidates.values():
            self.once(f)
        times = {
            name: max(1, min(200, math.ceil(at_least / max(self.once(f), 1e-7)))) for name, f in candidates.items()
        }
        rows = {name: [] for name in candidates}
        for _ in range(rounds or self.rounds):
            for name, f in candidates.items():
                f()  # brings its data into the caches
                rows[name].append(self.once(f, times[name]))
        return {name: summary(o) for name, o in rows.items()}


def summary(o):
    return dict(median=statistics.median(o), low=min(o), high=max(o), rounds=o)


def ratio(a, b):
    "Median, smallest and largest of the ratios within each round"
    r = [x / y for x, y in zip(a['rounds'], b['rounds'])]
    return dict(median=statistics.median(r), low=min(r), high=max(r))


def slope(xs, ys):
    "Exponent of a power law through the points: least squares of log y on log x"
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    a, b = statistics.mean(x), statistics.mean(y)
    return sum((p - a) * (q - b) for p, q in zip(x, y)) / sum((p - a) ** 2 for p in x)


def peak_bytes(f, device):
    "Peak of the bytes that `f` allocates, beyond those allocated before"
    f()
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        f()
    now = peak = 0
    for e in sorted(
        (e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()
    ):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def kept_bytes(loss, A):
    "Bytes of the arrays that are kept for the backward pass, without the maps"
    kept, own = {}, A.untyped_storage().data_ptr()

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = loss()
    del out
    return sum(v for k, v in kept.items() if k != own)


def batch(device, m=DEFAULT['m'], c=DEFAULT['c'], side=DEFAULT['side'], n=DEFAULT['n'], present=None):
    "Maps, and labels drawn from all n classes or from `present` of them, spread over the n"
    g = torch.Generator().manual_seed(0)
    A = torch.randn(m, c, side, side, generator=g).relu_().to(device)
    present = present or n
    return A.requires_grad_(), torch.randint(0, present, (m,), generator=g).to(device) * (n // present)


def both(loss, A):
    "A function that runs `loss` forward and backward"

    def run():
        torch.autograd.grad(loss(), A)

    return run


def ours(A, y, n):
    loss = GiniKLLoss(n_classes=n)
    return lambda: loss(A, y)


def plain(A, y, n):
    def loss():
        gini, kl = plain_terms(A, y, n)
        return 0.5 * gini + 0.5 * kl

    return loss


def bandwidth(timer):
    "Bytes per second for reading a large array and for copying it"
    x = torch.rand(2**26 if timer.device.type == 'cuda' else 2**24, device=timer.device)
    z = torch.empty_like(x)
    nbytes = x.numel() * 4
    t = timer.compare(dict(read=lambda: x.sum(), copy=lambda: z.copy_(x)))
    return dict(read=nbytes / t['read']['median'], copy=2 * nbytes / t['copy']['median'])


def floor_seconds(A, speed):
    """Seconds that the memory bandwidth allows: the maps are read once in the forward pass, and in the backward pass
    they are read once and their gradient is written"""
    nbytes = A.numel() * A.element_size()
    return nbytes / speed['read'] + 2 * nbytes / speed['copy']


def section_losses(timer, speed, quick):
    A, y = batch(timer.device)
    m, c = A.shape[:2]
    n = DEFAULT['n']
    logits = torch.randn(m, n, device=timer.device).requires_grad_()
    losses = {'gini_loss': ours(A, y, n), 'plain one-hot form': plain(A, y, n)}
    inputs = {name: A for name in losses}
    try:
        from pytorch_metric_learning import losses as pml
    except ImportError:
        print(
            "pytorch-metric-learning is not installed: its losses are left out. To have them: pip install"
            " pytorch-metric-learning"
        )
    else:
        for name, loss in {
            'SupConLoss': pml.SupConLoss(),
            'ProxyNCALoss (a centre per class)': pml.ProxyNCALoss(n, c),
            'ArcFaceLoss': pml.ArcFaceLoss(n, c),
        }.items():
            loss.to(timer.device)
            losses[name], inputs[name] = (lambda loss=loss: loss(A.mean((2, 3)), y)), A
    name = 'cross-entropy, label smoothing (logits only)'
    losses[name] = lambda: F.cross_entropy(logits, y, label_smoothing=0.1)
    inputs[name] = logits
    times = timer.compare({k: both(f, inputs[k]) for k, f in losses.items()})
    rows = [
        dict(
            name=k,
            seconds=times[k],
            ratio=ratio(times[k], times['gini_loss']),
            peak_bytes=peak_bytes(both(f, inputs[k]), timer.device),
            kept_bytes=kept_bytes(f, inputs[k]),
        )
        for k, f in losses.items()
    ]
    out = dict(shape=list(A.shape), n=n, map_bytes=A.numel() * 4, floor_seconds=floor_seconds(A, speed), rows=rows)
    print(
        f"\nForward and backward on {tuple(A.shape)}, {n} classes; the maps are {A.numel() * 4 / 2**20:.1f} MiB, the"
        f" hardware's floor is {1e3 * out['floor_seconds']:.2f} ms"
    )
    print(f"{'':<46}{'ms, median (range)':>28}{'against gini_loss':>19}{'peak MiB':>10}{'kept MiB':>10}")
    for r in rows:
        s, peak, kept = r['seconds'], r['peak_bytes'] / 2**20, r['kept_bytes'] / 2**20
        took = f"{1e3 * s['median']:.2f} ({1e3 * s['low']:.2f} to {1e3 * s['high']:.2f})"
        print(f"{r['name']:<46}{took:>28}{r['ratio']['median']:>18.2f}×{peak:>10.2f}{kept:>10.2f}")
    return out


def sweep(timer, name, xs, quick, most_plain=math.inf, **fixed):
    "Both forms for several values of one size, in turns; the exponents of time and of peak memory"
    points, candidates = [], {}
    for x in xs:
        sizes = {**DEFAULT, **fixed, name: x}
        A, y = batch(timer.device, **sizes)
        for form, make in dict(ours=ours, plain=plain).items():
            if form == 'ours' or sizes['n'] <= most_plain:
                candidates[x, form] = (both(make(A, y, sizes['n']), A), A)
    times = timer.compare({k: f for k, (f, _) in candidates.items()})
    for (x, form), (f, A) in candidates.items():
        points.append(
            dict(
                x=x, form=form, seconds=times[x, form], peak_bytes=peak_bytes(f, timer.device), map_bytes=A.numel() * 4
            )
        )
    exponents = {}
    for form in ('ours', 'plain'):
        own = [p for p in points if p['form'] == form]
        sizes = [p['x'] for p in own]
        exponents[form] = dict(
            seconds=slope(sizes, [p['seconds']['median'] for p in own]),
            peak_bytes=slope(sizes, [p['peak_bytes'] for p in own]),
        )
    print(f"\n{name}: " + ', '.join(f"{k}={v}" for k, v in {**DEFAULT, **fixed}.items() if k != name))
    for p in points:
        print(
            f"  {p['x']:>9,} {p['form']:<6}{1e3 * p['seconds']['median']:>9.2f} ms{p['peak_bytes'] / 2**20:>10.2f} MiB"
        )
    print(
        '  exponents: '
        + ', '.join(f"{form} {e['seconds']:.2f} (time) {e['peak_bytes']:.2f} (memory)" for form, e in exponents.items())
    )
    return dict(fixed={k: v for k, v in {**DEFAULT, **fixed}.items() if k != name}, points=points, exponents=exponents)


def section_classes(timer, speed, quick):
    """The number of classes n, for maps and for pooled features, where the class averages are as many numbers as the
    input. Labels are drawn from all n classes; under 'same classes', from 100 of them, the same images each time"""
    ns = [10, 100, 1000, 10**6] if quick else [10, 30, 100, 300, 1000, 10**4, 10**5, 10**6]
    features, from_100 = dict(m=512, c=2048, side=1), [n for n in ns if n >= 100]
    out = sweep_classes(timer, ns, quick)
    out['features'] = sweep_classes(timer, ns, quick, **features)
    out['same classes'] = sweep_classes(timer, from_100, quick, present=100)
    out['features, same classes'] = sweep_classes(timer, from_100, quick, present=100, **features)
    return out


def sweep_classes(timer, ns, quick, **fixed):
    "A sweep over n; `flat` compares with the smallest n, and with the plain form at 100 classes"
    most_plain = 1000 if quick or fixed.get('c', 0) > 1000 else 10**4
    out = sweep(timer, 'n', ns, quick, most_plain, **fixed)
    mine = {p['x']: p for p in out['points'] if p['form'] == 'ours'}
    plain100 = next(p for p in out['points'] if p['form'] == 'plain' and p['x'] == 100)

    def times(a, b):
        return ratio(a['seconds'], b['seconds'])['median']

    def memory(a, b):
        return a['peak_bytes'] / b['peak_bytes']

    out['flat'] = {
        key: dict(
            least=ns[0],
            million_to_least=f(mine[10**6], mine[ns[0]]),
            most_to_least=max(f(p, mine[ns[0]]) for p in mine.values()),
            million_to_plain_100=f(mine[10**6], plain100),
        )
        for key, f in dict(seconds=times, peak_bytes=memory).items()
    }
    for key, v in out['flat'].items():
        print(
            f"  {key}: a million classes to {ns[0]} {v['million_to_least']:.2f}×, at most {v['most_to_least']:.2f}×,"
            f" to the plain form at 100 {v['million_to_plain_100']:.2f}×"
        )
    return out


def section_sizes(timer, speed, quick):
    grids = (
        dict(m=[64, 256, 1024], c=[64, 256, 1024], side=[2, 4, 8])
        if quick
        else dict(m=[32, 64, 128, 256, 512, 1024], c=[64, 128, 256, 512, 1024, 2048], side=[1, 2, 4, 7, 10, 14])
    )
    return {
        name: sweep(timer, name, xs, quick, **(dict(m=128) if name == 'side' else {})) for name, xs in grids.items()
    }


def section_step(timer, speed, quick):
    from gini_loss.models import resnet18

    gpu = timer.device.type == 'cuda'
    m = 500 if gpu else 64
    rounds = (15 if gpu else 5) if quick else (31 if gpu else 9)
    torch.manual_seed(0)
    model = resnet18(100).to(timer.device)
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(m, 3, 32, 32, device=timer.device), torch.randint(0, 100, (m,), device=timer.device)
    aux, tap = GiniKLLoss(n_classes=100), FeatureTap(model)

    def step(terms):
        with torch.autocast(timer.device.type, torch.bfloat16, enabled=gpu):
            loss = F.cross_entropy(model(x), y)
        if terms:
            loss = loss + aux(tap.pop(), y)
        opt.zero_grad()
        loss.backward()
        opt.step()

    def without():
        step(False)

    def with_terms():
        with tap:
            step(True)

    with tap, torch.autocast(timer.device.type, torch.bfloat16, enabled=gpu):
        model(x)
        A = tap.pop().detach().requires_grad_()
    alone = both(lambda: aux(A, y), A)
    times = timer.compare({'step': without, 'step with the terms': with_terms, 'the terms alone': alone}, rounds)
    share, change = ratio(times['the terms alone'], times['step']), ratio(times['step with the terms'], times['step'])
    out = dict(
        arch='resnet18',
        m=m,
        dtype='bfloat16' if gpu else 'float32',
        maps=list(A.shape),
        seconds=times,
        share=share,
        change=change,
        peak_bytes={
            k: peak_bytes(f, timer.device) for k, f in {'step': without, 'step with the terms': with_terms}.items()
        },
    )
    print(
        f"\nResNet-18 on {m} images of 32×32 ({out['dtype']}): step {1e3 * times['step']['median']:.1f} ms, the"
        f" terms alone {1e3 * times['the terms alone']['median']:.2f} ms:"
        f" {100 * share['median']:.2f} % ({100 * share['low']:.2f} to {100 * share['high']:.2f}); step with them"
        f" {100 * change['median']:.1f} % ({100 * change['low']:.1f} to {100 * change['high']:.1f}) of one without"
    )
    if out['peak_bytes']:
        print("  peak memory of a step: " + ', '.join(f"{k} {v / 2**20:.1f} MiB" for k, v in out['peak_bytes'].items()))
    return out


def section_inference(timer, speed, quick):
    from gini_loss.models import resnet18

    width = 16 if quick else 64

    def network():
        torch.manual_seed(0)
        return resnet18(100, width=width).to(timer.device)

    tapped, never = network(), network()
    x, y = torch.randn(8, 3, 32, 32, device=timer.device), torch.randint(0, 100, (8,), device=timer.device)
    state = {k: v.clone() for k, v in tapped.state_dict().items()}
    with FeatureTap(tapped) as tap:
        logits = tapped(x)
        (F.cross_entropy(logits, y) + GiniKLLoss()(tap.pop(), y)).backward()
    tapped.zero_grad(set_to_none=True)
    tapped.load_state_dict(state)
    programs = [torch.export.export(net.eval(), (x,)).graph_module.code for net in (tapped, never)]
    with torch.no_grad():
        times = timer.compare({'trained with the loss': lambda: tapped(x), 'never': lambda: never(x)})
        equal = torch.equal(tapped(x), never(x))
    out = dict(
        width=width,
        images=len(x),
        identical_graph=programs[0] == programs[1],
        identical_output=equal,
        seconds=times,
        ratio=ratio(times['trained with the loss'], times['never']),
    )
    print(
        f"\nInference after training with the loss: the exported graphs are"
        f" {'identical' if out['identical_graph'] else 'DIFFERENT'}, outputs {'identical' if equal else 'DIFFERENT'},"
        f" time {out['ratio']['median']:.3f}× ({out['ratio']['low']:.3f} to {out['ratio']['high']:.3f})"
    )
    return out


def cifar_files(n, folder):
    "n training images of CIFAR-100 as files, or, where it is not on disk, as many random ones written to `folder`"
    from fastai.data.external import fastai_cfg

    root = fastai_cfg().path('data') / 'cifar100'
    if (root / 'train').is_dir():
        files = sorted(root.glob('train/*/*/*.png'))
        return [files[i] for i in torch.linspace(0, len(files) - 1, n).long()], 'CIFAR-100'
    from PIL import Image

    files = []
    for i in range(n):
        path = Path(folder) / f'class{i % 100:02}' / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        files.append(path)
        Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()).save(path)
    return files, 'random images (CIFAR-100 is not on disk)'


def section_throughput(timer, speed, quick):
    """Whole epochs of a fastai `Learner`: our loader, with the terms and without, and fastai's loaders, with the same
    network and augmentation"""
    import numpy as np
    from fastai.callback.progress import ProgressCallback
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.optimizer import SGD
    from fastai.vision.augment import CropPad, FlipItem, RandomCrop
    from fastai.vision.data import ImageDataLoaders
    from PIL import Image
    from gini_loss.callback import GiniLossCallback
    from gini_loss.loader import CIFAR100_MEAN, CIFAR100_STD, device_dls
    from gini_loss.models import resnet18

    device, gpu = timer.device, timer.device.type == 'cuda'
    timer = Timer(device, timer.rounds)  # wall clock, because of the worker processes
    n, bs, width, rounds = (20_000, 500, 64, 5) if gpu else (1_500, 100, 8, 5) if not quick else (1_000, 100, 4, 5)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        files, source = cifar_files(n, folder)
        names = sorted({f.parent.name for f in files})
        images = (
            torch.from_numpy(np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files]))
            .permute(0, 3, 1, 2)
            .contiguous()
        )
        labels = torch.tensor([names.index(f.parent.name) for f in files])
        ours = lambda: device_dls((images, labels), (images[:bs], labels[:bs]), classes=names, bs=bs, device=device)
        stock = lambda workers: ImageDataLoaders.from_lists(
            files[0].parents[1],
            files,
            [f.parent.name for f in files],
            valid_pct=bs / n,
            bs=bs,
            num_workers=workers,
            device=device,
            item_tfms=[CropPad(40), RandomCrop(32), FlipItem(0.5)],
            batch_tfms=Normalize.from_stats(CIFAR100_MEAN, CIFAR100_STD),
        )

        def learner(dls, *cbs):
            torch.manual_seed(0)
            learn = Learner(
                dls, resnet18(100, width=width), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.01, cbs=cbs
            )
            learn.remove_cb(ProgressCallback)
            learn._do_epoch_validate = lambda *a, **k: None  # training alone
            return learn

        loops = {
            'gini_loss engine': learner(ours(), GiniLossCallback(start_epoch=0)),
            'gini_loss engine, terms off': learner(ours()),
            'fastai stock, no workers': learner(stock(0)),
        }
        if cores > 1:
            loops[f'fastai stock, {cores} workers'] = learner(stock(cores))
        model = loops['gini_loss engine, terms off'].model
        x, y = torch.randn(bs, 3, 32, 32, device=device), torch.randint(0, 100, (bs,), device=device)

        def compute():
            for _ in range(n // bs):
                F.cross_entropy(model(x), y).backward()

        def fit(learn):
            with learn.no_logging():
                learn.fit(1)

        times = timer.compare(
            {**{name: (lambda l=l: fit(l)) for name, l in loops.items()}, 'forward and backward alone': compute},
            rounds,
            at_least=0,
        )
        seen = {name: sum(len(b[0]) for b in l.dls.train) for name, l in loops.items()}
        seen['forward and backward alone'] = n // bs * bs
    rows = {}
    for name, t in times.items():
        per_image = [s / seen[name] for s in t['rounds']]
        base = [s / seen['forward and backward alone'] for s in times['forward and backward alone']['rounds']]
        rows[name] = dict(
            images_per_second=summary([1 / s for s in per_image]),
            not_compute=summary([1 - b / s for s, b in zip(per_image, base)]),
        )
    best = max((k for k in rows if k.startswith('fastai')), key=lambda k: rows[k]['images_per_second']['median'])
    out = dict(
        source=source,
        images=n,
        bs=bs,
        width=width,
        rows=rows,
        faster_stock=best,
        ratio=ratio(rows['gini_loss engine']['images_per_second'], rows[best]['images_per_second']),
    )
    print(
        f"\nTraining loop, ResNet-18 of width {width}, batches of {bs}, {n:,} {source}"
        f" images{'' if not gpu else ', float32'}"
    )
    for name, r in rows.items():
        o = r['images_per_second']
        print(
            f"  {name:<30}{o['median']:>9,.0f} images/s ({o['low']:,.0f} to {o['high']:,.0f}), not forward and"
            f" backward {100 * r['not_compute']['median']:.0f} %"
        )
    print(
        f"  with the terms, against the faster stock loop: {out['ratio']['median']:.2f}× ({out['ratio']['low']:.2f}"
        f" to {out['ratio']['high']:.2f})"
    )
    return out


def section_import(timer, speed, quick):
    def children():
        return os.times().children_user + os.times().children_system

    clock = children if timer.clock is time.process_time and os.name == 'posix' else time.perf_counter
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}

    def seconds(module):
        start = clock()
        subprocess.run([sys.executable, '-c', f'import {module}'], check=True, env=env)
        return clock() - start

    rows = {'torch': [], 'gini_loss': []}
    for i in range((3 if quick else 9) + 1):
        for module in rows:
            t = seconds(module)
            if i:
                rows[module].append(t)  # the first round fills the cache of the disk
    rows = {k: summary(v) for k, v in rows.items()}
    out = dict(
        seconds=rows,
        ratio=dict(
            of_medians=rows['gini_loss']['median'] / rows['torch']['median'], **ratio(rows['gini_loss'], rows['torch'])
        ),
    )
    print(
        f"\nStart-up: import torch {rows['torch']['median']:.2f} s, import gini_loss"
        f" {rows['gini_loss']['median']:.2f} s: {out['ratio']['of_medians']:.3f}×; goal: under 1.3×"
    )
    return out


def version(name):
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def hardware(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        return next(
            l.split(':')[1].strip()
            for l in Path('/proc/cpuinfo').read_text().splitlines()
            if l.startswith('model name')
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--quick', action='store_true', help='fewer rounds and sizes; writes nothing unless --out is given'
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=SECTIONS,
        default=SECTIONS,
        metavar='SECTION',
        help=f"some of: {', '.join(SECTIONS)}",
    )
    parser.add_argument('--rounds', type=int, help='turns of each candidate (default 21, quick 5)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument(
        '--out',
        help='file for the record (default: benchmarks/results/cost-<cpu or the name of the GPU>.json for a whole run)',
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, start = torch.device(args.device), time.perf_counter()
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = False
    cpu_time = device.type == 'cpu' and torch.get_num_threads() == 1
    rounds = args.rounds or (5 if args.quick else 21)
    timer = Timer(device, rounds, time.process_time if cpu_time else time.perf_counter)
    load = lambda: [round(v, 2) for v in os.getloadavg()] if hasattr(os, 'getloadavg') else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    record = dict(
        benchmark='cost',
        date=datetime.date.today().isoformat(),
        quick=args.quick,
        sections=list(args.only),
        device=device.type,
        hardware=hardware(device),
        cores=cores,
        threads=torch.get_num_threads(),
        rounds=timer.rounds,
        clock='CPU' if cpu_time else 'wall',
        keeps_freed_memory=keep_freed_memory(),
        load_before=load(),
        python=platform.python_version(),
        versions={k: version(k) for k in ('torch', 'fastai', 'pytorch-metric-learning', 'gini_loss')},
    )
    record['versions']['torch'] = torch.__version__
    print(
        f"{record['hardware']}, {cores} cores, {record['threads']} threads, load average"
        f" {record['load_before'] and record['load_before'][0]}, torch {torch.__version__}"
    )
    record['bandwidth'] = speed = bandwidth(timer)
    print(f"reading {speed['read'] / 1e9:.1f} GB/s, copying {speed['copy'] / 1e9:.1f} GB/s (read and written)")
    for name in args.only:
        record[name] = globals()[f'section_{name}'](timer, speed, args.quick)
    record.update(load_after=load(), seconds=round(time.perf_counter() - start, 1))
    out = args.out or (
        None
        if args.quick or set(args.only) != set(SECTIONS)
        else Path(__file__).parent
        / 'results'
        / f"cost-{'cpu' if device.type == 'cpu' else record['hardware'].lower().replace(' ', '-')}.json"
    )
    print(f"\n{record['seconds']:.0f} s, load average now {record['load_after'] and record['load_after'][0]}")
    if out:
        rounded = json.loads(json.dumps(record), parse_float=lambda v: float(f'{float(v):.6g}'))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(rounded, indent=1).replace('\n       ', ' ') + '\n', encoding='utf-8')
        print(f"written: {os.path.relpath(out)}")


if __name__ == '__main__':
    main()
