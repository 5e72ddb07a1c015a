"""A saved VLM asked by lmms-eval, through its own llava_hf route and its own VMCBench task, and by this package: the same answers, and how long each takes.

    python tests/benchmarks/lmms.py OUT.csv VLM [--python PYTHON] [--n 200] [--rounds 3]

VLM is a run folder. PYTHON is that of an environment with lmms-eval and this package (`pip install lmms-eval` beside it); lmms-eval's task reads a local copy of questions of the world's twin in VMCBench's columns. lmms-eval asks one
question after another, its default. Seconds of lmms-eval are those of `n` questions less those of 20, over the difference, so that opening the model does not count; ours are those of answering alone. One row for each contestant and
round; wall and processor seconds, of which the latter are to be compared on a shared machine.
"""
import argparse, json, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd
import torch

from clipdino.core import environment
from clipdino.vmcbench import answers, batched, load_vlm, order_of, parse
from clipdino.worldvqa import WorldVQA, to_parquet

# makes our towers known to transformers
START = 'import sys, runpy, clipdino.vlm; sys.argv[0] = "lmms_eval"; runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)'

def task(folder:Path, python:str, parquet:Path):
    "lmms-eval's VMCBench task on a local file"
    found = subprocess.run([python, '-c', 'import lmms_eval; print(lmms_eval.__path__[0])'], capture_output=True, text=True,
                           check=True).stdout.split()[-1]
    shutil.copytree(Path(found)/'tasks/vmcbench', folder/'task')
    path = folder/'task/vmcbench.yaml'
    text = path.read_text().replace('suyc21/VMCBench', 'parquet').replace('  token: True', f'  data_files: {{dev: {parquet}}}').replace('task: "vmcbench"', 'task: "vmcbench_local"')
    path.write_text(text)

def theirs(folder:Path, python:str, vlm:str, n:int)->tuple: # -> raw answers by question, wall seconds, processor seconds
    out = folder/f'out-{n}'
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(folder/'hf')}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([python, '-c', START, '--model', 'llava_hf', '--model_args', f'pretrained={vlm},device_map=cpu,dtype=float32',
                           '--device', 'cpu', '--tasks', 'vmcbench_local', '--include_path', str(folder/'task'),
                           '--batch_size', '1', '--limit', str(n), '--log_samples', '--output_path', str(out)], env=env,
                           capture_output=True, text=True)
    if done.returncode or not list(out.rglob('*samples*.jsonl')):
        sys.exit(f'lmms-eval failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(l) for f in out.rglob('*samples*.jsonl') for l in f.read_text().splitlines()]
    def text(r):
        while isinstance(r, list): r = r[0]
        return r
    return {r['doc_id']: text(r['filtered_resps']) for r in rows}, time.perf_counter() - begun, sum(getattr(after, k) - getattr(before, k) for k in ('ru_utime', 'ru_stime'))

def main(out, vlm, python, n, rounds, few=20):
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'
    vlm, q, rows = str(Path(vlm).resolve()), WorldVQA('test', n, 48), []
    model = load_vlm(vlm)
    where = dict(vlm=model.name, n=n, machine=environment()['device'], torch=torch.__version__, commit=environment()['commit'])
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        to_parquet(q, d/'q.parquet')
        task(d, python, d/'q.parquet')
        for r in range(rounds):
            _, wall0, cpu0 = theirs(d, python, vlm, few)
            said, wall, cpu = theirs(d, python, vlm, n)
            rows.append(dict(what='lmms-eval', round=r, per_s=(n - few)/(wall - wall0), per_cpu_s=(n - few)/(cpu - cpu0), **where))
            for what, how, batch in ('generate', 'generate', 32), ('generate, one by one', 'generate', 1), ('likelihood', 'likelihood', 32):
                t, c = time.perf_counter(), time.process_time()
                got = {a['row']: a for b in answers(model, q, batched(order_of(model, q.rows), batch), how) for a in b}
                rows.append(dict(what=what, round=r, per_s=n/(time.perf_counter() - t), per_cpu_s=n/(time.process_time() - c), **where))
                if 'raw' in got[0]:
                    rows[-1] |= dict(same=sum(got[i]['raw'].strip() == said[i].strip() for i in said),
                                     parsed_same=sum(parse(got[i]['raw'], got[i]['options']) == parse(said[i], got[i]['options'])
                                                     for i in said))
            for row in rows[-4:]:
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if k not in where}, flush=True)
            pd.DataFrame(rows).round(4).to_csv(out, index=False)
    rate = pd.DataFrame(rows).pivot(index='round', columns='what', values='per_cpu_s')
    for what in rate.columns.drop('lmms-eval'):
        ratio = rate[what]/rate['lmms-eval']
        print(f'questions a second of the processor, {what} / lmms-eval: median {ratio.median():.1f}, from {ratio.min():.1f} to {ratio.max():.1f} in {rounds} rounds')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out'), p.add_argument('vlm'), p.add_argument('--python', default=sys.executable), p.add_argument('--n', type=int, default=200), p.add_argument('--rounds', type=int, default=3)
    main(**vars(p.parse_args()))
