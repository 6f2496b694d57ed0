"""A small task over a small model, for tests; as a program it evaluates it into a folder.

`python guess_task.py FOLDER [ADDRESS COUNT NUMBER]`: the latter is one of several processes, which
have four devices each.
"""

import sys
from pathlib import Path

from small_model import SIZES

from k2jax import cluster
from k2jax.config import MeshConfig, ModelConfig
from k2jax.evals.scorer import Scorer
from k2jax.evals.session import Options, Outcome, evaluate_one
from k2jax.evals.task import (
    FAILED,
    PASSED,
    UNPARSED,
    Choose,
    Generate,
    Item,
    Roll,
    Task,
    TaskSettings,
    Verdict,
)
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.runtime import backend
from k2jax.text.kimi_tokenizer import Tokenizer

CFG = ModelConfig(**SIZES | {"context": 96, "init_std": 0.3})
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
ITEMS = 8
DEVICES = 4  # of a process, where there are several
IDENTITY = {"weights": "w", "tokenizer": "t", "dtype": "float32"}
STOPS = "aeiou"  # some answers end by one, and some by their length


def drawn(tokenizer: Tokenizer | None = BYTES) -> Model:
    return Model(CFG, initial(specs(Kimi(CFG)), seed=3, std=CFG.init_std), tokenizer)


class Guess(Task):
    """Texts that go on in one turn or two, choices and likelihoods."""

    name, digest = "guess", "0"
    settings = TaskSettings(
        samples=2, max_new_tokens=3, temperature=1.0, top_p=0.95, stop=tuple(STOPS)
    )

    def items(self):
        made = []
        for i in range(ITEMS):
            made.append(Item(f"go/{i}", Generate(f"question {i % 3}: {i}" + " and" * i)))
        context = "a context that choices share "
        made.append(Item("choose", Choose(context, ("one", "another", "a third")), 1))
        return [*made, Item("roll", Roll("text " * 40))]

    def follow_up(self, item, answers):
        if item.id.startswith("go") and item.id[-1] in "02" and len(answers) == 1:
            return Generate(f"{item.ask.prompt}{answers[0].text} so")
        return None

    def grade(self, item, answers):
        if not isinstance(item.ask, Generate):
            best = max(answers[-1].logprobs)
            return Verdict(float(best > -50), PASSED if best > -50 else FAILED, f"{best:.4f}")
        text = answers[-1].text
        if item.id == "go/3":
            raise ValueError("a grader that fails")
        if not text.isascii():
            return Verdict(0.0, UNPARSED, text, "no ASCII")
        is_right = len(text) % 3 == 1
        return Verdict(float(is_right), PASSED if is_right else FAILED, text)


def evaluate(out: Path, rows: int = 8, model: Model | None = None, **options) -> Outcome:
    scorer = Scorer(model or drawn(), rows)
    return evaluate_one(Guess(), scorer, IDENTITY, Options(out, **options))


def evaluate_in_group(out: Path, address: str, count: int, number: int) -> None:
    """Evaluate on a mesh of all processes: the first one asks, the others follow."""
    mesh = MeshConfig(replica=count, expert=DEVICES)
    backend.prepare(mesh.devices, count)
    place = cluster.find(address, count, number)
    with cluster.member(place, {}, mesh, lambda line: None) as group:
        import jax

        from k2jax import sharding

        with jax.set_mesh(sharding.make_mesh(mesh)):
            scorer = Scorer(drawn(), 8)
            if group.number:
                scorer.follow()
                return
            evaluate_one(Guess(), scorer, IDENTITY, Options(out))
            scorer.dismiss()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        evaluate(Path(sys.argv[1]))
    else:
        evaluate_in_group(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
