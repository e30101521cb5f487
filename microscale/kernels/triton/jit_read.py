"""Reading memory and nothing else."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def read_words(words, out, each, AT_ONCE: tl.constexpr, SIZE: tl.constexpr):
    """Read `each` int32 in a program, AT_ONCE blocks of SIZE at a time; out keeps the compiler from leaving it out."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    found = tl.zeros((SIZE,), tl.int32)
    for i in range(0, each, SIZE * AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            found ^= tl.load(words + program * each + i + j * SIZE + lane, eviction_policy="evict_first")
    tl.store(out + program * SIZE + lane, found, mask=found == 1)
