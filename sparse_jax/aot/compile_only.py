"""Devices that programs can be compiled for and not run on: a GPU or a TPU that this machine does not have.

For a GPU that takes jax's CUDA plugin and the two programs ptxas and nvlink; neither driver nor CUDA libraries. For a TPU libtpu. The
process must run with ``JAX_PLATFORMS=cpu`` (:func:`run_on_cpu`): the plugin, started as usual, looks for a GPU and complains.
"""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
from jax.experimental import topologies

NEEDS = {
    'gpu': "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, both of jax's version, and ptxas and nvlink on the PATH "
    '(pip install --no-deps nvidia-cuda-nvcc)',
    'tpu': "pip install libtpu, of the version that jax's extra [tpu] names",
}

# Name, bytes of memory, bytes a second: from the data sheets. What else the compiler asks is one for the Hopper family.
_GPUS = {
    'h100': ('NVIDIA H100 80GB HBM3', 84_942_979_072, 3_352_320_000_000),
    'h200': ('NVIDIA H200', 151_397_597_184, 4_800_000_000_000),
}
_SPECIFICATION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_TPUS = ((4, 'v5e:2x2'), (8, 'v5e:2x4'), (16, 'v5e:4x4'), (64, 'v5e:8x8'), (256, 'v5e:16x16'))


def run_on_cpu() -> None:
    """Tells jax, before it has looked for devices, that this process is to run on the CPU."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')


def unavailable(platform: str) -> str:
    """Why nothing can be compiled for a platform here, and what would help; empty where it can.

    Args:
      platform: 'gpu' or 'tpu'.
    """
    if os.environ.get('JAX_PLATFORMS') != 'cpu':
        return 'JAX_PLATFORMS must be cpu'
    if platform == 'tpu':
        return '' if importlib.util.find_spec('libtpu') else f'there is no libtpu: {NEEDS["tpu"]}'
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec('jax_plugins.xla_cuda13'):
            _find_tools()
            missing = [name for name in ('ptxas', 'nvlink') if not shutil.which(name)]
            return f'there is no {" and no ".join(missing)} on the PATH: {NEEDS["gpu"]}' if missing else ''
    return f'there is no CUDA plugin for jax: {NEEDS["gpu"]}'


def _find_tools() -> None:
    """Puts the programs of NVIDIA's wheel on the PATH, where it has none."""
    packages = (pathlib.Path(folder) / 'nvidia' for folder in sys.path)
    folders = [str(folder) for package in packages for folder in package.glob('*/bin') if (folder / 'ptxas').exists()]
    if folders and not (shutil.which('ptxas') and shutil.which('nvlink')):
        os.environ['PATH'] = os.pathsep.join([os.environ.get('PATH', ''), *folders])


def devices(platform: str, count: int = 1, *, gpu: str = 'h100') -> list[Any]:
    """Devices to compile for.

    Args:
      platform: 'gpu' or 'tpu'; TPUs are of the kind v5e.
      count: how many.
      gpu: 'h100' or 'h200'.

    Returns:
      So many devices, for meshes and shardings of the arguments of ``jax.jit(...).trace(...).lower(...).compile()``.

    Raises:
      ValueError: where that cannot be had here, with the reason.
    """
    if reason := unavailable(platform):
        raise ValueError(f'nothing can be compiled for a {platform.upper()} here: {reason}.')
    if platform == 'gpu':
        name, memory, bandwidth = _GPUS[gpu]
        specification = _SPECIFICATION.format(name=name, memory=memory, bandwidth=bandwidth)
        options = dict(target_config=specification, topology=f'1x1x{count}')
        return list(topologies.get_topology_desc('gpu', platform='cuda', **options).devices)
    most = next((name for size, name in _TPUS if size >= count), None)
    if most is None:
        raise ValueError(f'count={count} is more than the {_TPUS[-1][0]} TPUs of the largest topology.')
    _alone()
    return list(topologies.get_topology_desc(most, platform='tpu').devices)[:count]


def _alone() -> None:
    """libtpu looks for the machine's own TPUs, writes pages when there are none, waits for a server that would know, and keeps other
    processes from loading it; unless it is told."""
    variables = {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_WORKER_ID': '0',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
