"""What a task asks and how it grades: plain data, imported without jax.

A task has items. Each item asks for generated text, for a choice, or for the likelihood of a text;
the runner (`k2jax.evals.run_task`) has the model answer, and the task grades the answer. Everything
that a verdict depends on is in the item, the answer and the settings: grading twice says the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

PASSED, FAILED = "passed", "failed"
# A sample that was not answered or not graded; such ones are counted beside every score.
TRUNCATED, UNPARSED, TIMED_OUT, ERROR = "truncated", "unparsed", "timed out", "error"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Asks for text: the continuation of `prompt`, or the answer to `messages`.

    Attributes:
        prompt: a text to continue, as the start of a document ([BOS] goes before it).
        messages: a conversation as the OpenAI API has it; the model's chat template writes it.
        tools: that the conversation may call, as the OpenAI API has them.
    """

    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Choose:
    """Asks which continuation is the likeliest; the context is computed once for all of them."""

    context: str
    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Roll:
    """Asks how likely a text is, every token of it once, in windows of the model's context."""

    text: str


Ask = Generate | Choose | Roll


@dataclasses.dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        id: unique in its task.
        ask: what the model is asked.
        target: what the grader needs; the runner does not look at it.
    """

    id: str
    ask: Ask
    target: Any = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call: its function's name, and arguments as the model wrote them."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says to one `Ask`.

    Attributes:
        text: of `Generate`: what was generated up to the stop; of a chat without thought and calls.
        thought: of a chat: what the model thought before its answer.
        calls: of a chat: tool calls, in order.
        message: of a chat: the assistant's message, to go on with the conversation.
        is_truncated: it ran into `max_new_tokens` or the context before it ended.
        logprobs: of `Choose`: natural log-likelihood of each choice; of `Roll`: one, of the text.
        is_greedy: of `Choose`: for each choice, whether it is the likeliest continuation.
        tokens: new tokens, or scored ones.
    """

    text: str = ""
    thought: str = ""
    calls: tuple[Call, ...] = ()
    message: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_truncated: bool = False
    logprobs: tuple[float, ...] = ()
    is_greedy: tuple[bool, ...] = ()
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a grader says of a sample.

    Attributes:
        score: 1 right, 0 wrong, or a share.
        result: "passed", "failed", "unparsed", "timed out", "error", or a limit of the sandbox. The
            runner makes "truncated" of an answer that failed and was cut off.
        extracted: what the grader took from the answer.
        reason: one line, why the sample did not pass.
        numbers: further sums of the task's own, by name.
    """

    score: float
    result: str
    extracted: str = ""
    reason: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How answers are generated; without effect on `Choose` and `Roll`.

    Attributes:
        samples: of each item; their draws differ.
        max_new_tokens: of an answer, thought included.
        temperature: 0: greedy.
        top_p: draw from the fewest tokens that together have this probability.
        stop: texts that end an answer.
        pass_at: k of each pass@k that is reported, each at most `samples`.
        variables: of the chat template, as `thinking`.
    """

    samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    pass_at: tuple[int, ...] = (1,)
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task:
    """Questions of one kind and their grader; a subclass fills in `items` and `grade`.

    Attributes:
        name: for reports and the ledger.
        digest: SHA-256 of the data, and of whatever else verdicts depend on.
        settings: the task's own; the command's options replace single ones.
    """

    name: str
    digest: str
    settings: TaskSettings = TaskSettings()

    def items(self) -> Sequence[Item]:
        """All questions, in the order of the file.

        Raises:
            ConfigError: the data is missing or malformed; one line names the place.
        """
        raise NotImplementedError

    def follow_up(self, item: Item, answers: Sequence[Answer]) -> Generate | None:
        """What is asked next in a conversation of several turns; None: it is over.

        A function of its arguments alone: after a kill it is called again.

        Args:
            item: the question.
            answers: so far, at least one.
        """
        return None

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Judge a sample; called from several threads at once.

        Args:
            item: the question.
            answers: one, or one for each turn.
        """
        raise NotImplementedError

    def summarise(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """The task's own numbers beside those that every task has (accuracy, pass@k, intervals).

        Args:
            verdicts: of each item by its id, one for each sample.
        """
        return {}

    def write_files(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, str]:
        """Files that other programs take, as SWE-bench's predictions: content by name."""
        return {}
