"""Trains or evaluates an experiment, trains a grid of experiments, or reports on any number of runs.

    python launch.py --config=configs/mnist_lenet300.py:offline --workdir=runs/mnist_lenet300
    python launch.py --mode=sweep --config=configs/mnist_lenet300.py:offline --workdir=runs/sweep \\
        --sweep='sparsity.density=0.05,0.1;sparsity.method=sparse_momentum,rigl;seed=0,1,2' --sweep='sparsity.method=dense;seed=0,1,2'
    python launch.py --mode=report --workdir=runs
    python launch.py --workdir=runs/mnist_lenet300                                # goes on with the run that is there
    python launch.py --mode=export --workdir=runs/mnist_lenet300 --to=lenet.npz   # its network, as one file
    python launch.py --distributed --config=... --workdir=...   # on every host; finds SLURM, Open MPI, Kubernetes, TPU and xpk clusters

    python launch.py --config=... --lower_only=cuda   # or tpu: shows what the step compiles to there; runs nothing, needs no such device

    python launch.py --help            # modes, configs and flags
    python launch.py --list_settings   # every setting, with --config=... as that config has it

Any setting can be changed on the command line, for example --config.sparsity.density=0.1. Rerunning the same command resumes from the
last checkpoint; in a finished workdir it prints the result. Exit codes: 0 done; 2 wrong input (do not restart); 70 failed (restart);
75 stopped by SIGTERM or Ctrl-C after saving (restart); 78 failed and would fail again, as with a loss of NaN (do not restart).
"""

from sparse_jax import launch

if __name__ == '__main__':
    launch.run()
