"WorldVQA: answers are true of the picture, the text tells nothing of them, and a question is a function of its index."
import colorsys, io, json, re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import chisquare
from sklearn.feature_extraction import FeatureHasher
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from clipdino.core import SettingsError
from clipdino.questions import CATEGORIES, COLUMNS, LETTERS, VISION, Questions
from clipdino.world import COLOURS, DRAW, FACTORS, FAMILIES, HUES, NAMES, POSITIONS, SPLITS, STYLES, TEXTURES, WORDS, annotations, render, series
from clipdino.worldvqa import TASKS, WorldVQA, describe, knowledge, to_parquet

PX = 120
each_task = pytest.mark.parametrize('task', CATEGORIES)
CHANCE = .25
NTH = ['first', 'second', 'third', 'fourth', 'fifth']

@pytest.fixture(scope='module')
def vqa(): return WorldVQA('test', 20*200)

@pytest.fixture(scope='module')
def asked(vqa): return {t: [(s, r) for s, r in vqa.made(range(len(vqa))) if r['category'] == t] for t in CATEGORIES}

@pytest.fixture(scope='module')
def train(): return WorldVQA('train', 20*1000).rows

def options(row): return [row[l] for l in LETTERS]
def answer(row): return row[row['answer']]

# --- an oracle that looks at the picture ---

def seen(s, kind): return [(name, box, mask) for k, name, box, mask in annotations(s, PX) if k == kind]
def centre(box): return (box[0] + box[2])/2/PX, (box[1] + box[3])/2/PX
def cell(x, y): return int(3*x), int(3*y)

def looks_like(s):
    "The style, from pixels; 60 px are three to a pixel of the pixelated style"
    a, plain = (render(x, 60).astype(int) for x in (s, replace(s, style=0)))
    if (a == plain).all(): return 'plain'
    if (a == 255 - plain).all(): return 'inverted'
    if (a == a[..., :1]).all(): return 'sketched'
    if set(np.unique(a)) <= {0, 127, 254}: return 'posterised'
    if (a.reshape(20, 3, 20, 3, 3) == a.reshape(20, 3, 20, 3, 3)[:, :1, :, :1]).all(): return 'pixelated'
    return 'blurred' if np.abs(np.diff(a, axis=0)).max() < np.abs(np.diff(plain, axis=0)).max() else '?'

def hue_of(s):
    "The colour, from the symbol's pixels where style and texture leave one alone"
    if STYLES[s.style] != 'plain' or TEXTURES[s.texture] != 'plain': return COLOURS[s.colour]
    hue = colorsys.rgb_to_hsv(*np.median(render(s, PX)[seen(s, 'object')[0][2]], 0)/255)[0]
    return min(HUES, key=lambda c: min(abs(HUES[c] - hue), 1 - abs(HUES[c] - hue)))

def texture_of(s):
    "The texture, by what the filled picture is made of"
    a = np.asarray(DRAW[s.kind](s, 96)[0].fill.convert('L')).astype(int)
    if a.min() == a.max(): return 'plain'
    tones = len(np.unique(a))
    edges = (np.abs(np.diff(a, axis=0)) > 4).mean() + (np.abs(np.diff(a, axis=1)) > 4).mean()
    return dict(tones=tones, edges=edges)

def rows_by_height(s):
    "Lines of a table or diagram: the names whose boxes share a height, from left to right"
    parts = sorted((centre(box)[1], centre(box)[0], name) for k, name, box, _ in annotations(s, PX))
    lines = []
    for y, x, name in parts:
        if lines and abs(lines[-1][0] - y) < .06: lines[-1][1].append((x, name))
        else: lines.append((y, [(x, name)]))
    return [[name for _, name in sorted(line)] for _, line in lines]

def highest_bar(s):
    parts = DRAW['bars'](s, PX)
    tops = {label.name: bar.mask.getbbox()[1] for bar, label in zip(parts[1::2], parts[2::2])}
    return min(tops, key=tops.get)

def highest_point(s):
    mask = np.asarray(next(p for p in DRAW['line'](s, PX) if p.name == 'line').mask)
    y = np.flatnonzero(mask.any(1))[0]
    return NTH[int(np.abs(np.linspace(.12, .94, len(series(s))) - np.flatnonzero(mask[y]).mean()/PX).argmin())]

