"Labelled sets: damage to any file is said in a sentence, nothing is held in memory, and loaders' processes and threads change nothing."
import shutil, tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

import clipdino.data as data
from clipdino.core import SettingsError
from clipdino.data import BadData
from clipdino.pretrain import labelled_task
from clipdino.sets import Labelled, open_maps, open_set, whole_files

def smooth(i, w=48, h=40):
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([127 + 120*np.sin((x*(k + 1)/w + y*(i % 5)/h)*3 + i + k) for k in range(3)], -1).astype(np.uint8))

def save(i, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth(i).save(path)

TRUTH = [2, 0, 1, 1, 0, 2]  # class of each picture

def cifar10(d):
    for k, name in enumerate([f'data_batch_{k}.bin' for k in range(1, 6)] + ['test_batch.bin']):
        d.mkdir(exist_ok=True)
        (d/name).write_bytes(b''.join(bytes([TRUTH[(k + j) % 6]]) + np.random.default_rng(9*k + j).integers(0, 255, 3072, np.uint8).tobytes() for j in range(4)))
    (d/'batches.meta.txt').write_text('airplane\nautomobile\nbird\n')

def cub(d):
    for i, c in enumerate(TRUTH): save(i, d/'images'/f'{c + 1:03d}.Bird'/f'{i}.jpg')
    for name, value in dict(images=lambda i: f'{TRUTH[i] + 1:03d}.Bird/{i}.jpg', image_class_labels=lambda i: TRUTH[i] + 1,
                            train_test_split=lambda i: int(i < 3)).items():
        (d/f'{name}.txt').write_text(''.join(f'{i + 1} {value(i)}\n' for i in range(6)))
    (d/'classes.txt').write_text('1 001.Bird\n2 002.Bird\n3 003.Bird\n')

def flowers(d):
    for i in range(6): save(i, d/'jpg'/f'image_{i + 1:05d}.jpg')
    savemat(d/'imagelabels.mat', dict(labels=np.array([TRUTH], np.uint8) + 1))
    savemat(d/'setid.mat', dict(trnid=np.array([[6, 2]]), valid=np.array([[3, 1]]), tstid=np.array([[5, 4]])))

def cifar101(d):
    d.mkdir()
    np.save(d/'cifar10.1_v6_data.npy', np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8))
    np.save(d/'cifar10.1_v6_labels.npy', np.array(TRUTH))

def dense(d):
    for i in range(4):
        save(i, d/'images'/('train' if i < 2 else 'val')/f'{i}.png')
        (d/'labels'/('train' if i < 2 else 'val')).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.indices((40, 48)).sum(0).astype(np.uint8) % 3).save(d/'labels'/('train' if i < 2 else 'val')/f'{i}.png')

MAKERS = {'cifar10': cifar10, 'cub': cub, 'flowers': flowers, 'cifar10.1': cifar101, 'dense': dense}

def everything(name, d):
    if name != 'dense': return (s := open_set(f'{name}:{d}', 'test')).batch(range(len(s)), 16)
    pictures, maps = (s := open_maps(str(d), 'test')).batch(range(len(s)), 16)
    return np.concatenate([pictures, maps[..., None]], -1)

