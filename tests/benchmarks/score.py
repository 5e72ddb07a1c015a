"""Four-option questions scored by the likelihood of their letters, beside generating answers: in batches of the same size, and one question at a time as public harnesses do.

    python tests/benchmarks/score.py OUT.csv [--vlm FOLDER] [--questions SPEC] [--n 1000] [--batch 32] [--single 100] [--tokens 16] [--rounds 3] [--device cpu]

Every contestant is this package's own code with the same model, processor and pictures; all read pictures and tokenise anew in every round. Without `--vlm` the model is untrained (`--encoder`; `--width` and `--layers` of its language model). An untrained
model hardly ever ends its answer, so it writes all of `--tokens`; one that was trained to answer by a letter writes two, the letter and the end. Both lengths are measured, and the column `tokens` has the mean of what was
written. On a shared machine compare seconds of the processor (`per_cpu_s`), which others' work hardly changes; on a GPU only `per_s` means anything. One row for each contestant and round.
"""
import argparse, tempfile, time

import numpy as np
import pandas as pd
import torch

from clipdino.core import digest, environment, np_rng
from clipdino.questions import LETTERS, Questions, open_questions
from clipdino.vmcbench import answers, batched, load_vlm, order_of, untrained_vlm

class Made(Questions):
    "Questions of six to twenty words with options of one to three, about pictures of noise"
    def __init__(self, n:int):
        words = [''.join(np_rng(7, 1, i).choice(list('aeiounrstlmdk'), 2 + i % 7)) for i in range(400)]
        def text(g, low, high): return ' '.join(g.choice(words, g.integers(low, high + 1)))
        rows = [dict(index=i, question=text(g := np_rng(7, 2, i), 6, 20) + '?', **{l: text(g, 1, 3) for l in LETTERS},
                     answer=LETTERS[i % 4], category='made') for i in range(n)]
        super().__init__('made', digest('made', n), rows)
    def picture(self, i):
        from PIL import Image
        return Image.fromarray(np_rng(7, 3, i).integers(0, 256, (48, 64, 3), np.uint8))

def main(out, vlm, questions, n, batch, single, tokens, rounds, device, encoder, width, layers):
    q = Made(n) if questions == 'made' else open_questions(questions, n)
    with tempfile.TemporaryDirectory() as d:
        model = load_vlm(vlm or untrained_vlm(d, q, encoder, width, layers), device)
    order, rows = order_of(model, q.rows), []
    some = order[::max(len(order)//single, 1)][:single]  # of all lengths
    all_, each = batched(order, batch), batched(some, 1)
    contestants = {'likelihood': ('likelihood', all_, 1), 'generate': ('generate', all_, tokens),
                   'generate 2 tokens': ('generate', all_, 2), 'generate, one by one': ('generate', each, tokens),
                   'generate 2 tokens, one by one': ('generate', each, 2)}
    where = dict(vlm=model.name, parameters=model.about['parameters'], questions=q.name, machine=environment()['device'],
                 threads=torch.get_num_threads(), torch=torch.__version__, commit=environment()['commit'])
    for how in ('likelihood', 'generate'): list(answers(model, q, all_[:1], how, max_new_tokens=tokens))  # warm
    for r in range(rounds):
        for what, (how, batches, new) in list(contestants.items())[::1 if r % 2 == 0 else -1]:
            begun, cpu = time.perf_counter(), time.process_time()
            got = [row for b in answers(model, q, batches, how, max_new_tokens=new) for row in b]
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
            rows.append(dict(what=what, round=r, n=len(got), batch=len(batches[0]), seconds=round(seconds, 3),
                             per_s=round(len(got)/seconds, 2), per_cpu_s=round(len(got)/cpu, 2), max_new_tokens=new,
                             tokens=round(float(np.mean([g.get('tokens', 0) for g in got])), 2), **where))
            print(f'{r}  {what:30} {rows[-1]["per_s"]:8.1f} questions/s  {rows[-1]["tokens"]:5.1f} tokens', flush=True)
            pd.DataFrame(rows).to_csv(out, index=False)
    for by, unit in dict(per_s='second', per_cpu_s='second of the processor').items():
        rate = pd.DataFrame(rows).pivot(index='round', columns='what', values=by)
        for what in list(contestants)[1:]:
            ratio = rate['likelihood']/rate[what]
            print(f'questions a {unit}, likelihood / {what}: median {ratio.median():.2f}, from {ratio.min():.2f} to {ratio.max():.2f} in {rounds} rounds')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out')
    for k, v in dict(vlm='', questions='made', n=1000, batch=32, single=100, tokens=16, rounds=3, device='cpu',
                     encoder='random:clipdino_vit_mini', width=128, layers=4).items():
        p.add_argument(f'--{k}', type=type(v), default=v)
    main(**vars(p.parse_args()))