def beside(s, relation, anchor):
    at = {cell(*centre(box)): name for name, box, _ in seen(s, 'object')}
    (x, y), = (c for c, name in at.items() if name == anchor)
    dx, dy = {'left of': (-1, 0), 'right of': (1, 0), 'above': (0, -1), 'below': (0, 1)}[relation]
    return at[x + dx, y + dy]

def true_answer(s, row):
    q, first = row['question'], lambda kind: seen(s, kind)[0][0]
    match row['category']:
        case 'SEEDBench': return str(len(seen(s, 'object')))
        case 'MathVista': return str(len(seen(s, 'object')) + int(re.search(r'\d', q)[0]))
        case 'MMStar':
            x0, y0, x1, y1 = seen(s, 'object')[0][1]
            return min(options(row), key=lambda o: abs(int(o) - 100*max(x1 - x0, y1 - y0)/PX))
        case 'A-OKVQA' | 'MMMU': return first('object')
        case 'VizWiz': return looks_like(s)
        case 'VQAv2': return hue_of(s)
        case 'MMVet': return f'{hue_of(s)} {first("object")}'
        case 'OKVQA':
            family = next(f for f in FAMILIES.values() if first('object') in f)
            return ', '.join(o for o in options(row) if o in family and o != first('object'))
        case 'MathVision': return TEXTURES[s.texture]
        case 'RealWorldQA':
            x, y = (int(np.abs(np.array([.2, .5, .8]) - v).argmin()) for v in centre(seen(s, 'object')[0][1]))
            return POSITIONS[3*y + x]
        case 'GQA': return beside(s, re.search('left of|right of|above|below', q)[0], re.search(r'(?:of|above|below) the (.*)\?', q)[1])
        case 'TextVQA' | 'OCRVQA': return first('word')
        case 'ScienceQA': return next(o for o, w in rows_by_height(s)
                                      if re.search(rf'\b{w}\b', q.replace('symbol is labelled', '').replace('symbol has the label', '')))
        case 'AI2D': return dict(rows_by_height(s))[re.search(r'(?:labels|label of|How is) the (.*?)(?: labelled)?\?', q)[1]]
        case 'DocVQA': return dict(rows_by_height(s))[re.search(r'(\w+)\?', q)[1]]
        case 'TableVQABench': return max(rows_by_height(s), key=lambda line: int(line[1]))[0]
        case 'ChartQA': return highest_bar(s)
        case 'InfoVQA': return highest_point(s)

@each_task
def test_the_answer_is_true_of_the_picture(asked, task):
    wrong = [(r['question'], options(r), answer(r), t) for s, r in asked[task] if (t := true_answer(s, r)) != answer(r)]
    assert len(asked[task]) == 200 and not wrong, wrong[:3]

def test_textures_show_in_the_fill(asked):
    "One tone only in plain; the gradient has many tones and few edges; stripes, dots and checks have edges; noise the most tones with edges"
    by = {t: [texture_of(s) for s, r in asked['MathVision'] if answer(r) == t] for t in TEXTURES}
    assert set(by['plain']) == {'plain'} and all(len(v) > 10 for v in by.values())
    mean = {t: {k: np.mean([x[k] for x in v]) for k in ('tones', 'edges')} for t, v in by.items() if t != 'plain'}
    assert mean['gradient']['edges'] < .1*min(mean[t]['edges'] for t in ('stripes', 'dots', 'checks'))
    assert mean['noise']['edges'] > max(mean[t]['edges'] for t in ('stripes', 'dots', 'checks', 'gradient'))

def test_symbols_are_as_long_as_is_said(asked):
    for s, r in asked['MMStar']:
        x0, y0, x1, y1 = seen(s, 'object')[0][1]
        assert abs(max(x1 - x0, y1 - y0) - PX*int(answer(r))/100) < 4, (NAMES[s.object], answer(r))  # px of 120

