"""Whether function calls are the expected ones: the semantics of BFCL's AST checker.

An expected call has for each parameter a list of values that are right; "" in it means that the
parameter may be left out. Verdicts are those of the package `bfcl-eval`, its oddities included.
Source: [BFCL] "The Berkeley Function Calling Leaderboard", gorilla.cs.berkeley.edu.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k2jax.evals.bfcl_values import JAVA_TYPES, SCRIPT_TYPES, convert_java, convert_script

PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
NESTED = ("array", "tuple", "Array", "ArrayList")
IGNORED = re.compile(r"[ ,./\-_*^]")  # in texts that are compared
Calls = Sequence[Mapping[str, Mapping[str, Any]]]  # each {function: {parameter: value}}


class Mismatch(Exception):
    """Why a call is not the expected one."""


def check_calls(
    functions: Sequence[Mapping[str, Any]],
    calls: Calls,
    expected: Calls,
    category: str,
    *,
    underscored: bool = False,
) -> None:
    """Compare calls with the expected ones.

    Args:
        functions: descriptions as in the file of questions.
        calls: what the model called.
        expected: for each call, each parameter's right values.
        category: of the question: with "parallel" calls come in any order; with "multiple" there
            are several functions; "java" and "javascript" have values as source text.
        underscored: the model calls `a.b` as `a_b`, as the OpenAI API wants names.

    Raises:
        Mismatch: says what differs.
    """
    if "parallel" not in category and "multiple" not in category and len(calls) != 1:
        raise Mismatch(f"{len(calls)} calls, not 1")
    if len(calls) != len(expected):
        raise Mismatch(f"{len(calls)} calls, not {len(expected)}")
    language = category if "java" in category else "python"
    if "parallel" in category:
        _match_in_any_order(functions, calls, expected, language, underscored)
        return
    name = next(iter(expected[0]))
    described = _find(functions, name) if "multiple" in category else functions[0]
    check_call(described, calls[0], expected[0], language, underscored=underscored)


def _match_in_any_order(
    functions: Sequence[Mapping[str, Any]],
    calls: Calls,
    expected: Calls,
    language: str,
    underscored: bool,
) -> None:
    left = list(calls)
    for wanted in expected:
        described, why = _find(functions, next(iter(wanted))), []
        for call in left:
            try:
                check_call(described, call, wanted, language, underscored=underscored)
            except Mismatch as error:
                why.append(str(error))
            else:
                left.remove(call)
                break
        else:
            raise Mismatch(f"no call is the expected {next(iter(wanted))!r}: {'; '.join(why)}")


def _find(functions: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((one for one in functions if one["name"] == name), {})


def check_call(
    described: Mapping[str, Any],
    call: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Mapping[str, Any]],
    language: str = "python",
    *,
    underscored: bool = False,
) -> None:
    """Compare one call with the expected one.

    Args:
        described: the function.
        call: `{function: {parameter: value}}`.
        expected: `{function: {parameter: right values}}`.
        language: "python", or has "javascript" or "java" in it.
        underscored: as in `check_calls`.

    Raises:
        Mismatch: says what differs.
    """
    if not described:
        raise Mismatch(f"no function {next(iter(expected))!r} is described")
    right: Mapping[str, Any] = next(iter(expected.values()))
    name = described["name"].replace(".", "_") if underscored else described["name"]
    if name not in call:
        raise Mismatch(f"{next(iter(call), '')!r} was called, not {name!r}")
    values, known = call[name], described["parameters"]["properties"]
    for parameter in described["parameters"].get("required", ()):
        if parameter not in values:
            raise Mismatch(f"{parameter!r} is required and missing")
    for parameter, value in values.items():
        if parameter not in known or parameter not in right:
            raise Mismatch(f"{parameter!r} is not expected")
        _check_value(parameter, value, right[parameter], known[parameter], language)
    for parameter, choices in right.items():
        if parameter not in values and "" not in choices:
            raise Mismatch(f"{parameter!r} is missing")


def _check_value(
    parameter: str, value: Any, choices: Sequence[Any], described: Mapping[str, Any], language: str
) -> None:
    kind = described["type"]
    value, wanted, inner = _convert(parameter, value, described, language)
    if kind == "tuple" and isinstance(value, tuple):
        value = list(value)
    if language == "python" and kind == "float" and type(value) is int:
        value = float(value)
    is_variable = _check_type(parameter, value, choices, wanted, inner)
    check = None if is_variable else _find_comparison(wanted, inner)
    if check is not None:
        check(parameter, value, choices)
    elif value not in choices:
        raise Mismatch(f"{parameter!r} is {value!r}, not one of {list(choices)}")


def _convert(
    parameter: str, value: Any, described: Mapping[str, Any], language: str
) -> tuple[Any, type, type | None]:
    """A value as Python has it, the type that it should have, and the type of its items."""
    kind = described["type"]
    is_script, is_java = "javascript" in language, "java" in language
    types = SCRIPT_TYPES if is_script else JAVA_TYPES if is_java else PYTHON_TYPES
    if kind not in types:
        raise Mismatch(f"{parameter!r} has the type {kind!r}, which is unknown")
    item = described.get("items", {}).get("type") if kind in NESTED else None
    if kind in NESTED and item not in types:
        raise Mismatch(f"{parameter!r} has items of the type {item!r}, which is unknown")
    inner = types[item] if item is not None else None
    if not is_java:
        return value, types[kind], inner
    if not isinstance(value, str):
        raise Mismatch(f"{parameter!r} is {value!r}, not its source as a text")
    convert = convert_script if is_script else convert_java
    return convert(value, kind, item), types[kind], inner


def _check_type(
    parameter: str, value: Any, choices: Sequence[Any], wanted: type, inner: type | None
) -> bool:
    """Whether a value stands for a variable: the expected ones are of another type than described.

    Raises:
        Mismatch: it has neither the described type nor that of the expected values.
    """
    expected_type = next((type(one) for one in choices if one != ""), None)
    is_variable = expected_type is not None and expected_type is not wanted
    if type(value) is wanted:
        if inner is None or any(_do_items_fit(parameter, value, one, inner) for one in choices):
            return is_variable
        raise Mismatch(f"{parameter!r} is {value!r}; its items should be {inner.__name__}")
    if expected_type is not None and type(value) is expected_type:
        return True
    raise Mismatch(f"{parameter!r} is {value!r}, not of type {wanted.__name__}")


def _do_items_fit(parameter: str, value: Any, choice: Any, inner: type) -> bool:
    if type(choice) is not list:  # a parameter that may be left out: any items will do
        return True
    try:
        for item in value:
            _check_type(parameter, item, choice, inner, None)
    except Mismatch:
        return False
    return True


def _find_comparison(
    wanted: type, inner: type | None
) -> Callable[[str, Any, Sequence[Any]], None] | None:
    if wanted is list:
        return _compare_dicts if inner is dict else _compare_list
    if wanted is dict:
        return _compare_dict
    return _compare_text if wanted is str else None


def _simplify(value: Any) -> Any:
    """A text without case, blanks and most punctuation; other values as they are."""
    return IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _compare_text(parameter: str, value: str, choices: Sequence[Any]) -> None:
    if _simplify(value) not in [_simplify(one) for one in choices if type(one) is str]:
        raise Mismatch(f"{parameter!r} is {value!r}, not one of {list(choices)}")


def _compare_list(parameter: str, value: Sequence[Any], choices: Sequence[Any]) -> None:
    simple = [_simplify(item) for item in value]
    if simple not in [[_simplify(item) for item in one] for one in choices]:
        raise Mismatch(f"{parameter!r} is {value!r}, not one of {list(choices)}")


def _compare_dict(parameter: str, value: Mapping[str, Any], choices: Sequence[Any]) -> None:
    why = "no value is expected"
    for choice in choices:
        if choice == "":
            continue
        why = _describe_difference(value, choice)
        if not why:
            return
    raise Mismatch(f"{parameter!r}: {why}")


def _describe_difference(value: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    for key, part in value.items():
        if key not in choice:
            return f"the key {key!r} is not expected"
        if _simplify(part) not in [_simplify(one) for one in choice[key]]:
            return f"{key!r} is {part!r}, not one of {choice[key]}"
    missing = [key for key, parts in choice.items() if key not in value and "" not in parts]
    return f"the key {missing[0]!r} is missing" if missing else ""


def _compare_dicts(parameter: str, value: Sequence[Any], choices: Sequence[Any]) -> None:
    why = "no value is expected"
    for choice in choices:
        if len(value) != len(choice):
            why = why if choice == "" else f"{len(value)} items, not {len(choice)}"
            continue
        try:
            for item, wanted in zip(value, choice, strict=True):
                if not isinstance(item, Mapping):
                    raise Mismatch(f"{parameter!r} has the item {item!r}, not an object")
                _compare_dict(parameter, item, [wanted])
        except Mismatch as error:
            why = str(error)
        else:
            return
    raise Mismatch(f"{parameter!r}: {why}")
