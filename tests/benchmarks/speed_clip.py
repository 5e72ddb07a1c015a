"""Speed of CLIP training, decoding and augmentation included: ours beside open_clip's own trainer, on the same shards, in turn on the same machine.

    python -m venv peer && peer/bin/pip install open_clip_torch==3.3.0 webdataset==0.2.86   # 3.3.0's trainer fails on webdataset 1.0 (KeyError: 'fname')
    python tests/benchmarks/speed_clip.py OUT.csv --peer peer/bin/python [--data SHARDS] [--rounds 3]
    python tests/benchmarks/speed_clip.py OUT.csv --memory

Both train the same timm ViT (width 128, 4 blocks, patches of 8 px, 48 px), the same text transformer (width 128, 2 layers, 49,408 tokens, context 77) and AdamW with batches of 64 in fp32 on the CPU, on JPEGs of the
embedded world of 224 px with its short captions, or on `--data`. First each one's settings are tried shortly (workers, where views are made, `torch.compile`); then the best of each run in turn, every run in a fresh
process. images_per_s is the median over 8 equal parts of a run without its first fifth, from the seconds of every step as either trainer logs them; seconds is the whole process; peak_mb the greatest proportional set
size of the process and its workers, looked at every second. Each one's own design is part of what is measured: ours decodes a JPEG to at most `--canvas` px (the `paper` preset's ratio to the view) and drops columns of
tokens that are padding in the whole batch; open_clip decodes in full, and pads captions to 77 tokens.
"""
import argparse, json, os
from pathlib import Path

import common

MODEL = dict(embed_dim=128, vision_cfg=dict(timm_model_name='speed_vit', timm_pool='token', timm_proj='linear', image_size=common.IMAGE),
             text_cfg=dict(vocab_size=49408, width=128, heads=2, layers=2))
WRAPPER = '''import json, sys
sys.path.insert(0, sys.argv[1])
import common, open_clip  # registers the ViT
open("speed.json", "w").write(sys.argv[2])
open_clip.add_model_config("speed.json")
from open_clip_train.main import main
main(sys.argv[3:])'''

def open_clip(peer, paths, context, samples, workers, torchcompile):
    "Command that runs open_clip_train.main with our model's configuration, logging every step"
    given = dict(model='speed', train_data='::'.join(paths), dataset_type='webdataset', train_num_samples=samples, batch_size=common.BATCH,
                 epochs=1, workers=workers, precision='fp32', device='cpu',
                 lr=1e-3, beta1=.9, beta2=.98, eps=1e-8, wd=.1, warmup=max(samples//common.BATCH//10, 1), grad_clip_norm=1,
                 force_context_length=context, log_every_n_steps=1, logs='logs')
    return [peer, '-c', WRAPPER, str(Path(__file__).parent), json.dumps(MODEL), *(s for k, v in given.items() for s in ('--' + k.replace('_', '-'), str(v)))] + ['--torchcompile']*torchcompile

common.serve(dict(ours=common.ours))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--peer', help='Python that has open_clip_torch and webdataset')
    p.add_argument('--context', type=int, default=77, help='longest caption, tokens')
    args, paths = common.arguments(p, samples=9600, trial=3200)
    def ours(data=args.data, **given):
        return common.child(__file__, 'ours', objective='clip', data=data, dim=128, text_width=128, text_layers=2, vocab=49408,
                            context=args.context, canvas=args.canvas, **given)
    if args.memory: common.memory(ours, 'clip', paths, args)
    else:
        commands = {'ours': ours, 'open_clip 3.3.0': lambda **given: open_clip(os.path.abspath(args.peer), paths, args.context, **given)}
        grids = {'ours': common.grid(workers=[0, 1], augment=['device'], compile=['off', 'on']) + common.grid(workers=[1], augment=['workers'], compile=['off']),
                 'open_clip 3.3.0': common.grid(workers=[0, 1, 2], torchcompile=[False, True])}
        common.compare('clip', commands, grids, args)
