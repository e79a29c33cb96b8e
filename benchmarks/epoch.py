"""One epoch of each network: its time, what each switch of the training engine changes in speed and in the result, and where the time goes.

    python benchmarks/epoch.py                                   # ResNet-18 on 46,000 images of CIFAR-100
    python benchmarks/epoch.py --arch resnet17 resnet18 resnet50 cvt7 --out epoch.json
    python benchmarks/epoch.py --data synthetic --images 400 --bs 100 --width 8 --rounds 2      # seconds on a CPU

Variants: float32; the same without the two terms; bfloat16; channels_last; compile; the three together. All start from the same weights
and see the same images in the same order. A round trains each variant for one epoch in turn, so that a change in the machine's
load meets all of them; the first round (compilation, choice of algorithms) is not counted. Shown for each variant: images per second of
training and validation together (median, smallest, largest), the ratio to float32 within each round, the memory of a GPU that a step takes beside
weights, optimiser and images, and the losses after the last round with their distance from float32's. Then a profile of some steps of float32, on a
GPU of the three switches together as well: the costliest operations (there: kernels), and how often a step waits for the device. The file of --out is written anew after each round, so that a run that is
stopped keeps what it measured.
"""
import argparse, datetime, gc, json, os, statistics, time, warnings
from pathlib import Path
from dataclasses import replace

warnings.filterwarnings('ignore')
import torch
from fastai.callback.core import CancelFitException, Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gini_loss.datasets import ImageSet
from gini_loss.loader import device_dls
from gini_loss.train import build_dls, build_learner, environment, recipe

VARIANTS = {'float32': {}, 'without the terms': dict(loss='ce'), 'bfloat16': dict(precision='bfloat16'), 'channels_last': dict(channels_last=True),
            'compile': dict(compile=True), 'all three': dict(precision='bfloat16', channels_last=True, compile=True)}


def loaders(config, args):
    "The data of `config`; with --data made-up, noise in the sizes of CIFAR-100, for machines where that is not"
    if args.data != 'made-up': return build_dls(config, args.data_root, args.device)
    g = torch.Generator().manual_seed(0)
    sets = [ImageSet(torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(n) % 100) for n in (args.images or 46_000, 500, 500)]
    return device_dls(*sets, classes=[str(i) for i in range(100)], bs=config.bs, val_bs=500, device=args.device, normalize=False, channels_last=config.channels_last)


def measure(config, args, keep):
    "Rows of one network, a dictionary for each variant; `keep` is given those of the rounds so far"
    torch.manual_seed(0)
    learners, failed, seconds, memory = {}, {}, {}, {}
    for name, changes in VARIANTS.items():
        if args.variants and name not in args.variants: continue
        c = replace(config, **changes)
        learners[name] = build_learner(c, loaders(c, args))
    images = len(next(iter(learners.values())).dls.train.dataset)
    def rows():
        base = seconds.get('float32')
        return [dict(arch=config.arch, width=config.width, bs=config.bs, variant=name, images=images, seconds=seconds[name], images_per_second=[images/s for s in seconds[name]],
                     ratio=[b/s for b, s in zip(base, seconds[name])] if base else None, step_memory_bytes=memory.get(name),
                     **{k: learn.epoch_log.columns[k][-1] for k in ('train_loss', 'train_gini', 'train_kl', 'valid_loss', 'valid_accuracy')})
                for name, learn in learners.items() if name in seconds]
    for round in range(args.rounds + 1):
        if round > 1 and time.monotonic() > args.end: break             # the round that compiles and one that counts come first
        for name, learn in list(learners.items()):
            cuda = learn.dls.device.type == 'cuda'
            if cuda: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            try: learn.fit(1)
            except Exception as e:                                       # a switch that this machine lacks must not lose the others
                failed[name] = f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'
                del learners[name]
                continue
            if cuda: torch.cuda.synchronize()
            if cuda and round: memory[name] = torch.cuda.max_memory_allocated() - before
            if round: seconds.setdefault(name, []).append(time.perf_counter() - start)
            print(f'{config.arch} round {round}  {name:18} {time.perf_counter() - start:8.2f} s', flush=True)
        keep(rows(), failed)
    return rows(), failed, learners


