"""Images per second of the loader on the device, compared with fastai's `ImageDataLoaders`, including augmentation.

    python benchmarks/loader.py                  # 10,000 images of CIFAR-100, 5 rounds; results/loader-<device>.json
    python benchmarks/loader.py --rounds 9 --device cuda

Each loader returns normalised float batches (bs, 3, 32, 32) of the same training images, cropped at random with
padding 4 and flipped at random. A round runs every loader in turn, for at least one epoch and one second, so a change
in the machine's load affects all of them. The table shows the rate, and the ratio within each round: the median over
rounds, the smallest and the largest. fastai's loader reads its files from a warm page cache, with workers and
without; the faster of the two is the reference.
"""

import argparse
import datetime
import json
import os
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import fastai
import torch
from fastai.data.external import URLs, untar_data
from fastai.data.transforms import Normalize
from fastai.vision.augment import CropPad, FlipItem, RandomCrop
from fastai.vision.data import ImageDataLoaders

from gini_loss.datasets import load_cifar100
from gini_loss.loader import CIFAR100_MEAN, CIFAR100_STD, DeviceLoader
from gini_loss.train import environment


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=10_000, help='training images per epoch (default 10,000)')
    parser.add_argument('--bs', type=int, default=500, help='batch size (default 500)')
    parser.add_argument('--rounds', type=int, default=5, help='rounds (default 5)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="number of CPU threads (default: torch's; 1 on a busy machine)")
    parser.add_argument('--out', help='JSON file to write (default: results/loader-<device>.json; none: no file)')
    return parser.parse_args()


def make_loaders(n_images, bs, device, cores):
    "Our loader and fastai's over the same images, by name"
    data = load_cifar100()
    root = untar_data(URLs.CIFAR_100)
    folders = sorted(root.glob('train/*/*'), key=lambda o: o.name)
    files = [f for o in folders for f in sorted(o.glob('*.png'), key=lambda f: f.name)]
    index = torch.linspace(0, len(files) - 1, n_images).long()
    files = [files[i] for i in index]

    def stock(num_workers):
        dls = ImageDataLoaders.from_lists(
            root,
            files,
            [f.parent.name for f in files],
            valid_pct=0,
            bs=bs,
            num_workers=num_workers,
            device=device,
            item_tfms=[CropPad(40), RandomCrop(32), FlipItem(0.5)],
            batch_tfms=Normalize.from_stats(CIFAR100_MEAN, CIFAR100_STD),
        )
        return dls.train

    ours = DeviceLoader(
        (data.train.images[index], data.train.labels[index]),
        bs=bs,
        shuffle=True,
        augment=True,
        normalize=(CIFAR100_MEAN, CIFAR100_STD),
        device=device,
    )
    return {'DeviceLoader': ours, 'stock, no workers': stock(0), f'stock, {cores} workers': stock(cores)}


def check_same_work(loaders, bs, device):
    "Assert that all loaders return batches of the same shape, type and range"
    for name, loader in loaders.items():
        x = loader.one_batch()[0]
        assert x.shape == (bs, 3, 32, 32) and x.dtype == torch.float32 and x.device.type == device.type, name
        assert abs(x.mean().item() + 0.25) < 0.25, name  # black borders pull the mean below 0
        assert x.min() > -2 and x.max() < 2.2, name


def rate(loader, device, at_least=1.0):
    "Images per second over whole epochs that take at least `at_least` seconds, including the start of workers"
    start, n, seconds = time.perf_counter(), 0, 0
    while seconds < at_least:
        for x, _ in loader:
            n += len(x)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return n / seconds


def measure(loaders, device, rounds):
    "The rates of each loader, one per round, after a round that warms the caches"
    rates = {name: [] for name in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, device))
    return {name: o[1:] for name, o in rates.items()}


def middle(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(rates):
    "Print the table, and return the ratios to the faster of fastai's loaders in each round"
    ours = rates['DeviceLoader']
    print(f"{'loader':<20}{'images per second':>28}{'DeviceLoader is faster by':>32}")
    for name, o in rates.items():
        ratio = '' if name == 'DeviceLoader' else middle([a / b for a, b in zip(ours, o)], '.1f')
        print(f"{name:<20}{middle(o, ',.0f'):>28}{ratio:>32}")
    fastest = [max(o) for o in zip(*(v for k, v in rates.items() if k != 'DeviceLoader'))]
    ratios = [a / b for a, b in zip(ours, fastest)]
    print(f"\nAgainst the faster stock loader of each round: {middle(ratios, '.1f')} times; the goal on 2 cores is 10")
    return ratios


def summary(values):
    return dict(median=statistics.median(values), low=min(values), high=max(values))


def write(out, record):
    "Write the record, with six digits per number"
    out.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(record), parse_float=lambda v: float(f'{float(v):.6g}'))
    out.write_text(json.dumps(rounded, indent=1) + '\n', encoding='utf-8')
    print(f"written: {os.path.relpath(out)}")


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    loaders = make_loaders(args.images, args.bs, device, cores)
    check_same_work(loaders, args.bs, device)
    load_before = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    rates = measure(loaders, device, args.rounds)

    found = environment(device)
    load = f", load average {load_before:.1f}" if load_before is not None else ''
    print(
        f"{found['hardware']['device_name']}, {cores} cores{load}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, fastai {fastai.__version__}"
    )
    print(f"{args.images:,} images, batches of {args.bs}, {args.rounds} rounds: median (smallest to largest)\n")
    ratios = report(rates)
    if args.out != 'none':
        out = Path(args.out or Path(__file__).parent / 'results' / f'loader-{device.type}.json')
        write(
            out,
            dict(
                benchmark='loader',
                date=datetime.date.today().isoformat(),
                **found,
                cores=cores,
                load_before=load_before,
                images=args.images,
                bs=args.bs,
                rounds=args.rounds,
                images_per_second={k: summary(v) for k, v in rates.items()},
                ratio_to_faster_stock=summary(ratios),
            ),
        )


if __name__ == '__main__':
    main()
