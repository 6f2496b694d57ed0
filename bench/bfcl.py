"""Compare verdicts on function calls with the package `bfcl-eval`, over the data that it carries.

    pip install --no-deps bfcl-eval
    python bench/bfcl.py

Gold answers are made from the possible ones, wrong ones by changing a gold answer in one place:
another function, a value, a parameter too many or too few, a call too many or too few. One JSON
line: how many gold answers pass, how many wrong ones, and on how many both checkers agree. "Gold
impossible" counts questions whose possible answers contradict their function's description: the
package passes no answer to them.
"""

import copy
import json
import random
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax.evals import bfcl, bfcl_check, bfcl_turns

CATEGORIES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel"),
    *("parallel_multiple", "live_simple", "live_multiple", "live_parallel"),
    "live_parallel_multiple",
)
TURNS = ("base", "miss_func", "miss_param", "long_context")


def load_peer() -> Any:
    """The package's checker; its table of models, which imports every client, is left out."""
    import bfcl_eval

    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {  # type: ignore[attr-defined]
        "dots": types.SimpleNamespace(underscore_to_dot=False)
    }
    sys.modules.setdefault(models.__name__, models)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    languages = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}

    def check(functions: Any, calls: Any, expected: Any, category: str) -> bool:
        language = languages.get(category, Language.PYTHON)
        result = ast_checker(functions, calls, expected, language, category, "dots")
        return bool(result["valid"])

    return Path(bfcl_eval.__file__ or "").parent / "data", check


def to_source(value: Any, kind: str, item: str, language: str) -> str:
    """A value as Java or JavaScript writes it; texts of their own have no quotes."""
    if isinstance(value, list):
        parts = ", ".join(_quote(one, item, language) for one in value)
        if language == "javascript":
            return f"[{parts}]"
        if kind == "Array":  # items keep their quotes there
            return (
                f"new {item}[] {{{', '.join(to_source(one, item, '', 'java') for one in value)}}}"
            )
        return f"new ArrayList<{item}>(Arrays.asList({parts}))"
    if isinstance(value, dict):
        return _object_source(value, language)
    suffix = {"long": "L", "float": "f" if language == "java" else "", "Bigint": "n"}
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if isinstance(value, (bool, str)) else text + suffix.get(kind, "")


def _object_source(value: dict[str, Any], language: str) -> str:
    members = {key: _quote(one, "", language) for key, one in value.items()}
    if language == "javascript":
        return "{" + ", ".join(f"{key}: {one}" for key, one in members.items()) + "}"
    puts = " ".join(f'put("{key}", {one});' for key, one in members.items())
    return f"new HashMap<String, Object>() {{{{ {puts} }}}}"


def _quote(value: Any, kind: str, language: str) -> str:
    if isinstance(value, str) and (kind in ("String", "char", "") or language == "javascript"):
        return f'"{value}"'
    return to_source(value, kind, "", language)


def pick(choices: Any, described: dict[str, Any]) -> Any:
    """A right value from the possible ones: the first; of objects, each member's first."""
    value = next(one for one in choices if one != "")
    if isinstance(value, dict):
        members = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
        return {k: pick(v, {}) for k, v in members.items() if any(one != "" for one in v)}
    inner = described.get("items", {}).get("type")
    if isinstance(value, list) and inner == "dict":
        return [pick([item], {}) for item in value]
    return value


def make_gold(functions: Any, expected: Any, category: str) -> list[dict[str, Any]]:
    """Calls with every parameter that has a value."""
    calls = []
    language = category.removeprefix("simple_") if "java" in category else ""
    for wanted in expected:
        name, right = next(iter(wanted.items()))
        described = next(one for one in functions if one["name"] == name)
        known = described["parameters"]["properties"]
        values = {}
        for parameter, choices in right.items():
            if parameter not in known or not choices:
                continue
            if all(one == "" for one in choices):
                if parameter in described["parameters"]["required"]:
                    values[parameter] = ""
                continue
            value = pick(choices, known[parameter])
            if language:
                kind = known[parameter]["type"]
                item = known[parameter].get("items", {}).get("type", "")
                value = to_source(value, kind, item, language)
            values[parameter] = value
        calls.append({name: values})
    return calls


