"""MCP tool lists and OpenAPI files become tools with effects."""

import json

import pytest

from k2jax import cli
from k2jax.config import ConfigError
from k2jax.post.synthesis.imported import import_file
from k2jax.post.synthesis.pipeline import Settings, load_tasks, synthesise
from k2jax.post.synthesis.world import World

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


def schema(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


SEVERITY = {"type": "string", "enum": ["low", "high"]}
ISSUE = schema(["title", "severity"], title=TEXT, body=TEXT, severity=SEVERITY)
ONE = schema(["issue_id"], issue_id=TEXT)
MESSAGE = schema(["channel", "text"], channel=TEXT, text=TEXT)
MCP = {
    "tools": [
        {"name": "create_issue", "description": "Open an issue.", "inputSchema": ISSUE},
        {"name": "getIssue", "inputSchema": ONE},
        {"name": "list_issues", "inputSchema": schema(severity=TEXT, limit=WHOLE)},
        {"name": "search_issues", "inputSchema": schema(["query"], query=TEXT)},
        {"name": "update_issue", "inputSchema": schema(["issue_id"], issue_id=TEXT, body=TEXT)},
        {"name": "delete_issue", "inputSchema": ONE},
        {"name": "send_message", "inputSchema": MESSAGE},
    ]
}
PET = schema(["name"], name=TEXT, age=WHOLE, vaccinated={"type": "boolean"})
BODY = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Pet"}}}}
PET_ID = {"name": "petId", "in": "path", "required": True, "schema": WHOLE}
AGE = {"name": "age", "in": "query", "schema": WHOLE}
PETS = {
    "openapi": "3.0.0",
    "info": {"title": "Pets"},
    "components": {"schemas": {"Pet": PET}},
    "paths": {
        "/pets": {
            "get": {"operationId": "listPets", "parameters": [AGE]},
            "post": {"operationId": "createPet", "summary": "Take it in.", "requestBody": BODY},
        },
        "/pets/{petId}": {
            "parameters": [PET_ID],
            "get": {"operationId": "getPet"},
            "delete": {"operationId": "deletePet"},
        },
        "/pets/{petId}/feed": {"post": {"parameters": [PET_ID]}},
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specs")
    (folder / "tracker.json").write_text(json.dumps(MCP))
    (folder / "pets.json").write_text(json.dumps(PETS))
    return str(folder / "tracker.json"), str(folder / "pets.json")


def test_mcp_tools_act_on_records(files):
    domain, tools = import_file(files[0], set())
    assert {tool.name: tool.kind for tool in tools}["send_message"] == "record"
    world = World([domain], tools, "1")
    new = world.call("create_issue", {"title": "Leak", "severity": "high"})["tracker_issue"]
    assert world.call("getIssue", {"issue_id": new["id"]})["tracker_issue"]["title"] == "Leak"
    assert world.call("search_issues", {"query": "leak"})["matches"] == 1
    world.call("update_issue", {"issue_id": new["id"], "body": "in the roof"})
    assert world.state["tracker_issue"][new["id"]]["body"] == "in the roof"
    assert (
        world.call("create_issue", {"title": "x", "severity": "hgh"})["error"]["code"] == "invalid"
    )
    assert world.call("delete_issue", {"issue_id": new["id"]}) == {"deleted": new["id"]}
    before = world.digest()
    world.call("send_message", {"channel": "ops", "text": "hello"})
    assert world.digest() != before


def test_openapi_operations_act_on_records(files):
    domain, tools = import_file(files[1], {"getPet"})
    assert [tool.name for tool in tools] == [
        "listPets", "createPet", "pets_getPet", "deletePet", "post_pets_feed"
    ]  # fmt: skip
    world = World([domain], tools, "1")
    new = world.call("createPet", {"name": "Rex", "age": 3})["pets_pet"]
    assert isinstance(new["id"], int)
    assert world.call("pets_getPet", {"petId": new["id"]})["pets_pet"]["name"] == "Rex"
    assert world.call("createPet", {"age": 3})["error"]["message"] == "name is missing"
    assert world.call("pets_getPet", {"petId": "x"})["error"]["code"] == "invalid"


def test_tasks_are_made_of_imported_tools_too(files, tmp_path):
    synthesise(tmp_path / "out", Settings(tasks=27, specs=files), say=lambda line: None)
    agents, tasks = load_tasks(tmp_path / "out")
    domains = {name for task in tasks for name in agents[task["agent"]].domains}
    assert {"tracker", "pets"} <= domains


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("{", "is not JSON"),
        ("{}", "has neither 'paths' (OpenAPI) nor a list of 'tools' (MCP)"),
        ('{"tools": []}', "has neither"),
        ('{"tools": [{}]}', "tools[0] has no 'name'"),
        ('{"paths": {}}', "has no tools"),
        ('{"tools": [{"name": "a_b"}, {"name": "a_b"}]}', "has two tools with the name 'a_b'"),
    ],
)
def test_mistakes_are_one_line(content, mistake, tmp_path, capsys):
    file = tmp_path / "spec.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        import_file(str(file), set())
    assert mistake in str(error.value)
    assert cli.main(["synth", str(tmp_path / "out"), "--spec", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