@pytest.mark.parametrize('task', ('OKVQA', 'GQA', 'ChartQA', 'InfoVQA', 'TableVQABench', 'ScienceQA', 'AI2D'))
def test_no_other_option_is_true(asked, task):
    "Where a wrong option could be true as well: the maximum is unique, one option is a relative, one symbol stands beside the other"
    for s, r in asked[task]:
        if task == 'OKVQA':
            assert sum(o in FAMILIES[next(f for f in FAMILIES if NAMES[s.object] in FAMILIES[f])] for o in options(r)) == 1 and NAMES[s.object] not in options(r)
        if task == 'GQA': assert len({n for n, *_ in seen(s, 'object')}) == s.count + 1
        if task in ('ChartQA', 'InfoVQA', 'TableVQABench'): assert Counter(v for _, v in series(s))[max(v for _, v in series(s))] == 1
        if task in ('ScienceQA', 'AI2D'): assert len({n for line in rows_by_height(s) for n in line}) == 4

POOLS = dict(SEEDBench='2345', MMStar=['26', '33', '40', '66', '80', '94'], VizWiz=STYLES, VQAv2=COLOURS,
             MathVista=[str(k) for k in range(4, 11)], RealWorldQA=POSITIONS, MathVision=TEXTURES,
             TextVQA=WORDS, OCRVQA=WORDS, AI2D=WORDS, DocVQA='123456789', InfoVQA=NTH, MMVet=[f'{c} {o}' for c in COLOURS for o in NAMES],
             **dict.fromkeys(('A-OKVQA', 'OKVQA', 'MMMU', 'ScienceQA', 'GQA'), NAMES), **dict.fromkeys(('ChartQA', 'TableVQABench'), WORDS))

@each_task
def test_options_differ_and_are_of_one_factor(asked, task):
    for s, r in asked[task]:
        o = options(r)
        assert len(set(o)) == 4 and set(o) <= set(POOLS[task])
        if task == 'MMMU': assert any(set(o) <= set(f) for f in FAMILIES.values())
        if task in ('A-OKVQA', 'OKVQA'): assert len({f for f, members in FAMILIES.items() for x in o if x in members}) == 4
        if task == 'MMVet': assert len({x.split(' ', 1)[0] for x in o}) == len({x.split(' ', 1)[1] for x in o}) == 2
        if task in ('ChartQA', 'TableVQABench'): assert set(o) <= {n for n, _ in series(s)}
        if task in ('ScienceQA', 'AI2D'): assert len(set(o) & {n for line in rows_by_height(s) for n in line}) == 2
        if task == 'GQA': assert len(set(o) & {n for n, *_ in seen(s, 'object')}) == s.count

@each_task
def test_styles_that_hide_the_answer_are_left_out_and_others_are_not(asked, task):
    styles = {STYLES[s.style] for s, _ in asked[task]}
    assert styles == set(STYLES) - set(TASKS[task].hidden)

# --- the text tells nothing ---

@each_task
def test_letters_are_balanced_in_every_beginning(vqa, task):
    letters = [r['answer'] for r in vqa.rows if r['category'] == task]
    assert set(Counter(letters).values()) == {50}
    for k in range(0, 200, 4): assert set(letters[k:k + 4]) == set(LETTERS)
    assert len({tuple(letters[k:k + 4]) for k in range(0, 200, 4)}) > 10

@each_task
def test_the_answer_is_uniform_among_the_options(train, task):
    "By rank in the alphabet and by length"
    rows = [r for r in train if r['category'] == task]
    rank = Counter(sorted(options(r)).index(answer(r)) for r in rows)
    assert chisquare([rank[k] for k in range(4)]).pvalue > 1e-3
    longest = np.mean([(len(answer(r)) == (m := max(map(len, options(r)))))/sum(len(o) == m for o in options(r)) for r in rows])
    assert abs(longest - CHANCE) < 3.5*(CHANCE*.75/len(rows))**.5

def test_the_order_of_the_options_tells_nothing(train):
    "24 orders of the sorted options, each with four letters, are equally frequent"
    counts = Counter((tuple(np.argsort(options(r))), r['answer']) for r in train)
    assert len(counts) == 96 and chisquare(list(counts.values())).pvalue > 1e-3

