from benchmarks.gpu.kernels import main

if __name__ == '__main__':
    main()
