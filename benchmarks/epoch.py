"""The time of one epoch of each network, what each switch of the training engine changes in speed and result, and where
the time goes.

    python benchmarks/epoch.py                                   # ResNet-18 on 46,000 images of CIFAR-100
    python benchmarks/epoch.py --arch resnet17 resnet18 resnet50 cvt7 --out epoch.json
    python benchmarks/epoch.py --data synthetic --images 400 --bs 100 --width 8 --rounds 2      # seconds on a CPU

The variants are float32, float32 without the two terms, bfloat16, channels_last, compile and these three together. On a
GPU there are two more: bfloat16 and channels_last with the stages of the network recorded as CUDA graphs, with the two
terms and without. All start from the same weights and see the same images in the same order. A round trains each variant for one epoch in turn, so a
change in the machine's load affects all of them. The first round (compilation, choice of algorithms) is not counted.

The table shows for each variant: images per second of training and validation together (median, smallest, largest),
the ratio to float32 within each round, the GPU memory that a step takes in addition to weights, optimizer and images,
and the losses after the last round with their difference from float32. Then follows a profile of some steps of
float32, and on a GPU of the two fastest variants with both terms: the most expensive operations (on a GPU: kernels), how
often a step waits for the device, and the share of the time in which the GPU computes. The file of --out is written after each round, so a run that is stopped keeps its
measurements.
"""

import argparse, datetime, gc, json, os, statistics, time, warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings('ignore')
import torch
from fastai.callback.core import CancelFitException, Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gini_loss.datasets import ImageSet
from gini_loss.loader import device_dls
from gini_loss.train import build_dls, build_learner, environment, recipe

VARIANTS = {
    'float32': {},
    'without the terms': dict(loss='ce'),
    'bfloat16': dict(precision='bfloat16'),
    'channels_last': dict(channels_last=True),
    'compile': dict(compile=True),
    'all three': dict(precision='bfloat16', channels_last=True, compile=True),
    'CUDA graphs': dict(precision='bfloat16', channels_last=True),
    'CUDA graphs, no terms': dict(precision='bfloat16', channels_last=True, loss='ce'),
}
COLUMNS = 'train_loss', 'train_gini', 'train_kl', 'valid_loss', 'valid_accuracy'


def loaders(config, args):
    "The loaders of `config`; with --data made-up, noise in the sizes of CIFAR-100, for machines without the data set"
    if args.data != 'made-up':
        return build_dls(config, args.data_root, args.device)
    g = torch.Generator().manual_seed(0)

    def noise(n):
        images = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
        return ImageSet(images, torch.arange(n) % 100)

    sets = [noise(n) for n in (args.images or 46_000, 500, 500)]
    return device_dls(
        *sets,
        classes=[str(i) for i in range(100)],
        bs=config.bs,
        val_bs=500,
        device=args.device,
        normalize=False,
        channels_last=config.channels_last,
    )


class Rounds:
    "The learners of one network, one per variant, and their measurements"

    def __init__(self, config, args):
        torch.manual_seed(0)
        self.config, self.failed, self.seconds, self.memory = config, {}, {}, {}
        chosen = {k: v for k, v in VARIANTS.items() if not args.variants or k in args.variants}
        configs = {name: replace(config, **changes) for name, changes in chosen.items()}
        if not args.device.startswith('cuda'):
            configs = {name: c for name, c in configs.items() if not name.startswith('CUDA')}
        self.learners = {
            name: build_learner(c, loaders(c, args), cuda_graphs=name.startswith('CUDA')) for name, c in configs.items()
        }
        self.images = len(next(iter(self.learners.values())).dls.train.dataset)

    def epoch(self, name, counts):
        "Train one epoch of a variant"
        learn, before = self.learners[name], 0
        cuda = learn.dls.device.type == 'cuda'
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        try:
            learn.fit(1)
        except Exception as e:  # this machine may lack one switch
            self.failed[name] = f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'
            del self.learners[name]
            return
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if cuda and counts:
            self.memory[name] = torch.cuda.max_memory_allocated() - before
        if counts:
            self.seconds.setdefault(name, []).append(seconds)
        print(f'{self.config.arch} {"counted" if counts else "first  "}  {name:18} {seconds:8.2f} s', flush=True)

    def row(self, name):
        "The measurements of one variant, as a dictionary"
        base, seconds, c = self.seconds.get('float32'), self.seconds[name], self.config
        columns = self.learners[name].epoch_log.columns
        return dict(
            arch=c.arch,
            width=c.width,
            bs=c.bs,
            variant=name,
            images=self.images,
            seconds=seconds,
            images_per_second=[self.images / s for s in seconds],
            ratio=[b / s for b, s in zip(base, seconds)] if base else None,
            step_memory_bytes=self.memory.get(name),
            **{k: columns[k][-1] for k in COLUMNS},
        )

    def rows(self):
        return [self.row(name) for name in self.learners if name in self.seconds]


