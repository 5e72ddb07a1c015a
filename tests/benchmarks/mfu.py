"""Images a second, use of the device's arithmetic and share of time without data: `small`, and ViT-B/16 at 224 px, for each objective, in the precision that a run would choose here.

    python tests/benchmarks/mfu.py OUT.csv [--models small vit-b] [--data SHARDS] [--batch 256] [--steps 30]

MFU is the operations that `cost` counts for the objective, forward and backward, over what a large matrix product reaches on this device in the same precision. Views are made on the device, and batches
by the preset's loader processes, as in a run. Without `--data` the pictures are noise that need no decoding, under captions of the greatest length. Made for one GPU; it runs on a CPU too, where `--batch 8 --steps 3` will do.
"""
import argparse, tempfile, time
from pathlib import Path

import pandas as pd
import torch

from clipdino.core import environment
from clipdino.pretrain import Blank, Trainer, cost, settings

def synchronise():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def peak(dtype, device, n:int=8192)->float:
    "TFLOP/s of a large matrix product, the best of ten"
    n = n if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    def seconds():
        synchronise()
        start = time.time()
        a @ b
        synchronise()
        return time.time() - start
    return 2*n**3/min(seconds() for _ in range(10))/1e12

def measure(run, data, steps:int)->dict:
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(run, Path(d), source=None if data else Blank(run.canvas))
        half = t.acc.mixed_precision == 'bf16'
        batches, waited = iter(t.batches()), 0.
        for _ in range(5): t.update(next(batches))  # compiles, too
        synchronise()
        start = time.time()
        for _ in range(steps):
            before = time.time()
            batch = next(batches)
            waited += time.time() - before
            t.update(batch)
        synchronise()
        seconds = time.time() - start
        t.stop_if_failed()
        memory = torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else float('nan')
        tflops, best = cost(run)['gflop']*run.batch*steps/seconds/1e3, peak(torch.bfloat16 if half else torch.float32, t.acc.device)
    return dict(images_per_s=run.batch*steps/seconds, tflops=tflops, peak_tflops=best, mfu=tflops/best, waited=waited/seconds,
                memory_gb=memory, precision='bf16' if half else 'fp32')

def main(out, models, data, batch, steps):
    rows = []
    for model in models:
        for o in 'clip', 'siglip', 'dino':
            run = settings('small' if model == 'small' else 'paper', o, data=data or 'world', batch=batch, samples=batch*(steps + 100), probes=0)
            rows.append(dict(model=model, objective=o, batch=batch, **measure(run, data, steps)) | {k: v for k, v in environment().items() if k in ('device', 'commit')} | dict(torch=torch.__version__))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).round(4).to_csv(out, index=False)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out'), p.add_argument('--models', nargs='+', choices=['small', 'vit-b'], default=['small', 'vit-b']), p.add_argument('--data')
    p.add_argument('--batch', type=int, default=256), p.add_argument('--steps', type=int, default=30)
    main(**vars(p.parse_args()))
