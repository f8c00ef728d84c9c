"""CIFAR in its true formats, small: packed and unpacked, binary and python, served by a real server, and damaged; the augmentation."""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax import data
from sparse_jax.data import augment, cifar, mnist

COUNT = 7  # images a file


def _content(archive, rng, classes):
    """(bytes, images, labels) of one file in an archive's format."""
    pixels = rng.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, classes, COUNT).astype(np.uint8)
    flat = pixels.reshape(COUNT, -1)
    if archive.label_bytes:
        extra = rng.integers(0, 20, (COUNT, archive.label_bytes - 1)).astype(np.uint8)  # coarse labels
        content = np.concatenate([extra, labels[:, None], flat], axis=1).tobytes()
    else:
        content = pickle.dumps({b'data': flat, archive.label_key: labels.tolist(), b'batch_label': b'testing'}, protocol=2)
    return content, pixels.transpose(0, 2, 3, 1), labels


def _write(folder, name, index, classes):
    """Packs a small archive of the given format; returns the archive with its MD5, and the arrays (train, test)."""
    archive, rng = cifar.ARCHIVES[name][index], np.random.default_rng(index)
    buffer, parts = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for part in (*archive.train, archive.test):
            content, *arrays = _content(archive, rng, classes)
            parts.append(arrays)
            info = tarfile.TarInfo(f'{archive.folder}/{part}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / archive.name).write_bytes(buffer.getvalue())
    train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return archive._replace(md5=hashlib.md5(buffer.getvalue()).hexdigest()), train, parts[-1]


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
@pytest.mark.parametrize('index', [0, 1], ids=['binary', 'python'])
def test_packed_and_unpacked_archives(name, index, tmp_path):
    archive, train, test = _write(tmp_path, name, index, cifar.CLASSES[name])
    for unpacked in (False, True):
        if unpacked:
            with tarfile.open(tmp_path / archive.name) as tar:
                tar.extractall(tmp_path, filter='data')
            (tmp_path / archive.name).unlink()
        got_train, got_test = cifar.load(name, tmp_path, [archive])
        for got, expected in ((got_train, train), (got_test, test)):
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])
            assert got[0].dtype == np.uint8 and got[1].dtype == np.int32
    assert len(got_train[1]) == COUNT * len(archive.train)


def test_download_from_a_real_server(tmp_path):
    archive, train, _ = _write(tmp_path / 'server', 'cifar10', 0, 10)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path / 'server'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/'
    folder = tmp_path / 'data'
    cifar.download('cifar10', folder, [archive], [address + 'nowhere/', address])
    np.testing.assert_array_equal(cifar.load('cifar10', folder, [archive])[0][0], train[0])
    cifar.download('cifar10', folder, [archive], [address + 'nowhere/'])  # it is there: no mirror is asked
    with pytest.raises(ValueError, match=r'no mirror gave cifar-10-binary.tar.gz.*expected 0000'):
        cifar.download('cifar10', tmp_path / 'other', [archive._replace(md5='0' * 32)], [address])
    assert not (tmp_path / 'other').exists()
    server.shutdown()
    server.server_close()


def test_the_checksums_are_those_of_the_authors_page():
    """https://www.cs.toronto.edu/~kriz/cifar.html; those of the python archives also stand in torchvision/datasets/cifar.py."""
    page = 'c58f30108f718f92721af3b95e74349a c32a1d4ab5d03f1284b67883e8d87530 eb9058c3a382ffc7106e4002c42a8d85 03b5dce01913d631647c71ecec9e9cb8'
    assert {a.md5 for archives in cifar.ARCHIVES.values() for a in archives} == set(page.split())


def test_missing_wrong_and_incomplete_archives(tmp_path):
    with pytest.raises(
        ValueError, match=r'has none of cifar-10-binary.tar.gz, cifar-10-python.tar.gz.*data.download=True.*:offline'
    ):
        cifar.load('cifar10', tmp_path)
    archive, *_ = _write(tmp_path, 'cifar10', 0, 10)
    with pytest.raises(ValueError, match=r'cifar-10-binary.tar.gz has the MD5 .*expected c32a1d'):
        cifar.load('cifar10', tmp_path)
    with tarfile.open(tmp_path / archive.name) as tar:
        tar.extractall(tmp_path, filter='data')
    (tmp_path / archive.folder / 'data_batch_4.bin').unlink()
    with pytest.raises(ValueError, match=r'data_batch_4.bin is missing: unpack cifar-10-binary.tar.gz again'):
        cifar.load('cifar10', tmp_path, [archive])


def test_damaged_binary_files_are_told_with_file_and_offset():
    content, *_ = _content(cifar.ARCHIVES['cifar10'][0], np.random.default_rng(0), 10)
    read = functools.partial(cifar.read_binary, 'a/data_batch_1.bin', label_bytes=1, classes=10)
    with pytest.raises(
        ValueError, match=f'a/data_batch_1.bin is truncated.*offset {6 * 3073}, and the file ends at {7 * 3073 - 1}'
    ):
        read(content[:-1])
    with pytest.raises(ValueError, match='is truncated.*offset 0, and the file ends at 0'):
        read(b'')
    wrong = bytearray(content)
    wrong[3 * 3073] = 10
    with pytest.raises(ValueError, match=f'has the label 10 at offset {3 * 3073}; labels are 0 to 9'):
        read(bytes(wrong))