@pytest.mark.parametrize('name', MAKERS)
def test_damage_to_any_file_is_said(tmp_path, name):
    "Each file missing, empty, cut off or replaced by noise: a sentence of ours or, where the file is not needed or the damage can't be seen, pictures"
    MAKERS[name](tmp_path/'good')
    whole = everything(name, tmp_path/'good')
    noise, said = np.random.default_rng(0).bytes(500), 0
    for f in sorted(p.relative_to(tmp_path/'good') for p in (tmp_path/'good').rglob('*') if p.is_file()):
        data = (tmp_path/'good'/f).read_bytes()
        for damaged in None, b'', data[:len(data)//2], data[:-1], noise:
            shutil.rmtree(tmp_path/'bad', ignore_errors=True)
            shutil.copytree(tmp_path/'good', tmp_path/'bad')
            (tmp_path/'bad'/f).unlink() if damaged is None else (tmp_path/'bad'/f).write_bytes(damaged)
            try: got = everything(name, tmp_path/'bad')
            except (SettingsError, BadData) as e:
                assert len(str(e)) > 20 and '\n' not in str(e)
                said += 1
            else: assert 0 < len(got) <= len(whole) and got.shape[1:] == whole.shape[1:]
    assert said >= 5

def test_pictures_of_all_kinds_or_none(tmp_path):
    "And those in a folder that is linked to"
    for i, kind in enumerate(('jpg', 'jpeg', 'jfif', 'png', 'webp', 'gif', 'bmp')):
        for split in 'train', 'test':
            save(i, (p := tmp_path/split/f'{i % 2}'/f'{i}.{kind.replace("jfif", "jpg")}'))
            p.rename(p.with_suffix(f'.{kind}'))
    save(9, tmp_path/'elsewhere'/'9.png')
    (tmp_path/'train/0/more').symlink_to(tmp_path/'elsewhere')
    train, test = (open_set(str(tmp_path), s) for s in ('train', 'test'))
    assert (len(train), len(test)) == (8, 7) and test.batch(range(7), 8).std((1, 2, 3)).min() > 0
    save(3, tmp_path/'train/1/3.tif')
    with pytest.raises(BadData, match='1/3.tif is a picture of a kind that is not read: convert it to one of jpg'):
        open_set(str(tmp_path), 'train')

def test_a_million_pictures_fit():
    "What is kept of a picture is its path, a few numbers, and no bytes of it"
    n = 100_000
    tracemalloc.start()
    s = Labelled('big', np.zeros(n, np.int64), ('a', 'b'), '', whole_files([f'/a/folder/n01440764/n01440764_{i}.JPEG' for i in range(n)]))
    assert tracemalloc.get_traced_memory()[0] < 250*len(s)
    assert len(s.where.take(np.arange(5)).files) == 5
    tracemalloc.stop()

def test_threads_and_processes_change_nothing(tmp_path):
    MAKERS['cub'](tmp_path/'s')
    s, threads = open_set(f'cub:{tmp_path}/s', 'train'), torch.get_num_threads()
    one = s.batch(range(3), 24)
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, i): return s.batch([i], 24)[0]
        def __len__(self): return len(s)
    assert (np.concatenate([b.numpy() for b in DataLoader(Rows(), 2, num_workers=2)]) == one).all()
    try:
        torch.set_num_threads(3)
        assert (s.batch([2, 0, 1], 24) == one[[2, 0, 1]]).all()
    finally: torch.set_num_threads(threads)

@pytest.mark.parametrize('size', [16, 33, 64, 97])
def test_squares_are_torchvisions(tmp_path, size):
    "Large and small, flat and tall, JPEG and PNG, in any orientation"
    rng = np.random.default_rng(size)
    shapes = [(int(w), int(h)) for w, h in rng.integers(30, 700, (12, 2))] + [(1200, 40), (40, 1200), (1500, 1499)]
    theirs = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    files = []
    for k, wh in enumerate(shapes):
        for kind in 'jpg', 'png':
            files.append(f'{tmp_path}/{k}.{kind}')
            smooth(k, *wh).save(files[-1], quality=95)
    s = Labelled('any', np.zeros(len(files), np.int64), ('a',), '', whole_files(files))
    for f, im in zip(files, s.batch(range(len(files)), size)):
        off = np.abs(im - np.asarray(theirs(Image.open(f)), float))
        assert off.mean() < 1.5 and (off <= 2).mean() > .8, (f, off.max())
    im = smooth(1, 301, 202)
    for turn in range(1, 9):
        exif = im.getexif()
        exif[0x0112] = turn
        im.save(tmp_path/f'turned{turn}.png', exif=exif)
    s = Labelled('any', np.zeros(8, np.int64), ('a',), '', whole_files([f'{tmp_path}/turned{t}.png' for t in range(1, 9)]))
    for t, out in enumerate(s.batch(range(8), size), 1):
        off = np.abs(out - np.asarray(theirs(ImageOps.exif_transpose(Image.open(tmp_path/f'turned{t}.png'))), float))
        assert off.mean() < 1.5

def test_one_of_several_training_processes_has_its_share_of_the_cores(monkeypatch):
    "As launchers leave torch one thread, in which millions of pictures would be looked at"
    monkeypatch.setattr(data, 'cores', lambda: 8)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    assert not isinstance(data.threads(), ThreadPoolExecutor)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert data.threads()._max_workers == 4

def test_validation_pictures_are_of_all_classes(tmp_path):
    "Also where one class has many more pictures, which come last in an order that goes round the classes"
    for split, n in ('train', (40, 10)), ('test', (2, 2)):
        for c, k in zip('ab', n):
            for i in range(k): save(i, tmp_path/split/c/f'{i}.png')
    (*_, y), (*_, held) = labelled_task(str(tmp_path), 16)['classes']
    assert set(held.tolist()) == set(y.tolist()) == {0, 1} and (len(y), len(held)) == (40, 10)