def slot(s, r):
    "How many places the answer could have in the scene, and which it has"
    match r['category']:
        case 'ChartQA' | 'TableVQABench': names, name = [n for n, _ in series(s)], answer(r)
        case 'InfoVQA': names, name = NTH[:len(series(s))], answer(r)
        case 'DocVQA': names, name = [n for n, _ in series(s)], re.search(r'(\w+)\?', r['question'])[1]
        case 'GQA': names, name = [n for n, *_ in seen(s, 'object')], answer(r)
        case 'ScienceQA': names, name = [line[0] for line in rows_by_height(s)], answer(r)
        case 'AI2D': names, name = [line[1] for line in rows_by_height(s)], answer(r)
    return len(names), names.index(name)

@pytest.mark.parametrize('task', ('ChartQA', 'TableVQABench', 'InfoVQA', 'DocVQA', 'AI2D', 'ScienceQA', 'GQA'))
def test_the_place_of_the_answer_is_exchangeable(task):
    "Bars, rows, points, halves of a diagram and symbols of a scene are equally often the answer"
    places = Counter(slot(s, r) for s, r in WorldVQA('val', 1200, tasks=(task,)).made(range(1200)))
    for n in {n for n, _ in places}: assert chisquare([places[n, k] for k in range(n)]).pvalue > 1e-3, places

def counting(train, test):
    "The option that was most often right when it was offered in this task"
    right, offered = Counter((r['category'], answer(r)) for r in train), Counter((r['category'], o) for r in train for o in options(r))
    return [max(LETTERS, key=lambda l: (right[k := (r['category'], r[l])] + 1)/(offered[k] + 4)) for r in test]

def majority(train, test):
    "The option that is most often the answer in this task"
    right = Counter((r['category'], answer(r)) for r in train)
    return [max(LETTERS, key=lambda l: right[r['category'], r[l]]) for r in test]

def words(text): return re.findall(r'[\w-]+', text.lower())

def bag_of_words(train, test):
    "Naive Bayes: words of the question, and of each option with its letter"
    def tokens(r):
        return [f'{r["category"]}:{w}' for w in words(r['question'])] + [f'{r["category"]}:{l}:{w}' for l in LETTERS for w in words(r[l])]
    h = FeatureHasher(2**14, input_type='string', alternate_sign=False)
    return MultinomialNB().fit(h.transform(map(tokens, train)), [r['answer'] for r in train]).predict(h.transform(map(tokens, test)))

def pairs_of_words(train, test):
    "Logistic regression on each option: its words, alone and with each word of the question and of the other options"
    def tokens(r, l):
        context = words(r['question']) + [f'o:{w}' for m in LETTERS if m != l for w in words(r[m])]
        return [f'{r["category"]}:{w}' for w in words(r[l])] + [f'{w}:{c}' for w in words(r[l]) for c in context]
    h = FeatureHasher(2**14, input_type='string')
    def x(rows): return h.transform(tokens(r, l) for r in rows for l in LETTERS)
    m = LogisticRegression(C=.1, max_iter=30).fit(x(train), [l == r['answer'] for r in train for l in LETTERS])
    return [LETTERS[k] for k in m.decision_function(x(test)).reshape(-1, 4).argmax(1)]

def accuracy(reader, train, test): return np.mean([l == r['answer'] for l, r in zip(reader(train, test), test)])

@pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')
@pytest.mark.parametrize('reader', (majority, counting, bag_of_words, pairs_of_words))
def test_blind_readers_are_at_chance(reader, train, vqa):
    few = train[:8000] if reader is pairs_of_words else train
    half = 2.58*(CHANCE*(1 - CHANCE)/len(vqa))**.5  # of a 99 % interval
    assert abs(accuracy(reader, few, vqa.rows) - CHANCE) < half

@pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')
@pytest.mark.parametrize('reader', (counting, bag_of_words, pairs_of_words))
def test_blind_readers_would_notice_a_leak(reader, train, vqa):
    "Let one answer in three be the first option by the alphabet"
    def leaky(rows): return [dict(r, answer=min(LETTERS, key=r.get)) if i % 3 == 0 else r for i, r in enumerate(rows)]
    few = train[:8000] if reader is pairs_of_words else train
    assert accuracy(reader, leaky(few), leaky(vqa.rows)) > CHANCE + .04

