"""Worlds, tools and what calls do to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2jax.config import ConfigError
from k2jax.post.synthesis.toolset import compose_tools
from k2jax.post.synthesis.world import World, find_changes
from k2jax.post.synthesis.world_file import load_domains, parse_domain
from k2jax.text.messages import check_tools
from k2jax.text.typescript import declare_tools, sort_keys

SHOP = """
world shop | a shop | Test Shop | clerk
entity buyer | buyers | who buys | by name
  name~    person
  purse    money 10..90 =
  * adjust purse: fill_purse, empty_purse; needs cashier
  * transfer purse: give_money; confirm
entity order | orders | a purchase | by item
  item~!   {Lamp; Rug; Pan; Pot; Cup; Jug; Mat; Bowl; Tray}
  buyer_id! -> buyer
  price    money 5..5
  day      date 1..9
  size     small/large
  box?     (width int 1..5, tags list a/b)
  status   open/paid/cancelled
  * clash buyer_id, day
  * pay: open -> paid; price from buyer_id.purse
  * cancel: open, paid -> cancelled; confirm
  * tags
  * notes
"""


@pytest.fixture
def world():
    domain = parse_domain(SHOP)
    return World([domain], compose_tools(domain), "7")


def first(world, entity, **fields):
    return next(
        one
        for one in world.state[entity].values()
        if all(one[name] == value for name, value in fields.items())
    )


def code(result):
    return result["error"]["code"]


def test_there_are_a_thousand_tools_over_twenty_domains_with_names_of_their_own():
    domains = load_domains()
    tools = [tool for domain in domains for tool in compose_tools(domain)]
    assert len(domains) >= 20
    assert len({tool.name for tool in tools}) == len(tools) >= 1_000
    assert len({json.dumps(tool.parameters) for tool in tools}) >= 900


def test_every_tool_is_one_that_models_are_shown():
    jsonschema = pytest.importorskip("jsonschema")
    for domain in load_domains():
        declared = [tool.declare() for tool in compose_tools(domain)]
        assert check_tools(declared) == declared
        assert declare_tools(sort_keys(declared))
        for tool in declared[::5]:
            jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])
            assert tool["function"]["description"].endswith(".")


def test_calls_have_effects_and_errors_of_every_kind(world):
    order, digest = first(world, "order", status="open"), world.digest()
    assert code(world.call("get_order", {"order_id": "ORD-0"})) == "not_found"
    assert code(world.call("get_order", {})) == "invalid"
    assert code(world.call("get_order", "{")) == "invalid"
    assert code(world.call("list_orders", {"size": "larg"})) == "invalid"
    assert code(world.call("fly", {})) == "unknown_tool"
    assert code(world.call("cancel_order", {"order_id": order["id"]})) == "confirmation_needed"
    buyer = world.state["buyer"][order["buyer_id"]]
    assert code(world.call("fill_purse", {"buyer_id": buyer["id"], "amount": 1})) == "permission"
    assert world.digest() == digest
    before, purse = world.snapshot(), buyer["purse"]
    assert world.call("pay_order", {"order_id": order["id"]})["order"]["status"] == "paid"
    assert find_changes(before, world.state) == [
        ["buyer", buyer["id"], "purse", round(purse - 5, 2)],
        ["order", order["id"], "status", "paid"],
    ]
    assert code(world.call("pay_order", {"order_id": order["id"]})) == "conflict"


def test_money_cannot_be_spent_twice(world):
    source, target = list(world.state["buyer"].values())[:2]
    ends = {"from_buyer_id": source["id"], "to_buyer_id": target["id"], "confirmed": True}
    assert "error" not in world.call("give_money", {**ends, "amount": source["purse"]})
    assert source["purse"] == 0
    assert code(world.call("give_money", {**ends, "amount": 1})) == "insufficient"
    order = first(world, "order", status="open")
    order["buyer_id"] = source["id"]
    assert code(world.call("pay_order", {"order_id": order["id"]})) == "insufficient"


def test_places_names_and_references_are_guarded(world):
    order = first(world, "order", status="open")
    wish = {"item": "Sofa", "price": 5, "size": "small", "day": order["day"]}
    wish["buyer_id"] = order["buyer_id"]
    assert code(world.call("create_order", wish)) == "conflict"
    assert code(
        world.call("create_order", {**wish, "day": "2031-01-01", "item": order["item"]})
    ) == ("conflict")
    assert code(world.call("create_order", {**wish, "buyer_id": "BUY-1"})) == "not_found"
    assert code(world.call("delete_buyer", {"buyer_id": order["buyer_id"]})) == "conflict"
    new = world.call("create_order", {**wish, "day": "2031-01-01"})["order"]
    assert new["status"] == "open"
    assert new["tags"] == []


def test_faults_depend_on_the_seed_and_the_number_of_the_call():
    domain = parse_domain(SHOP)
    worlds = [World([domain], compose_tools(domain), "7", faults=0.3) for _ in range(2)]
    codes = [
        [world.call("count_orders", {}).get("error", {}).get("code") for _ in range(200)]
        for world in worlds
    ]
    assert codes[0] == codes[1]
    assert 30 <= codes[0].count("unavailable") <= 90


def test_a_world_is_the_same_whatever_the_hash_seed():
    program = (
        "from k2jax.post.synthesis.world_file import load_domains\n"
        "from k2jax.post.synthesis.toolset import compose_tools\n"
        "from k2jax.post.synthesis.world import World\n"
        "print([World([d], compose_tools(d), '3').digest() for d in load_domains()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_line_without_meaning_is_named():
    with pytest.raises(ConfigError, match="entity order has a line without meaning: price maney"):
        parse_domain(SHOP.replace("money 5..5", "maney 5..5").replace("    maney", " maney"))
    with pytest.raises(ConfigError, match="has no line 'world NAME"):
        parse_domain("")


def test_every_reference_and_effect_of_the_worlds_is_to_something():
    for domain in load_domains():
        before = set()
        for entity in domain.entities:
            for field in entity.fields:
                assert field.kind != "ref" or field.target in before, (domain.name, field.name)
            for operation in (*entity.operations, entity.created):
                for effect in operation.effects:
                    target = entity.field(effect.ref).target
                    other = next(one for one in domain.entities if one.name == target)
                    assert other.field(effect.field).kind in ("int", "money")
            assert entity.has(entity.key)
            before.add(entity.name)


WORLDS = Path(__file__).parents[2] / "k2jax/post/synthesis/worlds"


def test_all_worlds_are_read():
    assert len(load_domains()) == len(list(WORLDS.glob("*.world")))
