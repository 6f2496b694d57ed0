"""BFCL's conversations of several turns: calls are carried out on simulated services.

The services are those of the user's own package `bfcl-eval`, loaded when they are first needed.
After each turn the services must be in the state that the expected calls leave, and the expected
calls' results must be among those of all calls so far. Source: [BFCL].
"""

import ast
import copy
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError

STATELESS = ("MathAPI",)
# Names of functions that must not be called, whatever they are.
BANNED = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")
SERVICES = "bfcl_eval.constants.executable_backend_config"
Call = str | tuple[str, Mapping[str, Any]]  # Python source, or a name and its arguments
Turns = Sequence[Sequence[Sequence[Call]]]  # turns of steps of calls


class Services:
    """The simulated services of one conversation, in their first state."""

    def __init__(self, question: Mapping[str, Any]):
        """Set them up.

        Args:
            question: with `id`, `involved_classes` and `initial_config`.

        Raises:
            ConfigError: `bfcl-eval` is not installed, or has no such service.
        """
        category = question["id"].rsplit("_", 1)[0]
        is_long = "long_context" in category or "composite" in category
        config = question.get("initial_config", {})
        self.instances: dict[str, Any] = {}
        self._methods: dict[str, Callable[..., Any]] = {}
        for name in question["involved_classes"]:
            service = _load_class(name)()
            if name not in STATELESS:
                scenario = copy.deepcopy(config.get(name, {}))
                service._load_scenario(scenario, long_context=is_long)
            self.instances[name] = service
            for method, bound in inspect.getmembers(service, predicate=inspect.ismethod):
                if not method.startswith("_"):
                    self._methods[method] = bound

    def execute(self, call: Call) -> str:
        """Carry out a call; its result, or what went wrong, as a text."""
        try:
            name, args, values = (
                _read_source(call) if isinstance(call, str) else (call[0], [], call[1])
            )
            if name in BANNED:
                raise ValueError(f"Function call {name} is not allowed.")
            if name not in self._methods:
                raise NameError(f"name {name!r} is not defined")
            return _to_text(self._methods[name](*args, **values))
        except Exception as error:  # a service may fail in any way; the model reads how
            return f"Error during execution: {error}"

    def differs_from(self, other: "Services") -> str:
        """The first public attribute in which services differ; "" if they do not."""
        for name, service in other.instances.items():
            for attribute, value in vars(service).items():
                if attribute.startswith("_"):
                    continue
                if getattr(self.instances[name], attribute) != value:
                    return f"{name}.{attribute}"
        return ""


def compare_turns(
    question: Mapping[str, Any], turns: Turns, expected: Sequence[Sequence[str]]
) -> str:
    """Say why a conversation is not the expected one; "" if it is.

    Args:
        question: from the file of questions.
        turns: for each turn, for each step of the model, its calls; steps without calls left out.
        expected: for each turn the expected calls.
    """
    if len(turns) != len(expected):
        return f"ended in turn {len(turns)} of {len(expected)}"
    ours, theirs = Services(question), Services(question)
    results: list[str] = []
    for number, (steps, wanted) in enumerate(zip(turns, expected, strict=True), start=1):
        results += [ours.execute(call) for step in steps for call in step]
        expected_results = [theirs.execute(call) for call in wanted]
        if not wanted:  # the model should find that it cannot help
            continue
        if len(steps) == 0 or (len(steps) == 1 and len(steps[0]) == 0):
            return f"no call in turn {number}"
        if place := ours.differs_from(theirs):
            return f"another state after turn {number}: {place}"
        if missing := _find_missing(expected_results, results):
            return f"turn {number} lacks the result {missing[:200]!r}"
    return ""


def _find_missing(wanted: Sequence[str], results: Sequence[str]) -> str:
    left = list(results)
    for one in wanted:
        if one not in left:
            return one or "(empty)"
        left.remove(one)
    return ""


def _to_text(result: Any) -> str:
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)
    return result if isinstance(result, str) else str(result)


def _read_source(source: str) -> tuple[str, list[Any], dict[str, Any]]:
    """A call in Python as name and values; nothing of it is run."""
    node = ast.parse(source, mode="eval").body
    if not isinstance(node, ast.Call):
        raise SyntaxError("it is not a call")
    values = {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg}
    return ast.unparse(node.func), [ast.literal_eval(one) for one in node.args], values


def _load_class(name: str) -> Any:
    modules = load_services().CLASS_FILE_PATH_MAPPING
    if name not in modules:
        raise ConfigError(f"bfcl-eval has no service {name!r}")
    try:
        return getattr(importlib.import_module(modules[name]), name)
    except ImportError as error:
        raise ConfigError(f"bfcl-eval's {name} needs another package: {error}") from None


def load_services() -> Any:
    """The package's table of services.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(SERVICES)
    except ImportError:
        raise ConfigError(
            "conversations of several turns are carried out by bfcl-eval, which is not installed:"
            " pip install --no-deps bfcl-eval"
        ) from None
