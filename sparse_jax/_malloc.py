"""Options of glibc's malloc for training on CPU; the standard library only, as they are set before anything is imported.

Keep freed memory, in one heap, in large pages. By default each large array is mapped anew, and the system clears its pages when they are
first touched: a quarter of the time of a sparse step on CPU (docs/training_step.md).
"""

MALLOC = ':'.join(f'glibc.malloc.{name}' for name in ('mmap_max=0', 'trim_threshold=1000000000000', 'arena_max=1', 'hugetlb=1'))
