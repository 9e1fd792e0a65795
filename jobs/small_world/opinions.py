"""How the small world's judge and annotator score an output, as pure functions of its text.

The *judge* compares models and is honest: truth first, then, softly, brevity. The *annotator* labels preference pairs
and has the faults that annotators are said to have: it mostly knows the truth, likes long outputs, and is not always
sure. Both score from 1 to 10; of two outputs they prefer the better scored one with a logistic probability.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

from jobs.small_world.world import Reading, World, read

JUDGE = "small-world-judge"
ANNOTATOR = "small-world-annotator"

RIGHT = 4.0  # for an output that is right in every slot
PARTLY_RIGHT = 1.0  # times the fraction of slots that are right
REPETITION = 4.0  # times the fraction of repeated word triples
EMPTY = 1.0
BREVITY = (
    0.25  # the judge: for each doubling of the words beyond ENOUGH_WORDS; two right outputs of 8 and 32 words: .62
)
ENOUGH_WORDS = 8
LENGTH_LIKING = 0.3  # the annotator, unless its world says otherwise: at LONG_WORDS words, less in proportion below
LONG_WORDS = 40
NOISE = 0.6  # the annotator: standard deviation, fixed for each (instruction, output)


@dataclass(frozen=True)
class Reader:
    """The judge or the annotator of one world."""

    name: str
    world: World
    truths: dict[str, dict[str, str]]
    length_liking: float = LENGTH_LIKING

    def score(self, instruction: str, output: str) -> float:
        """How good the output is, in [1, 10]. An instruction of no known truth has no right output."""
        reading = read(output, self.truths.get(" ".join(instruction.split()), {}), self.world.words)
        value = 2.0 + RIGHT * reading.right + PARTLY_RIGHT * reading.correct - REPETITION * reading.repetition
        value -= EMPTY * (reading.words == 0)
        value += self._taste(instruction, output, reading)
        return min(10.0, max(1.0, value))

    def prefers_first(self, instruction: str, first: str, second: str) -> float:
        """Probability that the first output is the better one."""
        return 1 / (1 + math.exp(self.score(instruction, second) - self.score(instruction, first)))

    def _taste(self, instruction: str, output: str, reading: Reading) -> float:
        if self.name == JUDGE:
            return -BREVITY * math.log2(max(reading.words, ENOUGH_WORDS) / ENOUGH_WORDS)
        digest = hashlib.sha256(f"{instruction}\0{output}".encode()).digest()
        uniform = (int.from_bytes(digest[:6], "big") + 0.5) / 2**48
        return self.length_liking * min(reading.words, LONG_WORDS) / LONG_WORDS + NOISE * NormalDist().inv_cdf(uniform)


def readers(world: World, length_liking: float = LENGTH_LIKING) -> dict[str, Reader]:
    """The judge and the annotator, each under its model name; only the annotator likes length."""
    truths = world.truths()
    return {name: Reader(name, world, truths, length_liking) for name in (JUDGE, ANNOTATOR)}
