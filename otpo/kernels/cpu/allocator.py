"""Environment variables that let glibc's malloc keep memory for the next step."""

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""One arena of huge pages that is not given back: a step's large short-lived tensors otherwise cost more in page faults
than in arithmetic. One arena, because Ray runs the training loop in a thread. malloc reads them when a process begins.
"""