def test_damaged_python_files_are_told_with_file_and_offset():
    archive = cifar.ARCHIVES['cifar100'][1]
    content, *_ = _content(archive, np.random.default_rng(0), 100)
    read = functools.partial(cifar.read_pickle, 'a/train', label_key=archive.label_key, classes=100)
    for damaged in (content[: len(content) // 2], b'', b'not a pickle'):
        with pytest.raises(ValueError, match=r'a/train cannot be read at offset \d+ of \d+'):
            read(damaged)
    with pytest.raises(ValueError, match='cannot be read'):
        read(pickle.dumps({b'data': np.zeros((2, 3072), np.uint8)}, protocol=2))
    with pytest.raises(ValueError, match=r'it names posix.system|it names nt.system|it names os.system'):
        read(pickle.dumps(_Evil(), protocol=2))
    labels = {archive.label_key: [5, 100], b'data': np.zeros((2, 3072), np.uint8)}
    with pytest.raises(ValueError, match='has the label 100 at record 1; labels are 0 to 99'):
        read(pickle.dumps(labels, protocol=2))
    with pytest.raises(ValueError, match=r'holds uint8\[2, 3071\] and 2 labels'):
        read(pickle.dumps({**labels, b'data': np.zeros((2, 3071), np.uint8)}, protocol=2))
    for wrong in (['a', 'b'], [None, 1], 3, [[1], [2]], [0.5, 1.0]):
        with pytest.raises(ValueError, match=r'a/train cannot be read at offset .* its labels are|cannot be read'):
            read(pickle.dumps({**labels, archive.label_key: wrong}, protocol=2))
    with pytest.raises(ValueError, match=r'a.train (holds|cannot be read)'):
        read(pickle.dumps({archive.label_key: [], b'data': np.zeros((0, 3072), np.uint8)}, protocol=2))


class _Evil:
    def __reduce__(self):
        import os

        return os.system, ('true',)


def test_cifar_from_the_config(tmp_path, monkeypatch):
    archive, train, _ = _write(tmp_path, 'cifar100', 0, 100)
    monkeypatch.setitem(cifar.ARCHIVES, 'cifar100', (archive,))
    loaded = data.load('cifar100', str(tmp_path), validation=2 / COUNT)
    assert loaded.num_outputs == 100 and loaded.input_shape == (32, 32, 3)
    assert [len(part.labels) for part in loaded[:3]] == [COUNT - 2, 2, COUNT]
    mean, std = np.array(cifar.MEAN), np.array(cifar.STD)
    np.testing.assert_allclose(loaded.prepare(train[0]), (train[0] / 255 - mean) / std, atol=1e-5)


@pytest.mark.slow
def test_digits_are_the_offline_digits_in_cifars_shape():
    loaded, plain = data.load('digits32'), data.load('mnist_offline')
    assert loaded.input_shape == (32, 32, 3) and [len(part.labels) for part in loaded[:3]] == [4000, 0, 1000]
    np.testing.assert_array_equal(loaded.test.labels, plain.test.labels)
    images = loaded.prepare(loaded.test.inputs[:9])
    for channel in range(3):
        np.testing.assert_allclose(images[:, 2:-2, 2:-2, channel], plain.test.inputs[:9, ..., 0], atol=1e-5)
    assert (images[:, 0] == images[0, 0, 0, 0]).all() and images[0, 0, 0, 0] == pytest.approx(-mnist.MEAN / mnist.STD)


def _expected(image, bits, flip):
    """One image by hand: reflect without repeating the edge, crop, mirror."""
    y, x = (int(bits) & 0xFFFF) * 9 >> 16, (int(bits) >> 16 & 0xFFFF) * 9 >> 16
    height, width = image.shape[:2]
    reflect = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    out = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            column = width - 1 - j if flip and int(bits) >> 32 & 1 else j
            out[i, j] = image[reflect(i + y - 4, height), reflect(column + x - 4, width)]
    return out


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 300), flip=st.booleans())
def test_augmentation_equals_numpy(seed, epoch, flip):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    bits = augment.random_bits(seed, epoch, np.arange(3))
    got = augment.crop_and_flip(images, bits, flip=flip)
    for i in range(3):
        np.testing.assert_array_equal(got[i], _expected(images[i], bits[i], flip))


def test_random_bits_are_a_function_of_seed_epoch_and_index_and_even():
    bits = augment.random_bits(3, 5, np.arange(90_000))
    np.testing.assert_array_equal(bits[[7, 80_000]], augment.random_bits(3, 5, np.array([7, 80_000])))
    for other in (augment.random_bits(4, 5, np.arange(1000)), augment.random_bits(3, 6, np.arange(1000))):
        assert not (bits[:1000] == other).any()
    assert len(np.unique(bits)) == len(bits)
    row, column, mirrored = augment.offsets(bits, True)
    pairs = np.bincount(row * 9 + column, minlength=81)
    assert pairs.shape == (81,) and abs(pairs - 90_000 / 81).max() < 6 * (90_000 / 81) ** 0.5
    assert abs(mirrored.mean() - 0.5) < 0.01


def test_training_images_are_augmented_and_test_images_are_not():
    loaded = data.load('digits32')
    make = lambda **options: data.batches(data.load('digits32', **options), batch_size=50, seed=1, num_batches=100)
    plain, changed = make(augment=False), make()
    order = np.random.default_rng((1, 0)).permutation(4000)[:50]
    np.testing.assert_array_equal(plain[0]['input'], loaded.prepare(loaded.train.inputs[order]))
    bits = augment.random_bits(1, 0, order)
    expected = np.stack([_expected(loaded.train.inputs[i], b, False) for i, b in zip(order, bits, strict=True)])
    np.testing.assert_array_equal(changed[0]['input'], loaded.prepare(expected))
    again = np.flatnonzero(np.random.default_rng((1, 1)).permutation(4000) == order[0])[0]
    assert (changed[80 + again // 50]['input'][again % 50] != changed[0]['input'][0]).any(), 'another crop in the next epoch'
