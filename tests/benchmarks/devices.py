"""Do a GPU and a CPU train alike? Relative differences of loss and gradient norm over the first steps of `smoke` (the same batches and weights), for each objective, with micro-batches, and in bf16.

    python tests/benchmarks/devices.py OUT.csv [--steps 6]

Needs a GPU. In fp32 differences should be those of sums in another order, which grow from step to step; in bf16 those of eight bits.
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd
import torch

from clipdino.core import environment
from clipdino.pretrain import Trainer, settings

KINDS = dict(fp32=dict(precision='fp32'), micro=dict(precision='fp32', micro=4), bf16=dict(precision='bf16'))  # whole batches, parts of four images, half precision

def first(objective:str, kind:str, steps:int)->list: # of [loss, gradient norm]
    run, out = settings('smoke', objective, probes=0, compile='off', **KINDS[kind]), []
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(run, Path(d))
        for _, batch in zip(range(steps), t.batches()):
            values = t.update(batch)
            out.append([values['loss'].item(), values['grad_norm'].item()])
    return out

def everything(steps:int)->dict: return {f'{o} {k}': first(o, k, steps) for o in ('clip', 'siglip', 'dino', 'hybrid') for k in KINDS}

def main(out, steps, here):
    if here: return json.dump(everything(steps), open(out, 'w'))
    assert torch.cuda.is_available(), 'there is no GPU here to compare with the CPU'
    with tempfile.TemporaryDirectory() as d:
        command = [sys.executable, __file__, f'{d}/cpu.json', '--steps', str(steps), '--here']
        subprocess.run(command, env=dict(os.environ, CUDA_VISIBLE_DEVICES=''), check=True)
        cpu, gpu = json.loads(Path(d, 'cpu.json').read_text()), everything(steps)
    rows = []
    for name in gpu:
        o, kind = name.split()
        a, b = torch.tensor(gpu[name]), torch.tensor(cpu[f'{o} fp32'])
        loss, norm = ((a - b).abs()/b.abs()).max(0)[0].tolist()
        rows.append(dict(objective=o, kind=kind, steps=steps, loss=f'{loss:.1e}', gradient=f'{norm:.1e}', **{k: environment()[k] for k in ('device', 'commit')}, torch=torch.__version__))
    pd.DataFrame(rows).to_csv(out, index=False)
    print(pd.DataFrame(rows).to_string(index=False))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out'), p.add_argument('--steps', type=int, default=6), p.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    main(**vars(p.parse_args()))
