"""Search of disagreement pairs: share of the machine's matrix-product speed, and beside a plain search that makes all similarities and keeps those that pass.

    python tests/benchmarks/pairs.py OUT.csv [--n 100000] [--dim 384] [--k 1000] [--rounds 2]

All pairs of two sets of `n` pictures under two encoders of `dim` dimensions; operations are the 4 * dim * n^2 of the two products. The peak is the best of ten products of large square matrices in single precision,
measured before each search.
"""
import argparse, resource, time

import pandas as pd
import torch

from clipdino.core import environment
from clipdino.pairs import Pairs, by_ranks, by_thresholds
from mfu import peak, synchronise

def plain(p:Pairs, tile:int=4000)->int: # how many pass the loose thresholds
    "numpy's way: both products, a mask, its indices"
    count, (a, b, a2, b2) = 0, (v.cpu().numpy() for v in (p.a, p.b, p.a2, p.b2))
    for r in range(0, len(a), tile):
        for c in range(0, len(a2), tile):
            sa, sb = a[r:r + tile] @ a2[c:c + tile].T, b[r:r + tile] @ b2[c:c + tile].T
            count += len(((sa > .7) & (sb < .5)).nonzero()[0]) + len(((sb > .8) & (sa < .5)).nonzero()[0])
    return count

def main(out:str, n:int, dim:int, k:int, rounds:int):
    g, device = torch.Generator().manual_seed(0), torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    common = torch.randn(2*n, 16, generator=g)  # what both encoders see; the rest is their own
    def encoder():
        return torch.cat([common @ torch.randn(16, 32, generator=g), torch.randn(2*n, 16, generator=g)], 1) @ torch.randn(48, dim, generator=g) + 1
    a, b = encoder(), encoder()
    p, rows = Pairs(a[:n], b[:n], a[n:], b[n:], device=device), []
    where = dict(n=n, dim=dim, k=k, machine=environment()['device'], threads=torch.get_num_threads(), torch=torch.__version__,
                 commit=environment()['commit'])
    for r in range(rounds):
        for what, search in ('ranks', lambda: len(by_ranks(p, k)['first'])), ('thresholds', lambda: sum(c for _, c in by_thresholds(p, k=k).values())), ('plain, thresholds', lambda: plain(p)):
            if what.startswith('plain') and r: continue
            best = peak(torch.float32, device)
            begun = time.time()
            found = search()
            synchronise()
            seconds = time.time() - begun
            tflops = 4*dim*n*n/seconds/1e12
            rows.append(dict(what=what, round=r, seconds=round(seconds, 2), tflops=round(tflops, 4), peak=round(best, 4),
                             share=round(tflops/best, 3), found=found, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024,
                             **where))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(out, index=False)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out')
    for name, v in dict(n=100_000, dim=384, k=1000, rounds=2).items(): p.add_argument(f'--{name}', type=int, default=v)
    main(**vars(p.parse_args()))
