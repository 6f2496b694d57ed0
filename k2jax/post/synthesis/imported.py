"""Tools of MCP servers and OpenAPI files, as a world of their own.

What a tool means is read off its name (`get_`, `list_`, `search_`, `create_`, `update_`, `delete_`
and their like) or its method and path; its records have the fields of its arguments. A tool of any
other name stores its call as a record, so that it has an effect that can be seen.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.config import ConfigError, one_line
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world_file import Domain, Entity, Field, Operation

VERBS = {
    "get": "get read fetch describe show retrieve view lookup",
    "list": "list",
    "search": "search find query",
    "create": "create add new open make insert register book post schedule",
    "update": "update edit set modify rename patch change",
    "delete": "delete remove destroy",
}
KIND = {verb: kind for kind, verbs in VERBS.items() for verb in verbs.split()}
METHODS = ("get", "post", "put", "patch", "delete")
NAMES = ("Alpha", "Bravo", "Cobra", "Delta", "Eagle", "Falcon", "Gecko", "Heron", "Iris", "Jaguar")
POOLS = ("email", "phone", "city", "country", "street", "postcode", "company")
DEPTH = 6  # of references and objects that are followed
LONGEST = 64  # characters of a tool's name


class _Spec(NamedTuple):
    """A tool as a file declares it."""

    name: str
    text: str
    parameters: dict[str, Any]
    kind: str
    resource: str
    id_name: str


def import_file(path: str, taken: set[str]) -> tuple[Domain, list[Tool]]:
    """Make a world of an MCP tool list (`tools` with `inputSchema`) or an OpenAPI file.

    Args:
        path: of a JSON file; YAML where the package `yaml` is installed.
        taken: names of other tools; a tool of such a name gets the file's name in front.

    Raises:
        ConfigError: the file is neither, or has no tool.
    """
    content = _parse(Path(path))
    name = re.sub(r"\W+", "_", Path(path).name.split(".")[0]).strip("_") or "imported"
    if isinstance(content, Mapping) and isinstance(content.get("paths"), Mapping):
        specs, origin = list(_read_openapi(content)), "openapi"
        text = str(_member(content, "info", "title") or "an imported service")
    else:
        specs, origin, text = list(_read_mcp(content, path)), "mcp", "an imported tool server"
    if not specs:
        raise ConfigError(f"{path} has no tools")
    names = [spec.name for spec in specs]
    if twice := next((one for one in names if names.count(one) > 1), ""):
        raise ConfigError(f"{path} has two tools with the name {twice!r}")
    entities = {spec.resource: _make_entity(name, spec.resource, specs) for spec in specs}
    domain = Domain(
        name, text, name.replace("_", " "), "assistant", tuple(entities.values()), origin
    )
    tools = []
    for spec in specs:
        entity = entities[spec.resource]
        label = spec.name if spec.name not in taken else f"{name}_{spec.name}"[:LONGEST]
        taken.add(label)
        tools.append(
            Tool(
                label, spec.text, spec.parameters, name, entity.name, spec.kind,
                operation=Operation(spec.kind), id_name=spec.id_name,
            )
        )  # fmt: skip
    return domain, tools


def _parse(path: Path) -> Any:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{path} is not JSON: {one_line(error)}") from None
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path} is YAML: pip install pyyaml, or convert it to JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None


def _member(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _read_mcp(content: Any, path: str) -> Iterator[_Spec]:
    tools = _member(content, "result", "tools") or _member(content, "tools") or content
    if not isinstance(tools, list):
        raise ConfigError(f"{path} has neither 'paths' (OpenAPI) nor a list of 'tools' (MCP)")
    for number, tool in enumerate(tools):
        name = _member(tool, "name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{path}: tools[{number}] has no 'name'")
        schema = _clean(_resolve(tool.get("inputSchema") or tool.get("input_schema") or {}, tool))
        words = _words(name)
        kind = KIND.get(words[0], "record") if len(words) > 1 else "record"
        resource = _singular("_".join(words[1:] if kind != "record" else words))
        yield _finish(name, str(tool.get("description") or name), schema, kind, resource)


def _read_openapi(content: Mapping[str, Any]) -> Iterator[_Spec]:
    for route, item in content["paths"].items():
        for method in METHODS:
            operation = _member(item, method)
            if not isinstance(operation, Mapping):
                continue
            steps = [step for step in route.split("/") if step]
            nouns = [step for step in steps if not step.startswith("{")] or ["root"]
            kind = _kind_of(method, steps)
            resource = _singular("_".join(_words(nouns[-1])))
            schema = _openapi_schema(content, item, operation)
            name = str(operation.get("operationId") or f"{method}_{'_'.join(nouns)}")
            text = str(operation.get("summary") or operation.get("description") or name)
            yield _finish(name, text, schema, kind, resource)


def _kind_of(method: str, steps: Sequence[str]) -> str:
    """What a method on a path does to the path's last noun."""
    on_item = bool(steps) and steps[-1].startswith("{")
    if method == "get":
        return "get" if on_item else "list"
    if on_item:
        return {"delete": "delete", "post": "record"}.get(method, "update")
    is_action = any(step.startswith("{") for step in steps[:-1])
    return "create" if method == "post" and not is_action else "record"


