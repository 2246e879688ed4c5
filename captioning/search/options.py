"""Settings of beam search and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from captioning.errors import UserError
from captioning.runtime.settings import check, check_min, non_default

Choice = Literal["log-probability", "consensus", "probability"]
CHOICES: tuple[str, ...] = get_args(Choice)


@dataclass(frozen=True)
class SearchOptions:
    """Options of beam search and of sampling. The comment of a field is its help on the command line.

    Raises UserError for a value out of range, and for options that contradict one another.
    """

    beam_size: int = 5  # hypotheses per photo; 1 is greedy decoding
    max_length: int = 30  # longest caption, in words; one that has not ended by then is marked as unfinished
    min_length: int = 0  # shortest caption, in words
    length_penalty: float = 0.0  # rank by log-probability / length^this: 0 is the sum, 1 the mean; more prefers longer
    no_repeat_ngram: int = 0  # no n-gram of this many words occurs twice in a caption; 0 is off
    allow_unknown: bool = False  # allow <unk> in captions
    num_captions: int = 1  # captions per photo, all different
    beam_groups: int = 1  # diverse beam search: groups of the beam; each returns an equal number of the captions
    diversity_penalty: float = 0.5  # with --beam-groups: log-probability lost per earlier group that chose the word
    temperature: float = 0.0  # sample instead of searching: 1 samples the model's distribution, less sharpens it
    top_p: float = 1.0  # with --temperature: sample from the fewest most likely words with this total probability
    # of the captions found, show the one with the highest log-probability; with the highest CIDEr-D to be expected of
    # it, given all (consensus); or with the highest calibrated probability. The last two need a calibrated run
    choose: Choice = "log-probability"
    samples: int = 0  # captions sampled per photo, among which to choose too; with a calibrated run

    def __post_init__(self) -> None:
        check_min(self, 1, "beam_size", "max_length", "num_captions", "beam_groups")
        check_min(self, 0, "min_length", "length_penalty", "no_repeat_ngram", "diversity_penalty", "temperature")
        check_min(self, 0, "samples")
        check(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0 and at most 1")
        if self.min_length > self.max_length:
            raise UserError(f"--min-length {self.min_length}: must be at most --max-length, now {self.max_length}")
        if self.beam_size % self.beam_groups or self.num_captions % self.beam_groups:
            raise UserError(
                f"--beam-groups {self.beam_groups}: must divide --beam-size, now {self.beam_size}, and --num-captions, "
                f"now {self.num_captions}"
            )
        if self.temperature:
            self._check_sampling()
        else:
            self._check_beam_search()

    def _check_sampling(self) -> None:
        beam_only = ("min_length", "length_penalty", "no_repeat_ngram", "beam_groups", "choose", "samples")
        flags = non_default(self, *beam_only)
        if flags:
            raise UserError(f"{flags[0]}: applies to beam search only; leave out this or --temperature")

    def _check_beam_search(self) -> None:
        if self.top_p < 1:
            raise UserError("--top-p: applies to sampling only; give --temperature too, or leave it out")
        if self.num_captions > self.beam_size:
            raise UserError(f"--num-captions {self.num_captions}: must be at most --beam-size, now {self.beam_size}")
