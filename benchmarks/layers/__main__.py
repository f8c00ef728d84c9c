import launch
from benchmarks.layers.compare import main

if __name__ == '__main__':
    launch.keep_memory()
    main()