def test_wordings_are_all_used_and_independent_of_the_answer(train):
    for task in CATEGORIES:
        rows = [r for r in train if r['category'] == task]
        used = Counter(next(k for k, w in enumerate(TASKS[task].wordings)
                            if re.fullmatch(re.escape(w).replace(r'\{\}', '.+'), r['question'])) for r in rows)
        assert len(used) == len(TASKS[task].wordings) and chisquare(list(used.values())).pvalue > 1e-3

# --- a question is a function of its index ---

def same(a, b): return a[1] == b[1] and all(np.array_equal(getattr(a[0], f), getattr(b[0], f)) for f in a[0].__dataclass_fields__)

def test_a_question_does_not_depend_on_how_many_there_are(vqa):
    short = WorldVQA('test', 130)
    assert short.rows == vqa.rows[:130]
    for a, b in zip(short.made(range(100, 130)), vqa.made(range(90, 130))[10:]): assert same(a, b)
    ids = [3999, 17, 17, 11]
    assert all(same(a, vqa.made([i])[0]) for i, a in zip(ids, vqa.made(ids)))
    assert [r['index'] for r in vqa.rows] == list(range(4000)) and [r['category'] for r in vqa.rows[:20]] == list(CATEGORIES) and all(tuple(r) == COLUMNS for r in vqa.rows)

def test_splits_and_seeds_share_nothing():
    sets = [WorldVQA(split, 100, seed=seed) for split in SPLITS for seed in (0, 1)]
    assert len({s.u[16:96].tobytes() for w in sets for s, _ in w.made(range(100))}) == 800
    assert len({str(w.rows[:20]) for w in sets}) == len({w.fingerprint for w in sets}) == 8

def test_fingerprint_names_what_decides_the_set():
    sets = [dict(), dict(split='val'), dict(n=21), dict(canvas=32), dict(seed=1), dict(tasks=('GQA',))]
    assert len({WorldVQA(**dict(dict(n=20), **s)).fingerprint for s in sets}) == len(sets)
    assert WorldVQA(n=20).fingerprint == WorldVQA(n=20).fingerprint

def test_pictures_are_the_scenes_and_batches_are_the_pictures(vqa):
    for i in 3, 11, 16:
        assert vqa.picture(i).size == (48, 48) and np.array_equal(np.asarray(vqa.picture(i)), render(vqa.scene(i), 48))
    assert np.array_equal(vqa.batch([16, 3], 48), np.stack([np.asarray(vqa.picture(i)) for i in (16, 3)]))
    assert np.array_equal(vqa.batch([5], 96), Questions.batch(vqa, [5], 96))

def test_tasks_can_be_chosen(vqa):
    w = WorldVQA(n=40, tasks=VISION)
    assert [r['category'] for r in w.rows[:5]] == list(VISION) and Counter(r['answer'] for r in w.rows) == dict.fromkeys(LETTERS, 10)
    assert [TASKS[t].factor for t in VISION] == ['count', 'size', 'style', 'colour', 'position']
    assert [FACTORS[f][vqa.scene(i).label(f)] for f, i in (('colour', 5), ('style', 3), ('position', 10))] == [answer(vqa.rows[i]) for i in (5, 3, 10)]

@pytest.mark.parametrize('wrong, says', [(dict(split='training'), "split='training' is not one of train, probe, val, test"),
                                         (dict(tasks=('GQA', 'MMLU')), "task='MMLU' is not one of SEEDBench"),
                                         (dict(n=0), 'n=0 must be above 0'), (dict(n=-3), 'n=-3 must be above 0'),
                                         (dict(canvas=8), 'canvas=8 at least 16 px'),
                                         (dict(tasks='GQA'), 'must be a list of different names'), (dict(tasks=()), 'must be a list'),
                                         (dict(tasks=('GQA', 'GQA')), 'must be a list')])
def test_wrong_input_is_said_in_a_sentence(wrong, says):
    with pytest.raises(SettingsError, match=re.escape(says)): WorldVQA(**wrong)

# --- the description is complete ---

