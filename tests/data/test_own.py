"""Data sets of the user's: folders of images, .npz files, functions."""

import numpy as np
import pytest
from PIL import Image

from sparse_jax import data
from tests import own_parts


def _folder(path, count=20, size=12, split=()):
    images, labels = own_parts.arrays(0, count, size)
    for part in split or ('',):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = path / part / f'class_{label}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f'{i:04d}.png')
    return images, labels


def test_a_folder_of_classes(tmp_path):
    images, labels = _folder(tmp_path, 80)
    (tmp_path / 'class_0' / 'notes.txt').write_text('no image')
    made = data.load('folder', str(tmp_path), validation=0.1)
    assert made.num_outputs == 4 and made.input_shape == (12, 12, 3) and len(made.fingerprint) == 8
    tests = sum(np.count_nonzero(labels == label) // 10 for label in range(4))
    assert len(made.test.labels) == tests and len(made.train.labels) + len(made.validation.labels) == 80 - tests
    stored = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part in (made.train, made.validation, made.test):  # each image is there once, with its class
        assert all(stored.pop(image.tobytes()) == label for image, label in zip(part.inputs, part.labels, strict=True))
    assert not stored
    prepared = made.prepare(np.concatenate([made.train.inputs, made.validation.inputs]))
    np.testing.assert_allclose(prepared.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(prepared.std((0, 1, 2)), 1, atol=1e-4)
    assert data.load('folder', str(tmp_path)).fingerprint == made.fingerprint
    assert data.load('folder', str(tmp_path), size=8).input_shape == (8, 8, 3)


def test_folders_for_training_and_testing(tmp_path):
    _folder(tmp_path, 20, split=('train', 'test'))
    made = data.load('folder', str(tmp_path))
    assert len(made.train.labels) == len(made.test.labels) == 20
    (tmp_path / 'test' / 'class_9').mkdir()
    with pytest.raises(ValueError, match='test has the classes class_9, which train has not'):
        data.load('folder', str(tmp_path))


def test_an_image_that_cannot_be_read_is_named(tmp_path, caplog):
    _folder(tmp_path, 30)
    broken = tmp_path / 'class_1' / 'zz.png'
    broken.write_bytes(next((tmp_path / 'class_1').glob('*.png')).read_bytes()[:60])
    with pytest.raises(ValueError, match=r'class_1/zz\.png cannot be read as an image .*give config\.data\.skip_unreadable=True'):
        data.load('folder', str(tmp_path))
    made = data.load('folder', str(tmp_path), skip_unreadable=True)
    assert len(made.train.labels) + len(made.test.labels) == 30
    assert 'zz.png' in caplog.text and 'left out' in caplog.text


def test_an_npz_file_and_functions(tmp_path):
    (x, y), (tx, ty) = own_parts.arrays(0), own_parts.arrays(1, 40)
    np.savez(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=tx, y_test=ty)
    made, same = data.load('npz', str(tmp_path / 'a.npz')), data.load('tests.own_parts:load', 'data/mnist')
    for one in (made, same):
        np.testing.assert_array_equal(one.train.inputs, x)
        np.testing.assert_array_equal(one.test.labels, ty)
    assert made.fingerprint == same.fingerprint and made.augment is None
    gray = tmp_path / 'gray.npz'
    np.savez(gray, x_train=x[..., 0] / 255.0, y_train=y, x_test=tx[..., 0] / 255.0, y_test=ty)
    made = data.load('npz', str(gray))
    assert made.input_shape == (12, 12, 1) and made.train.inputs.dtype == np.float32
    np.testing.assert_array_equal(made.prepare(made.train.inputs), made.train.inputs)
    assert data.load('tests.own_parts:load_whole', '').num_outputs == 4


def test_what_does_not_fit_is_told(tmp_path):
    (tmp_path / 'empty').mkdir()
    _folder(tmp_path / 'sizes', 20)
    _folder(tmp_path / 'sizes' / 'class_8', 20, size=20)
    for path in (tmp_path / 'sizes' / 'class_8').glob('*/*.png'):
        path.rename(tmp_path / 'sizes' / 'class_8' / path.name)
    _folder(tmp_path / 'half', 20, split=('train',))
    x, y = own_parts.arrays(0)
    np.savez(tmp_path / 'missing.npz', x_train=x, y_train=y)
    np.savez(tmp_path / 'labels.npz', x_train=x, y_train=y.astype(float), x_test=x, y_test=y)
    np.savez(tmp_path / 'class.npz', x_train=x, y_train=np.minimum(y, 2), x_test=x, y_test=y)
    np.savez(tmp_path / 'size.npz', x_train=x, y_train=y, x_test=x[:, :6], y_test=y)
    (tmp_path / 'text.npz').write_text('no zip')
    for name, folder, message in (
        ('folder', 'nothing', 'must have a folder of images for each class, at least two'),
        ('folder', 'empty', 'must have a folder of images for each class'),
        ('folder', 'sizes', 'has images of 2 sizes, such as 12x12 and 20x20: give config.data.size'),
        ('folder', 'half', 'has one of the folders train and test'),
        ('npz', 'nothing.npz', 'is not there'),
        ('npz', 'text.npz', 'cannot be read as an .npz file'),
        ('npz', 'missing.npz', 'has no x_test, y_test: it has x_train, y_train'),
        ('npz', 'labels.npz', 'y_train must be classes from 0 on'),
        ('npz', 'class.npz', 'y_test has class 3, y_train no more than 2'),
        ('npz', 'size.npz', 'must be of one size and type'),
        ('tests.own_parts:load_nothing', '', r'must give \(\(x_train, y_train\), \(x_test, y_test\)\).*got int'),
        ('tests.own_parts:load_fails', '', r'fails \(OSError: the server is away\)'),
        ('tests.own_parts:arrayz', '', "has no 'arrayz'. Did you mean 'arrays'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(name, str(tmp_path / folder))
