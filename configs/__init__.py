"""Settings of experiments, a file each: ``python launch.py --help`` lists them. Importable as ``sparse_jax.configs`` where that is installed."""