FAMILY = dict(re.fullmatch('the (.*) belongs to the (.*) family', k).groups() for k in knowledge())

def read(text, row):
    "Answers from a description's text alone"
    q, o = row['question'], options(row)
    facts = text.split(', ')
    pairs = dict(f.rsplit(' ', 1) for f in facts if re.search(r' \d$', f))
    at = dict(f.split(' at the ') for f in facts if ' at the ' in f)
    labels = dict(f.split(' labelled ') for f in facts if ' labelled ' in f)
    find = lambda pattern: re.search(pattern, text)[1]
    thing = next((f for f in facts if f.split(' ', 1)[-1] in NAMES), '')
    match row['category']:
        case 'SEEDBench': return find(r'(\d) symbols')
        case 'MathVista': return str(int(find(r'(\d) symbols')) + int(re.search(r'\d', q)[0]))
        case 'MMStar': return find(r'(\d+) per cent')
        case 'VizWiz': return find(r'(\w+) style')
        case 'MathVision': return find(r'(\w+) texture')
        case 'A-OKVQA' | 'MMMU': return thing.split(' ', 1)[1]
        case 'VQAv2': return thing.split(' ')[0]
        case 'MMVet': return thing
        case 'OKVQA': return next(x for x in o if FAMILY[x] == FAMILY[thing.split(' ', 1)[1]])
        case 'RealWorldQA': return find(r'at the ([\w ]+)')
        case 'TextVQA' | 'OCRVQA': return find(r'the word (\w+)')
        case 'GQA':
            relation, anchor = re.search(r'(left of|right of|above|below) the (.*)\?', q).groups()
            step = {'left of': -1, 'right of': 1, 'above': -3, 'below': 3}[relation]
            return next(n for n, p in at.items() if POSITIONS.index(p) == POSITIONS.index(at[anchor]) + step)
        case 'ScienceQA': return next(k for k, w in labels.items() if re.search(rf'(labelled|label|word) {w}\b', q))
        case 'AI2D': return next(w for k, w in labels.items() if re.search(rf'the {k}( labelled)?\?', q))
        case 'DocVQA': return next(v for k, v in pairs.items() if k.split()[-1] in q.strip('?').split())
        case 'ChartQA': return max(pairs, key=pairs.get)
        case 'TableVQABench': return max(pairs, key=pairs.get).split()[-1]
        case 'InfoVQA': return max((k for k in pairs if k.endswith('point')), key=pairs.get).split()[0]

@each_task
def test_the_description_answers_every_question(asked, task):
    for k, (s, r) in enumerate(asked[task]):
        text = describe(s, k/200)
        assert read(text, r) == answer(r), (text, r)
        assert len(text.split()) <= 40

def test_knowledge_names_every_object_and_its_family():
    assert FAMILY == {o: f for f, members in FAMILIES.items() for o in members}

# --- Parquet ---

def test_parquet_round_trip(tmp_path, vqa):
    small, path = WorldVQA('test', 50), tmp_path/'test.parquet'
    to_parquet(small, path, group=16)
    f = pq.ParquetFile(path)
    assert f.num_row_groups == 4 and [p.name for p in tmp_path.iterdir()] == ['test.parquet']
    assert {c.name: str(c.type) for c in f.schema_arrow} == dict(index='int64', **dict.fromkeys(COLUMNS[1:], 'string'),
                                                                 image='struct<bytes: binary, path: string>')
    rows = f.read().to_pylist()
    assert [{k: r[k] for k in COLUMNS} for r in rows] == vqa.rows[:50]
    for i, r in enumerate(rows):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(r['image']['bytes']))), np.asarray(small.picture(i))) and r['image']['path'] == f'{i}.png'
    assert json.loads(f.schema_arrow.metadata[b'huggingface'])['info']['features']['image'] == {'_type': 'Image'}

def test_parquet_appears_whole_or_not_at_all(tmp_path):
    class Broken(WorldVQA):
        def picture(self, i): return super().picture(i) if i < 10 else 1/0
    with pytest.raises(ZeroDivisionError): to_parquet(Broken('test', 20), tmp_path/'x.parquet', group=4)
    assert not list(tmp_path.iterdir())
