from benchmarks.layers.compare import main
from sparse_jax.launch import allocator

if __name__ == '__main__':
    allocator.keep_memory()
    main()