def measure(config, args, keep):
    "`Rounds` of one network; `keep` is called with the rows of all rounds so far"
    rounds = Rounds(config, args)
    for i in range(args.rounds + 1):
        if i > 1 and time.monotonic() > args.end:
            break  # after the first round and one that counts
        for name in list(rounds.learners):
            rounds.epoch(name, counts=i > 0)
        keep(rounds.rows(), rounds.failed)
    return rounds


class Few(Callback):
    "Profiles some steps and then ends the fit; not the first step, which copies the order of the epoch to the device"

    order = 90

    def __init__(self, found, steps):
        self.found, self.steps, self.n = found, steps, 0

    def after_batch(self):
        if self.n == 0:
            if self.learn.dls.device.type == 'cuda':
                torch.cuda.synchronize()
            self.found.start()
        self.n += 1
        if self.n > self.steps or self.iter + 1 == self.n_iter:
            raise CancelFitException


def profile_steps(learn, steps):
    "The operations of `steps` training steps, by the time they take themselves, and the waits for the device per step"
    cuda = learn.dls.device.type == 'cuda'
    found = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
    few = Few(found, steps)
    learn.fit(1, cbs=few)
    found.stop()  # waits for the device
    n, on = max(few.n - 1, 1), 'self_device_time_total' if cuda else 'self_cpu_time_total'
    events = found.key_averages()

    # an operation and its kernel have the same time: count one
    def is_kernel(e):
        return e.device_type == DeviceType.CUDA and not getattr(e, 'is_user_annotation', False)

    timed = [e for e in events if not cuda or is_kernel(e)]
    total = sum(getattr(e, on) for e in timed) or 1
    top = sorted(timed, key=lambda e: -getattr(e, on))[:15]
    waits = {e.key: e.count / n for e in events if e.key in ('cudaStreamSynchronize', 'cudaEventSynchronize')}
    operations = [
        dict(
            name=e.key,
            share=getattr(e, on) / total,
            milliseconds_per_step=getattr(e, on) / 1e3 / n,
            calls_per_step=e.count / n,
        )
        for e in top
    ]
    return dict(
        steps=few.n - 1,
        kernels_per_step=sum(e.count for e in timed) / n if cuda else None,
        kernel_milliseconds_per_step=total / 1e3 / n if cuda else None,
        operations=operations,
        waits=waits,
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--arch', nargs='+', default=['resnet18'], help='networks (default resnet18)')
    add('--data', default='cifar100', help='cifar100, synthetic, or made-up: noise in the sizes of CIFAR-100')
    add('--images', type=int, help='training images (default all)')
    add('--bs', type=int, help="batch size (default the recipe's)")
    add('--width', type=int, help="channels of the first stage (default the paper's)")
    add('--rounds', type=int, default=3, help='counted rounds (default 3)')
    add('--steps', type=int, default=10, help='profiled steps (default 10)')
    add('--variants', nargs='+', choices=list(VARIANTS), help='default all')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, help="torch's threads")
    add('--data-root', help="folder of CIFAR-100 (fastai's data folder)")
    add(
        '--budget',
        type=float,
        default=float('inf'),
        metavar='SECONDS',
        help='start no further network after this time, and finish the current one after two rounds',
    )
    add('--out', help='write all measurements to this JSON file')
    args = parser.parse_args()
    args.end = time.monotonic() + args.budget
    return args