def mutate(
    gold: list[dict[str, Any]], expected: Any, rng: random.Random
) -> Iterator[list[dict[str, Any]]]:
    """Wrong answers that differ from the gold one in one place."""
    for change in (_rename, _add_parameter, _drop_all, _change_value):
        wrong, place = copy.deepcopy(gold), rng.randrange(len(gold))
        right = next(iter(expected[place].values()))
        if change is _drop_all and all("" in choices for choices in right.values()):
            continue
        change(wrong[place], rng)
        if wrong != gold:
            yield wrong
    yield [*gold, gold[0]]
    yield gold[:-1]


def _rename(call: dict[str, Any], _: random.Random) -> None:
    name = next(iter(call))
    call[f"{name}_other"] = call.pop(name)


def _add_parameter(call: dict[str, Any], _: random.Random) -> None:
    next(iter(call.values()))["no_such_parameter"] = 1


def _drop_all(call: dict[str, Any], _: random.Random) -> None:
    next(iter(call.values())).clear()


def _change_value(call: dict[str, Any], rng: random.Random) -> None:
    values = next(iter(call.values()))
    if values:
        values[rng.choice(sorted(values))] = rng.choice(
            ["zz no such value", -987654, 0.12345, ["zz"], {"zz": 1}]
        )


def is_right(functions: Any, calls: Any, expected: Any, category: str) -> bool:
    """Our verdict."""
    try:
        bfcl_check.check_calls(functions, calls, expected, category)
    except bfcl_check.Mismatch:
        return False
    return True


def compare(data: Path, check: Any, categories: tuple[str, ...] = CATEGORIES) -> Counter[str]:
    """Counts over single-turn categories."""
    count: Counter[str] = Counter()
    rng = random.Random(0)
    for category in categories:
        questions = bfcl.read_entries(data / f"BFCL_v4_{category}.json")
        answers = bfcl.read_entries(data / "possible_answer" / f"BFCL_v4_{category}.json")
        for question, answer in zip(questions, answers, strict=True):
            functions, expected = question["function"], answer["ground_truth"]
            gold = make_gold(functions, expected, category)
            for i, calls in enumerate((gold, *mutate(gold, expected, rng))):
                ours = is_right(functions, calls, expected, category)
                theirs = check(functions, calls, expected, category)
                kind = "wrong" if i else "gold"
                count[kind] += 1
                count[f"{kind} passed"] += ours
                count["gold impossible"] += not i and not theirs
                count["agree"] += ours == theirs
    return count


def compare_turns(data: Path, every: int = 1) -> Counter[str]:
    """Counts over conversations: gold ones, wrong ones, and others."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as peer

    count: Counter[str] = Counter()
    for category in TURNS:
        name = f"BFCL_v4_multi_turn_{category}.json"
        questions = bfcl.read_entries(data / name)[::every]
        answers = bfcl.read_entries(data / "possible_answer" / name)[::every]
        for question, answer in zip(questions, answers, strict=True):
            gold = [[turn] if turn else [] for turn in answer["ground_truth"]]
            for kind, turns in (("gold", gold), ("wrong", _drop(gold)), ("changed", _spoil(gold))):
                why = bfcl_turns.compare_turns(question, turns, answer["ground_truth"])
                theirs = peer.multi_turn_checker(
                    turns, answer["ground_truth"], question, "", f"model{count['turns']}"
                )
                count["turns"] += 1
                count[f"turns {kind}"] += 1
                count[f"turns {kind} passed"] += not why
                count["turns agree"] += (not why) == theirs["valid"]
    return count


def _drop(gold: list[list[list[str]]]) -> list[list[list[str]]]:
    """The conversation without the calls of its last turn that needs some."""
    last = max(i for i, turn in enumerate(gold) if turn)
    return [[] if i == last else turn for i, turn in enumerate(gold)]


def _spoil(gold: list[list[list[str]]]) -> list[list[list[str]]]:
    """The conversation without the first call of each turn."""
    return [[step[1:] for step in turn] for turn in gold]


def main() -> None:
    """Print one line."""
    data, check = load_peer()
    print(json.dumps({"bench": "bfcl", **compare(data, check), **compare_turns(data)}))


if __name__ == "__main__":
    main()
