"""Stochastic rounding that is the same on every device: counter-based Philox4x32-10, 8 random bits per element.

An element with the linear index i (row-major over the rows padded to whole blocks, blocked axis last) gets byte i % 16
of the 16 bytes that Philox makes from counter (i // 16, offset) and key seed. With r that byte and `frac` the distance
above the lower neighbour in units of the gap, the element rounds up when

    floor(512 * frac) + 2 * r + 1  >=  512

so exact values stay, only the two neighbours occur, and the mean error over all `frac` is zero; for one given `frac`
it is at most 2**-9 of the gap.
"""

from __future__ import annotations

import torch

from microscale.errors import InputError

Seed = torch.Tensor  # int64 [2]: seed, offset
_MASK = 0xFFFFFFFF


def seed_from(generator: torch.Generator | int | tuple[int, int] | torch.Tensor | None, device: torch.device) -> Seed:
    """Return the (seed, offset) pair as an int64 tensor of shape [2] on `device`.

    A `torch.Generator` is advanced by one draw; an int is a seed with offset 0; a pair is used as it is. Raises
    InputError for None: stochastic rounding without a seed would not be reproducible.
    """
    if isinstance(generator, torch.Tensor):
        return generator
    if isinstance(generator, torch.Generator):
        seed = torch.randint(0, 2**62, (), generator=generator, device=generator.device).to(device)
        return torch.stack([seed, torch.zeros_like(seed)])
    if isinstance(generator, int):
        generator = (generator, 0)
    if generator is None:
        raise InputError("stochastic rounding needs a seed", "pass generator=torch.Generator(...) or generator=<int>")
    return torch.tensor(generator, dtype=torch.int64, device=device)


def random_bytes(count: int, start: int, seed: Seed) -> torch.Tensor:
    """Return int32 [count] random values 0..255 for the linear element indices start .. start+count."""
    first, last = start // 16, (start + count + 15) // 16
    index = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    words = torch.stack(philox((index & _MASK, index >> 32), seed), dim=-1)  # [n, 4] uint32 in int64
    shifts = torch.arange(0, 32, 8, dtype=torch.int64, device=seed.device)
    octets = (words[:, :, None] >> shifts) & 0xFF
    return octets.reshape(-1)[start - first * 16 :][:count].to(torch.int32)


def philox(counter: tuple[torch.Tensor, torch.Tensor], seed: Seed, rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011), counter (c0, c1, offset low, offset high), key seed; uint32 values in int64."""
    c0, c1 = counter
    c2, c3 = (seed[1] & _MASK).expand_as(c0), ((seed[1] >> 32) & _MASK).expand_as(c0)
    k0, k1 = seed[0] & _MASK, (seed[0] >> 32) & _MASK
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the 64-bit products wrap; both halves are still right
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def rounds_up(frac: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Return the stochastic decision (bool) for FP32 `frac` in [0, 1) and random bytes; see the module's formula."""
    return (frac * 512).to(torch.int32) + 2 * random + 1 >= 512
