"""Text as packed tokens: round trips, splits by file, tokenizers, and files that are not text."""

import numpy as np
import pytest

from sparse_jax import data
from sparse_jax.data import text


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        words = ' '.join(''.join(chr(c) for c in rng.integers(97, 123, 5)) for _ in range(40))
        path = tmp_path / f'd{i % 3}' / f'{i:02}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{i} größer → {words}\n')
    (tmp_path / 'image.png').write_bytes(b'\x89PNG\xff')
    return tmp_path


def _files(stream, end):
    """The files of a row of tokens."""
    ends = np.flatnonzero(stream == end)
    return [stream[a:b] for a, b in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def test_bytes_round_trip_and_no_file_is_in_both_parts(folder):
    corpus = text.load(text.find(str(folder), '**/*.txt'), validation=0.25)
    read = lambda tokens: {bytes(f.astype(np.uint8)).decode() for f in _files(tokens.stream, text.END)}
    train, validation = read(corpus.train), read(corpus.validation)
    assert len(train) == 9 and len(validation) == 3 and not train & validation
    assert train | validation == {path.read_text() for path in folder.rglob('*.txt')}
    assert corpus.num_tokens == 257 and corpus.train.num_bytes == sum(len(t.encode()) for t in train)
    again = text.load(text.find(str(folder), '**/*.txt'), validation=0.25)
    np.testing.assert_array_equal(corpus.train.stream, again.train.stream)


def test_sequences_are_packed_without_gaps(folder):
    loaded = data.load('text', str(folder), validation=0.25, length=32)
    stream = text.load(text.find(str(folder), '**/*.txt'), validation=0.25).train.stream
    inputs, labels = loaded.train
    assert inputs.shape == labels.shape == ((len(stream) - 1) // 32, 32)
    np.testing.assert_array_equal(inputs.ravel(), stream[: inputs.size])
    np.testing.assert_array_equal(labels.ravel(), stream[1 : labels.size + 1])
    batch = data.batches(loaded, batch_size=4, seed=0, num_batches=3)[2]
    assert batch['input'].dtype == batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['input'][:, 1:], batch['label'][:, :-1])
    assert loaded.num_outputs == 257 and len(loaded.test.labels) == 0
    assert loaded.bytes_per_token == pytest.approx(1, abs=0.02)


def test_a_tokenizer_file(folder):
    tokenizers = pytest.importorskip('tokenizers', reason="the extra is not installed: pip install '.[text]'")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='?'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    paths = text.find(str(folder), '**/*.txt')
    tokenizer.train_from_iterator([path.read_text() for path in paths], trainer)
    tokenizer.save(str(folder / 'bpe.json'))
    corpus = text.load(paths, validation=0.25, tokenizer=str(folder / 'bpe.json'))
    end = tokenizer.get_vocab_size()
    assert corpus.num_tokens == end + 1
    for part, count in ((corpus.train, 9), (corpus.validation, 3)):
        files = [tokenizer.decode(f.tolist()) for f in _files(part.stream, end)]
        assert len(files) == count and set(files) <= {path.read_text() for path in paths}
    loaded = data.load('text', str(folder), validation=0.25, length=16, tokenizer=str(folder / 'bpe.json'))
    assert loaded.bytes_per_token > 1.2, 'bits a byte are comparable with those of other tokenizers'
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / 'cutting.json'))
    again = text.load(paths, validation=0.25, tokenizer=str(folder / 'cutting.json'))
    np.testing.assert_array_equal(again.train.stream, corpus.train.stream)
    sparse_ids = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, 'b': 9}, unk_token='a'))
    sparse_ids.save(str(folder / 'gaps.json'))
    assert text.load(paths, validation=0.25, tokenizer=str(folder / 'gaps.json')).num_tokens == 11
    (folder / 'broken.json').write_text('{')
    with pytest.raises(ValueError, match=r"broken.json' cannot be read"):
        text.load(paths, validation=0.25, tokenizer=str(folder / 'broken.json'))
    with pytest.raises(ValueError, match=r"data.tokenizer='nowhere.json' is not a file"):
        text.load(paths, validation=0.25, tokenizer='nowhere.json')


def test_wrong_files(folder):
    with pytest.raises(ValueError, match=r"no file that matches data.pattern='\*.md'.*data.name='stdlib'"):
        text.find(str(folder), '*.md')
    for pattern in ('/abs/*.txt', ''):
        with pytest.raises(ValueError, match=f'data.pattern={pattern!r}'.replace('*', r'\*')):
            text.find(str(folder), pattern)
    with pytest.raises(ValueError, match=r'found 0 \(none\)'):
        text.split([], 0.5)
    with pytest.raises(ValueError, match=r'image.png is not UTF-8 at offset 0 \(invalid start byte\)'):
        text.load([*text.find(str(folder), '**/*.txt'), folder / 'image.png'], validation=0.25)
    (folder / 'cut.txt').write_bytes('abcdé'.encode()[:-1])
    with pytest.raises(ValueError, match=r'cut.txt is not UTF-8 at offset 4 \(unexpected end of data\)'):
        data.load('text', str(folder), validation=0.25)
    (folder / 'cut.txt').unlink()
    with pytest.raises(ValueError, match='data.validation=0.0: text is split by file'):
        data.load('text', str(folder))
    with pytest.raises(ValueError, match='at least two of them, found 1'):
        data.load('text', str(folder), pattern='d0/00.txt', validation=0.5)
    with pytest.raises(ValueError, match='the validation text has .* fewer than a sequence of data.length=2000'):
        data.load('text', str(folder), validation=0.25, length=2000)


def test_the_standard_library_is_there_and_has_no_tests():
    paths = text.standard_library()
    assert len(paths) > 200 and not any('test' in path.parts or 'site-packages' in path.parts for path in paths)
    assert any(path.name == 'argparse.py' for path in paths)


def test_a_resumed_run_refuses_another_text(folder, tmp_path_factory):
    from sparse_jax.runtime import records, workdir

    first = data.load('text', str(folder), validation=0.25, length=16)
    assert first.fingerprint == data.load('text', str(folder), validation=0.25, length=32).fingerprint
    (folder / 'd0' / '00.txt').write_text('another text')
    changed = data.load('text', str(folder), validation=0.25, length=16)
    run = tmp_path_factory.mktemp('run')
    workdir.check_data(run, first.fingerprint)
    records.write(run / 'data.json', {'fingerprint': first.fingerprint})
    workdir.check_data(run, first.fingerprint)
    with pytest.raises(ValueError, match='was begun on another text'):
        workdir.check_data(run, changed.fingerprint)
