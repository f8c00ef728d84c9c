"""Eight virtual CPU devices for the sharded tests, and flags parsed (grain asks absl for some)."""

import jax
import pytest
from absl import flags
from hypothesis import settings

jax.config.update('jax_num_cpu_devices', 8)
settings.register_profile('default', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('default')


@pytest.fixture(scope='session', autouse=True)
def _parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['tests'])
