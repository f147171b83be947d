"""The section `evaluation.greedy`: how long the compressed model writes what its source writes."""

from pydantic import Field

from p48ray.config.section import Section


class GreedyConfig(Section):
    """Greedy agreement: how many tokens the finished checkpoint follows its source, which continues
    held-out prompts greedily, before the first different one.

    The source is read whole once a pass, and as many passes as tokens may be needed.
    """

    prompts: int = Field(
        gt=0,
        le=10**6,
        description=(
            "[prompts] How many: the first of evaluation's sequences. At most"
            " evaluation.num_sequences."
        ),
    )
    prompt_tokens: int = Field(
        gt=0,
        le=2**24,
        description="[tokens] Length of a prompt, the beginning of a held-out sequence.",
    )
    tokens: int = Field(
        gt=0,
        le=2**24,
        description=(
            "[tokens] How many the source continues a prompt by. A part takes at most so many"
            " passes over the whole source. With prompt_tokens at most evaluation.sequence_length."
        ),
    )
    prompts_per_part: int = Field(
        64,
        gt=0,
        le=10**6,
        description=(
            "[prompts] Size of a part, which one worker takes through the models together. Every"
            " part reads the source anew in each pass: more of them only where workers would idle."
        ),
    )

    def check_fits(self, num_sequences: int, sequence_length: int) -> None:
        """Raises: ValueError for more prompts or tokens than the held-out sequences have."""
        if self.prompts > num_sequences:
            raise ValueError(
                f"greedy.prompts: expected at most num_sequences = {num_sequences:,}, found"
                f" {self.prompts:,}"
            )
        if self.prompt_tokens + self.tokens > sequence_length:
            raise ValueError(
                "greedy.prompt_tokens + greedy.tokens: expected at most sequence_length ="
                f" {sequence_length:,}, found {self.prompt_tokens:,} + {self.tokens:,}"
            )
