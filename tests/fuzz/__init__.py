"""A fuzzer: random settings, calls, damaged workdirs and extreme shapes, each a program of a few lines."""