def profile_steps(learn, steps):
    "Operations of `steps` training steps by the time they take themselves, and the waits for the device in a step. The first step is left out: it copies the epoch's order to the device"
    cuda = learn.dls.device.type == 'cuda'
    found = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda)
    n = 0
    class Few(Callback):
        order = 90
        def after_batch(self):
            nonlocal n
            if n == 0:
                if cuda: torch.cuda.synchronize()
                found.start()
            n += 1
            if n > steps or self.iter + 1 == self.n_iter: raise CancelFitException
    learn.fit(1, cbs=Few())
    found.stop()                                                         # lets the device finish
    n -= 1
    on = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    events = found.key_averages()
    timed = [e for e in events if not cuda or e.device_type == DeviceType.CUDA and not getattr(e, 'is_user_annotation', False)] # an operation and its kernel have the same time: count one
    total = sum(getattr(e, on) for e in timed) or 1
    top = sorted(timed, key=lambda e: -getattr(e, on))[:15]
    waits = {e.key: e.count/max(n, 1) for e in events if e.key in ('cudaStreamSynchronize', 'cudaEventSynchronize')}
    return dict(steps=n, kernels_per_step=sum(e.count for e in timed)/max(n, 1) if cuda else None,
                operations=[dict(name=e.key, share=getattr(e, on)/total, milliseconds_per_step=getattr(e, on)/1e3/max(n, 1), calls_per_step=e.count/max(n, 1)) for e in top], waits=waits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', nargs='+', default=['resnet18'], help='networks (default resnet18)')
    parser.add_argument('--data', default='cifar100', help='cifar100, synthetic, or made-up: noise in the sizes of CIFAR-100')
    parser.add_argument('--images', type=int, help='training images (default all)')
    parser.add_argument('--bs', type=int, help="batch size (default the recipe's)")
    parser.add_argument('--width', type=int, help="channels of the first stage (default the paper's)")
    parser.add_argument('--rounds', type=int, default=3, help='counted rounds (default 3)')
    parser.add_argument('--steps', type=int, default=10, help='profiled steps (default 10)')
    parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), help='default all')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="torch's threads")
    parser.add_argument('--data-root', help="folder of CIFAR-100 (fastai's data folder)")
    parser.add_argument('--budget', type=float, default=float('inf'), metavar='SECONDS', help='after so many seconds begin no further network, and no round but the first two of one that was begun')
    parser.add_argument('--out', help='write everything measured to this JSON file')
    args = parser.parse_args()
    args.end = time.monotonic() + args.budget
    if args.threads: torch.set_num_threads(args.threads)
    out = dict(benchmark='epoch', date=datetime.date.today().isoformat(), **environment(torch.device(args.device)), load_before=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None, rows=[], failed={}, profiles={})
    def save(rows=()):
        if not args.out: return
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        rounded = json.loads(json.dumps({**out, 'rows': [*out['rows'], *rows]}), parse_float=lambda v: float(f'{float(v):.6g}'))
        Path(args.out).write_text(json.dumps(rounded, indent=1) + '\n', encoding='utf-8')
    for arch in args.arch:
        if time.monotonic() > args.end:
            out['failed'][arch] = dict(all='no time was left')
            print(f'{arch}: not measured, no time was left')
            continue
        def keep(rows, failed, arch=arch):
            out['failed'][arch] = failed
            save(rows)
        learners = None; gc.collect()                                    # those of the network before
        if args.device.startswith('cuda'): torch.cuda.empty_cache()
        changes = dict(start_epoch=0, epochs=1, data='cifar100' if args.data == 'made-up' else args.data)
        if args.images: changes['train_per_class'] = args.images//(100 if args.data == 'cifar100' else 10)
        if args.bs: changes['bs'] = args.bs
        if args.width: changes['width'] = args.width
        rows, out['failed'][arch], learners = measure(recipe(arch, **changes), args, keep)
        out['rows'] += rows
        profiled = [name for name in ('all three', 'float32') if name in learners and (name == 'float32' or args.device.startswith('cuda')) and time.monotonic() < args.end]
        for name in profiled: out['profiles'][arch if name == 'float32' else f'{arch}, {name}'] = profile_steps(learners[name], args.steps)
        base = next((r for r in rows if r['variant'] == 'float32'), None)
        print(f"\n{arch}, {rows[0]['images'] if rows else 0:,} images, {out['hardware']['device_name']}, torch {torch.__version__}")
        print(f"{'variant':18} {'images/s':>9} {'(smallest-largest)':>20} {'ratio':>6} {'GiB':>6} {'train loss':>11} {'valid loss':>11} {'from float32':>13}")
        for r in rows:
            v, m = r['images_per_second'], statistics.median
            ratio = f"{m(r['ratio']):6.2f}" if r['ratio'] else f"{'':6}"
            memory = f"{r['step_memory_bytes']/2**30:6.2f}" if r['step_memory_bytes'] else f"{'':6}"
            apart = f"{r['train_loss'] - base['train_loss']:+13.2e}" if base else ''
            print(f"{r['variant']:18} {m(v):9,.0f} {f'({min(v):,.0f}-{max(v):,.0f})':>20} {ratio} {memory} {r['train_loss']:11.4f} {r['valid_loss']:11.4f} {apart}")
        for name, why in out['failed'][arch].items(): print(f'{name}: not measured, {why}')
        for name, found in ((k, v) for k, v in out['profiles'].items() if k.split(',')[0] == arch):
            print(name)
            for o in found['operations'][:8]: print(f"  {o['share']:6.1%} {o['milliseconds_per_step']:9.2f} ms a step {o['calls_per_step']:7.1f} calls  {o['name']}")
            if args.device.startswith('cuda'): print('  waits for the device in a step:', found['waits'] or 'none', f"; {found['kernels_per_step']:.0f} kernels")
        print()
        save()


if __name__ == '__main__': main()
