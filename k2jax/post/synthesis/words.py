"""Values that records and people have: names, places, days, drawn by a seeded generator."""

import datetime
import random

DAY_ZERO = datetime.date(2026, 1, 5)

FIRST = (
    "Amara Bruno Chiara Dmitri Elif Farah Gustav Hana Ines Jamal Katarina Liam Mei Noor Oscar"
    " Priya Quentin Rosa Sven Tariq Uma Victor Wanda Ximena Yusuf Zofia Aiko Benedikt Carmen Diego"
    " Esther Felix Greta Hugo Isla Jonas Keiko Leila Marco Nadia"
).split()
LAST = (
    "Abara Bergman Castillo Dubois Eriksen Fontaine Gupta Haddad Ito Jansen Kowalski Lindqvist"
    " Moreau Nakamura Okafor Petrov Quispe Rossi Schneider Tanaka Ueda Vargas Weber Yilmaz Zhang"
    " Andersen Bianchi Chen Demir Engel Ferrari Garcia Hoffman Ivanova Johansson Keller Lopez"
).split()
POOLS = {
    "city": (
        "Lisbon Hamburg Kyoto Austin Toronto Lyon Gdansk Porto Osaka Denver Leeds Bergen Turin"
        " Valencia Graz Utrecht"
    ).split(),
    "country": "Portugal Germany Japan Canada France Poland Norway Italy Spain Austria".split(),
    "street": [
        f"{number} {name}"
        for name in ("Mill Road", "Harbour Street", "Linden Avenue", "Station Lane", "Park Row")
        for number in (4, 12, 27, 58, 93)
    ],
    "postcode": ["10115", "20457", "30161", "40213", "50667", "60311", "70173", "80331", "90402"],
    "company": [
        f"{name} {form}"
        for name in ("Alder", "Bluewater", "Corvid", "Delphi", "Everhart", "Fennel", "Granite")
        for form in ("Supply", "Partners", "Works")
    ],
    "remark": [
        "please call before arrival",
        "leave it with the neighbour",
        "needs a quiet place",
        "allergic to nuts",
        "prefers mornings",
        "bring the signed form",
        "handle with care",
        "use the side entrance",
        "second reminder",
        "discussed on the phone",
    ],
    "tag": ["urgent", "follow-up", "vip", "seasonal", "review", "archived", "priority", "on-hold"],
}
TIMES = [f"{hour:02d}:{minute:02d}" for hour in range(8, 19) for minute in (0, 30)]
PLACED = ("person", "email", "phone", *POOLS)  # kinds of text that a field can name


def draw_word(kind: str, rng: random.Random) -> str:
    """Draw a text of one of `PLACED`."""
    if kind == "person":
        return f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    if kind == "email":
        name = f"{rng.choice(FIRST)}.{rng.choice(LAST)}".lower()
        return f"{name}{rng.randrange(10, 99)}@example.com"
    if kind == "phone":
        return f"+1-555-{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}"
    return rng.choice(POOLS[kind])


def draw_day(today: datetime.date, low: int, high: int, rng: random.Random) -> str:
    """Draw a day from `low` to `high` days after today, as YYYY-MM-DD."""
    return (today + datetime.timedelta(days=rng.randint(low, high))).isoformat()
