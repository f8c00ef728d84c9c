from benchmarks.reliability.figures import main

if __name__ == '__main__':
    main()
