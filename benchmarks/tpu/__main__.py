from benchmarks.tpu.kernels import main

if __name__ == '__main__':
    main()