def _openapi_schema(content: Any, item: Any, operation: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    listed = [*(item.get("parameters") or ()), *(operation.get("parameters") or ())]
    for parameter in _resolve(listed, content):
        if parameter.get("in") in ("path", "query") and isinstance(parameter.get("name"), str):
            schema = {**(parameter.get("schema") or {"type": parameter.get("type", "string")})}
            if parameter.get("description"):
                schema["description"] = parameter["description"]
            properties[parameter["name"]] = schema
            required += [parameter["name"]] * bool(parameter.get("required"))
    body = _resolve(operation.get("requestBody") or {}, content)
    media: Any = next(iter((body.get("content") or {}).values()), {})
    schema = _member(media, "schema") or {}
    properties |= schema.get("properties") or {}
    required += [name for name in schema.get("required") or () if name in properties]
    return _clean({"properties": properties, "required": list(dict.fromkeys(required))})


def _resolve(value: Any, root: Any, depth: int = DEPTH) -> Any:
    """The value with references within its file in place, so far down as is of use."""
    if isinstance(value, list):
        return [_resolve(item, root, depth) for item in value]
    if not isinstance(value, Mapping):
        return value
    reference = value.get("$ref")
    if isinstance(reference, str):
        if depth <= 0 or not reference.startswith("#/"):
            return {}
        return _resolve(_member(root, *reference[2:].split("/")) or {}, root, depth - 1)
    return {key: _resolve(item, root, depth) for key, item in value.items()}


def _clean(schema: Any) -> dict[str, Any]:
    """A schema of arguments: an object with properties."""
    schema = schema if isinstance(schema, Mapping) else {}
    properties = schema.get("properties")
    out: dict[str, Any] = {
        "type": "object",
        "properties": dict(properties) if isinstance(properties, Mapping) else {},
    }
    required = [name for name in schema.get("required") or () if name in out["properties"]]
    return {**out, "required": required} if required else out


def _finish(name: str, text: str, schema: dict[str, Any], kind: str, resource: str) -> _Spec:
    """Make a tool; one that acts on a record needs an argument that names it."""
    id_name = ""
    if kind in ("get", "update", "delete"):
        id_name = _find_id(schema, resource)
        if not id_name:
            kind = "list" if kind == "get" else "record"
    clean = re.sub(r"[^\w-]+", "_", name)[:LONGEST]
    return _Spec(clean, text, schema, kind, resource or "item", id_name)


def _find_id(schema: Mapping[str, Any], resource: str) -> str:
    names = list(schema["properties"])
    joined = resource.replace("_", "")
    for name in names:
        if name.replace("_", "").casefold() in ("id", f"{joined}id", joined, f"{joined}name"):
            return name
    ids = [name for name in names if re.search(r"(_id|Id|ID|_key|_number)$", name)]
    return next(iter([*ids, *schema.get("required", ())]), "")


def _words(name: str) -> list[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+|_+", spaced.lower()) if word] or ["tool"]


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us")) else word


def _make_entity(domain: str, resource: str, specs: Sequence[_Spec]) -> Entity:
    """The records of a resource: a field for each argument of its tools."""
    fields: dict[str, Field] = {}
    numbered = False
    for spec in [one for one in specs if one.resource == resource]:
        properties = spec.parameters["properties"]
        numbered |= _member(properties, spec.id_name, "type") == "integer"
        if spec.kind not in ("create", "update", "record"):
            continue
        required = spec.parameters.get("required", ())
        for name, schema in properties.items():
            if name not in (spec.id_name, "id") and name not in fields:
                field = _make_field(name, schema, name not in required)
                fields |= {name: field} if field else {}
    key = next((n for n, f in fields.items() if f.kind in ("word", "pick")), "")
    if not key:
        key = "name"
        fields[key] = Field(key, "pick", "its name", initial=True, choices=NAMES)
    name = f"{domain}_{resource}"
    text = resource.replace("_", " ")
    return Entity(name, f"{resource}_list", text, key, tuple(fields.values()), numbered=numbered)


def _make_field(name: str, schema: Any, optional: bool) -> Field | None:
    """A field with values that fit a schema; None: of no kind that is drawn."""
    text = str(_member(schema, "description") or name.replace("_", " "))
    more: dict[str, Any] = {"text": text, "optional": optional}
    choices = _member(schema, "enum")
    kind = _member(schema, "type")
    if isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
        return Field(name, "enum", choices=tuple(choices), **more)
    if kind in ("integer", "number"):
        low = _member(schema, "minimum")
        low = int(low) if isinstance(low, int | float) else 1
        return Field(name, "int" if kind == "integer" else "money", low=low, high=low + 90, **more)
    if kind in ("boolean", "array"):
        return Field(name, "bool" if kind == "boolean" else "texts", **more)
    return _make_text_field(name, schema, more) if kind in ("string", None) else None


def _make_text_field(name: str, schema: Any, more: dict[str, Any]) -> Field:
    plain = name.lower()
    if "date" in plain or _member(schema, "format") == "date":
        return Field(name, "date", high=60, **more)
    pool = next((pool for pool in POOLS if pool in plain), "")
    if pool or "person" in plain or "author" in plain:
        return Field(name, "word", target=pool or "person", **more)
    if "name" in plain or "title" in plain:
        return Field(name, "pick", choices=NAMES, **more)
    return Field(name, "word", target="remark", **more)
