"""Our linear probes beside scikit-learn's logistic regression: the same 12 strengths on the same features, fitted on all and scored on test features.

    python tests/benchmarks/probe.py OUT.csv [--rounds 2] [--n 50000] [--dim 384] [--classes 100]

Features are of a made set, correlated and of unequal scale, on which the best probe is right about half of the time. Both sides get them standardised and in single precision. scikit-learn runs with its defaults (L-BFGS,
tol 1e-4) but enough iterations to end. One row for each strength, side and round; the ratio is that of the sums.
"""
import argparse, time

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

from clipdino.core import environment
from clipdino.readouts import Setting, fit_probes

def made(n:int, dim:int, classes:int, seed:int=0)->tuple:
    "Features and labels"
    g = np.random.default_rng(seed)
    y = g.integers(0, classes, n)
    basis = g.normal(size=(dim, dim))*(np.arange(1, dim + 1)**-.7)[:, None]
    return ((g.normal(size=(classes, dim))*.16)[y] + g.normal(size=(n, dim))) @ basis + .3, y

def main(out:str, rounds:int, n:int, dim:int, classes:int):
    x, y = made(n + 10000, dim, classes)
    x = x.astype(np.float32)
    x = (x - x[:n].mean(0))/x[:n].std(0)
    (x, x_test), (y, y_test) = (np.split(v, [n]) for v in (x, y))
    l2 = [float(v) for v in np.logspace(-1, -6.5, 12)]
    where = dict(machine=environment()['device'], threads=torch.get_num_threads(), torch=torch.__version__, commit=environment()['commit'])
    rows = []
    def objective(weight, bias, s): # regularised mean loss, in double precision
        z = torch.from_numpy(x.astype(np.float64) @ weight + bias)
        return torch.nn.functional.cross_entropy(z, torch.from_numpy(y)).item() + s/2*float((weight**2).sum())
    def add(what, r, s, seconds, weight, bias):
        rows.append(dict(what=what, round=r, l2=s, seconds=round(seconds, 3), loss=round(objective(weight, bias, s), 6),
                         accuracy=float(((x_test @ weight + bias).argmax(1) == y_test).mean()), **where))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(out, index=False)
    for r in range(rounds):
        begun = time.time()
        probes = fit_probes(x[:, None], y, classes, [Setting(s) for s in l2])
        seconds = time.time() - begun
        for p in probes: add('ours', r, p.setting.l2, seconds/len(l2), p.weight.double().numpy(), p.bias.double().numpy())
        for s in l2:
            begun = time.time()
            m = LogisticRegression(C=1/(n*s), max_iter=3000).fit(x, y)
            add('scikit-learn', r, s, time.time() - begun, m.coef_.T.astype(np.float64), m.intercept_)
    t = pd.DataFrame(rows).groupby(['round', 'what']).agg(seconds=('seconds', 'sum'), best=('accuracy', 'max'))
    print(t, t.seconds.unstack().apply(lambda r: r/r['ours'], axis=1), sep='\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out')
    for k, v in dict(rounds=2, n=50000, dim=384, classes=100).items(): p.add_argument(f'--{k}', type=int, default=v)
    main(**vars(p.parse_args()))
