"""Where the time of a step goes: a table of shares, for CLIP and DINO of `mini` on the world and for the models of the speed benchmarks on JPEGs.

    python tests/benchmarks/profile_step.py OUT.csv

Batches and views are timed with a clock and the rest with torch's profiler, over 20 steps after 5 others; shares are of the whole step.
"""
import sys, tempfile, time
from pathlib import Path

import pandas as pd
import torch

import common
from clipdino.pretrain import Trainer, settings

KINDS = {'matrix products': ('mm', 'addmm', 'bmm', 'baddbmm'),
         'convolutions': ('convolution', 'mkldnn_convolution', 'convolution_backward'), 'attention': ('scaled_dot_product',),
         'activations and norms': ('gelu', 'layer_norm', 'group_norm', 'batch_norm'),
         'optimiser and clipping': ('fused_adamw', 'AdamW', 'linalg_vector_norm', 'foreach'), 'embedding of tokens': ('embedding',)}

def kind(name:str)->str:
    name = name.removeprefix('aten::').lstrip('_').removeprefix('native_')
    return next((k for k, starts in KINDS.items() if name.startswith(starts) or 'AdamW' in name and k.startswith('optimiser')),
                'everything else')

def shares(run, steps:int=20)->dict:
    "Share of a step by kind of work, and images a second"
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(run, Path(d))
        seconds, make = dict(batches=0., views=0.), t.add_views
        def timed(batch):
            start = time.time()
            out = make(batch)
            seconds['views'] += time.time() - start
            return out
        t.add_views = timed
        batches = iter(t.batches())
        for _ in range(5): t.update(next(batches))
        seconds |= dict(batches=0., views=0.)
        start, ops = time.time(), {}
        for _ in range(steps):
            before = time.time()
            batch = next(batches)
            seconds['batches'] += time.time() - before
            t.update(batch)
        total = time.time() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            for _ in range(5): t.update(batch)
        for e in p.key_averages(): ops[kind(e.key)] = ops.get(kind(e.key), 0.) + e.self_cpu_time_total
    rest = total - seconds['batches']
    out = {'reading and decoding': seconds['batches'] - seconds['views'], 'views': seconds['views']} | {k: v/sum(ops.values())*rest for k, v in ops.items()}
    return {k: v/total for k, v in out.items()} | {'images a second': run.batch*steps/total}

def main(out):
    data, speed = common.shards(8192, 224), dict(arch='speed_vit', image_size=common.IMAGE, batch=common.BATCH, canvas=64)
    runs = {'CLIP, mini': settings('mini', 'clip', probes=0), 'DINO, mini': settings('mini', 'dino', probes=0),
            'CLIP, JPEG': settings('mini', 'clip', probes=0, data=data, text_width=128, vocab=49408, context=77, **speed),
            'DINO 2 + 8, JPEG': settings('mini', 'dino', probes=0, data=data, local_crops=8, local_size=common.LOCAL, hue=.1,
                                         head_norm=False, **speed)}
    table = pd.DataFrame({name: shares(run) for name, run in runs.items()}).fillna(0.).rename_axis('work').round(3)
    table.assign(**common.machine()).to_csv(out)
    print(table)

if __name__ == '__main__': main(sys.argv[1])