def config_of(arch, args):
    "The recipe of a network with the changes of the command line"
    changes = dict(start_epoch=0, epochs=1, data='cifar100' if args.data == 'made-up' else args.data)
    if args.images:
        changes['train_per_class'] = args.images // (100 if args.data == 'cifar100' else 10)
    if args.bs:
        changes['bs'] = args.bs
    if args.width:
        changes['width'] = args.width
    return recipe(arch, **changes)


def show_rows(arch, rows, hardware):
    base = next((r for r in rows if r['variant'] == 'float32'), None)
    images = rows[0]['images'] if rows else 0
    print(f"\n{arch}, {images:,} images, {hardware['device_name']}, torch {torch.__version__}")
    print(
        f"{'variant':18} {'images/s':>9} {'(smallest-largest)':>20} {'ratio':>6} {'GiB':>6} {'train loss':>11}"
        f" {'valid loss':>11} {'from float32':>13}"
    )
    for r in rows:
        v = r['images_per_second']
        ratio = f"{statistics.median(r['ratio']):6.2f}" if r['ratio'] else f"{'':6}"
        memory = f"{r['step_memory_bytes'] / 2**30:6.2f}" if r['step_memory_bytes'] else f"{'':6}"
        apart = f"{r['train_loss'] - base['train_loss']:+13.2e}" if base else ''
        spread = f'({min(v):,.0f}-{max(v):,.0f})'
        print(
            f"{r['variant']:18} {statistics.median(v):9,.0f} {spread:>20} {ratio} {memory} {r['train_loss']:11.4f}"
            f" {r['valid_loss']:11.4f} {apart}"
        )


def show_profile(name, found):
    print(name)
    for o in found['operations'][:8]:
        milliseconds, calls = o['milliseconds_per_step'], o['calls_per_step']
        print(f"  {o['share']:6.1%} {milliseconds:9.2f} ms per step {calls:7.1f} calls  {o['name']}")
    if found['kernels_per_step'] is None:
        return
    print('  waits for the device per step:', found['waits'] or 'none', f"; {found['kernels_per_step']:.0f} kernels")
    print(
        f"  kernels run for {found['kernel_milliseconds_per_step']:.2f} ms of a step's {found['milliseconds_per_step']:.2f}"
    )


def write(out, rows, path):
    "Write all measurements so far, with six digits"
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**out, 'rows': [*out['rows'], *rows]})
    rounded = json.loads(text, parse_float=lambda v: float(f'{float(v):.6g}'))
    Path(path).write_text(json.dumps(rounded, indent=1) + '\n', encoding='utf-8')


def one_network(arch, args, out):
    "Measure and profile one network, print the results and keep them"
    gc.collect()  # frees the learners of the last network
    if args.device.startswith('cuda'):
        torch.cuda.empty_cache()

    def keep(rows, failed):
        out['failed'][arch] = failed
        write(out, rows, args.out)

    rounds = measure(config_of(arch, args), args, keep)
    rows = rounds.rows()
    out['rows'] += rows
    show_rows(arch, rows, out['hardware'])
    for name, why in rounds.failed.items():
        print(f'{name}: not measured, {why}')
    for variant in ('CUDA graphs', 'all three', 'float32'):
        wanted = variant == 'float32' or args.device.startswith('cuda')
        row = next((r for r in rows if r['variant'] == variant), None)
        if row is None or not wanted or time.monotonic() > args.end:
            continue
        name = arch if variant == 'float32' else f'{arch}, {variant}'
        milliseconds = 1e3 * statistics.median(row['seconds']) * row['bs'] / row['images']
        found = profile_steps(rounds.learners[variant], args.steps)
        out['profiles'][name] = dict(milliseconds_per_step=milliseconds, **found)
        show_profile(name, out['profiles'][name])
    print()
    write(out, [], args.out)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    out = dict(
        benchmark='epoch',
        date=datetime.date.today().isoformat(),
        **environment(torch.device(args.device)),
        load_before=load,
        rows=[],
        failed={},
        profiles={},
    )
    for arch in args.arch:
        if time.monotonic() < args.end:
            one_network(arch, args, out)
            continue
        out['failed'][arch] = dict(all='out of time')
        print(f'{arch}: not measured, out of time')
        write(out, [], args.out)


if __name__ == '__main__':
    main()
