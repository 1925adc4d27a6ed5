"""Numpy's random numbers without numpy: an exported script has a run's order of data from them.

Sources: O'Neill, pcg-random.org (PCG64); Lemire, arXiv 1805.10941 (integers below a number).
"""


def seed_words(numbers: tuple[int, ...], count: int) -> list[int]:
    """Return numpy's SeedSequence(numbers).generate_state(count), uint32, of integers >= 0."""
    low, constant, entropy = 2**32 - 1, 0x43B0D7E5, []
    for number in numbers:
        entropy += [number >> shift & low for shift in range(0, max(1, number.bit_length()), 32)]

    def hashed(value: int, multiplier: int) -> int:
        nonlocal constant
        value, constant = value ^ constant, constant * multiplier & low
        value = value * constant & low
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = 0xCA01F9DD * x - 0x4973F715 * y & low
        return value ^ value >> 16

    pool = [hashed(word, 0x931E8875) for word in (entropy + [0] * 4)[:4]]
    for i in range(4):
        for j in range(4):
            if i != j:
                pool[j] = mixed(pool[j], hashed(pool[i], 0x931E8875))
    for word in entropy[4:]:
        pool = [mixed(p, hashed(word, 0x931E8875)) for p in pool]
    constant = 0x8B51F9DD
    return [hashed(pool[i % 4], 0x58F38DED) for i in range(count)]


class Random:
    """Draw as numpy's default_rng(numbers) does."""

    def __init__(self, *numbers: int) -> None:
        state, self.increment, self.half = 0, 0, None
        for word in seed_words(numbers, 8)[::-1]:
            state = state << 32 | word
        # The least significant 64 bits come first.
        a, b, c, d = (state >> 64 * i & 2**64 - 1 for i in range(4))
        self.increment = (c << 64 | d) << 1 & 2**128 - 1 | 1
        self.state = (a << 64 | b) + self.increment
        self._step()

    def _step(self) -> None:
        self.state = (self.state * 0x2360ED051FC65DA44385DF649FCCF645 + self.increment) & 2**128 - 1

    def _bits(self) -> int:
        """Return 32 of them: each state has 64, the lower half first."""
        if self.half is not None:
            bits, self.half = self.half, None
            return bits
        self._step()
        word, turn = (self.state >> 64 ^ self.state) & 2**64 - 1, self.state >> 122
        word = (word >> turn | word << 64 - turn) & 2**64 - 1
        self.half = word >> 32
        return word & 2**32 - 1

    def below(self, n: int) -> int:
        """Return one of 0 … n − 1, n <= 2³²."""
        if n == 1:
            return 0
        product = self._bits() * n
        if product & 2**32 - 1 < n:
            while product & 2**32 - 1 < (2**32 - n) % n:
                product = self._bits() * n
        return product >> 32

    def permutation(self, n: int) -> list[int]:
        """Return 0 … n − 1 shuffled as by Fisher and Yates, places drawn by rejection."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            mask = (1 << i.bit_length()) - 1
            while (j := self._bits() & mask) > i:
                pass
            order[i], order[j] = order[j], order[i]
        return order
