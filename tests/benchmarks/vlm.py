"""Stage 2 of a VLM (connector and language model, questions of the world) beside transformers' own LLaVA on the same model, conversations, optimiser and machine.

    python tests/benchmarks/vlm.py OUT.csv [--encoder random:clipdino_vit_mini] [--llm world] [--batch 64] [--steps 12] [--rounds 5]

The peer is `LlavaForConditionalGeneration` as its documentation trains it: pictures go through the frozen tower at every step, batches are drawn at random and padded to their longest, the head is applied to every token.
Ours reads kept patch tokens, sorts by length, and applies the head to the answers. The language model is the embedded one unless `--llm` names another. Making the patch tokens is not counted, and given apart: it is done once
for all stages, epochs and language models. One row for each contestant and round.
"""
import argparse, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from clipdino.chat import Form, with_picture_tokens
from clipdino.core import environment
from clipdino.pretrain import accelerator
import clipdino.vlm
from clipdino.vlm import Parts, Stage, picture_tokens, settings

class Peer:
    "The same VLM by transformers alone"
    def __init__(self, p:Parts, batch:int):
        self.p, self.batch, self.model = p, batch, p.vlm.train()
        p.train_lm()
        p.vlm.model.multi_modal_projector.requires_grad_(True)
        self.opt = torch.optim.AdamW([v for v in p.vlm.parameters() if v.requires_grad], lr=1e-4, fused=True)
        form, chats, n = Form(p.tokenizer, p.run.template), p.chats[1], picture_tokens(p.run, p.encoder)
        made = form([(chats.turns(i), True) for i in range(len(chats))])
        self.rows = [with_picture_tokens(*m, form.image, n) for m in made]
        self.order = np.random.default_rng(0)
    def step(self)->int: # -> conversations
        at = self.order.choice(len(self.rows), self.batch, replace=False)
        length = max(len(self.rows[i][0]) for i in at)
        ids, mask, labels = torch.full((len(at), length), self.p.tokenizer.pad_token_id), torch.zeros(len(at), length, dtype=torch.int64), torch.full((len(at), length), -100)
        for k, i in enumerate(at):
            t, loss = self.rows[i]
            ids[k, :len(t)], mask[k, :len(t)], labels[k, :len(t)] = torch.from_numpy(t), 1, torch.from_numpy(np.where(loss, t, -100))
        e = self.p.encoder
        pixels = e.prepare(self.p.chats[1].pictures.batch(np.array([self.p.chats[1].picture_id(int(i)) for i in at]), e.size))
        self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.opt.param_groups[0]['params'], 1.)
        self.opt.step()
        self.opt.zero_grad()
        return len(at)

def main(out, encoder, llm, batch, steps, rounds, questions):
    rows = []
    with tempfile.TemporaryDirectory() as d:
        Path(d, 'settings.ini').touch()
        run = settings('mini', encoder=encoder, stage1_samples=64, llm=llm, stage2_batch=batch, stage2_samples=batch*steps*rounds,
                       questions=0)
        clipdino.vlm.WORLD_ROWS['mini'] = (64, questions)
        begun = time.perf_counter()
        p = Parts(run, Path(d), accelerator(run, Path(d)))
        made = time.perf_counter() - begun
        stage, peer = Stage(p, 2), Peer(p, batch)
        def ours(): return batch if stage.update(stage.parts(stage.step)) else 0
        contestants = dict(ours=ours, transformers=peer.step)
        for f in contestants.values(): f()
        for r in range(rounds):
            for what, f in list(contestants.items())[::1 if r % 2 == 0 else -1]:
                begun, cpu = time.perf_counter(), time.process_time()
                n = sum(f() for _ in range(steps))
                seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
                rows.append(dict(what=what, round=r, encoder=encoder, llm=llm, batch=batch, per_s=round(n/seconds, 2),
                                 per_cpu_s=round(n/cpu, 2), parameters_lm=sum(v.numel() for v in p.reader.lm.parameters()),
                                 seconds_to_load=round(made, 1),
                                 machine=environment()['device'], threads=torch.get_num_threads(), torch=torch.__version__,
                                 commit=environment()['commit']))
                print(f'{r}  {what:14} {rows[-1]["per_s"]:8.1f} conversations/s', flush=True)
                pd.DataFrame(rows).to_csv(out, index=False)
    for by, unit in dict(per_s='second', per_cpu_s='second of the processor').items():
        rate = pd.DataFrame(rows).pivot(index='round', columns='what', values=by)
        ratio = rate.ours/rate.transformers
        print(f'conversations a {unit}, ours / transformers: median {ratio.median():.2f}, from {ratio.min():.2f} to {ratio.max():.2f} in {rounds} rounds')

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('out')
    for k, v in dict(encoder='random:clipdino_vit_mini', llm='world', batch=64, steps=12, rounds=5, questions=2000).items():
        a.add_argument(f'--{k}', type=type(v), default=v)
    main(**vars(a.parse_args()))
