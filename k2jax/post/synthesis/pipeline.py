"""The stages, each a file of JSON lines in one folder; the same call resumes where it was."""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.post.parallel import map_in_order
from k2jax.post.synthesis import stored
from k2jax.post.synthesis.applications import (
    TOOLS,
    WITH_READS,
    Application,
    Library,
    make_application,
)
from k2jax.post.synthesis.calibrate import (
    REFUSED_BY_MODEL,
    Calibration,
    make_trials,
    sum_up,
)
from k2jax.post.synthesis.endpoint import (
    EndpointAgent,
    EndpointUser,
    ask_judge,
    parse_endpoint,
)
from k2jax.post.synthesis.imported import import_file
from k2jax.post.synthesis.oracle import Oracle
from k2jax.post.synthesis.rubric import replay
from k2jax.post.synthesis.simulate import REFUSED
from k2jax.post.synthesis.task_maker import Task, judge_task, make_task, play
from k2jax.post.synthesis.toolset import compose_tools
from k2jax.post.synthesis.users import ScriptedUser
from k2jax.post.synthesis.world_file import load_domains
from k2jax.runtime.files import write_atomic

STAGES = ("tools", "tasks", "run", "judge", "write", "replay")
FILES = {
    "tools": "tools.jsonl",
    "tasks": "tasks.jsonl",
    "run": "trajectories.jsonl",
    "judge": "verdicts.jsonl",
    "write": "conversations.jsonl",
    "replay": "replays.jsonl",
}
# Members that later stages read.
NEEDED = {
    "tasks": ("id", "agent", "seed", "faults", "level", "persona", "goals", "plan", "rubric"),
    "run": ("task", "sample", "agent", "user", "messages", "calls", "start", "ended"),
    "judge": ("task", "sample", "judges", "score", "success"),
    "replay": ("task", "sample", "differs"),
}
SETTINGS = "settings.json"
TASKS_AN_AGENT = 2
CALIBRATED = 60  # tasks whose planted violations the judge is tried on
VERSION = 1  # of what is made; changes when the same settings make something else

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is to be made.

    Attributes:
        tasks: number of tasks.
        seed: of everything that is drawn.
        samples: trajectories of each task.
        tools: of an agent, at most.
        faults: share of calls that no service answers.
        specs: MCP tool lists and OpenAPI files, whose tools come on top.
        agent: address of a model that answers, as URL or URL#MODEL; "": the scripted oracle.
        user: of a model that asks; "": scripted.
        judge: of a model that judges after the rubric; "": none.
        workers: conversations at a time, where there is an address.
    """

    tasks: int = 200
    seed: int = 0
    samples: int = 1
    tools: int = TOOLS
    faults: float = 0.02
    specs: tuple[str, ...] = ()
    agent: str = ""
    user: str = ""
    judge: str = ""
    workers: int = 4

    def check(self) -> None:
        """Refuse what cannot be made.

        Raises:
            ConfigError: names the setting.
        """
        for name in ("tasks", "samples", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.tools < WITH_READS:
            raise ConfigError(f"tools is {self.tools}; it must be at least {WITH_READS}")
        if not 0 <= self.faults <= 0.5:
            raise ConfigError(f"faults is {self.faults:g}; it must be from 0 to 0.5")
        for name in ("agent", "user", "judge"):
            if getattr(self, name):
                parse_endpoint(getattr(self, name))

    def identity(self) -> dict[str, Any]:
        """What a folder is made by; the contents of `specs`, not their names."""
        fields = dataclasses.asdict(self)
        del fields["workers"]
        digests = [hashlib.sha256(_read_spec(path)).hexdigest()[:16] for path in self.specs]
        return {"version": VERSION, **fields, "specs": digests}


def _read_spec(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def synthesise(
    folder: str | Path, settings: Settings = Settings(), until: str = STAGES[-1], say: Say = print
) -> Path:
    """Make all stages up to `until` in a folder, or what is missing of them.

    With no endpoint everything is scripted: users, the oracle that answers them, the judge. The
    same settings make the same bytes, however often it was interrupted.

    Args:
        folder: of the files; made if it is not there.
        settings: what is made.
        until: the last stage, one of `STAGES`.
        say: reports a line a stage.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting, a file or an endpoint is not as it must be, or the judge does not
            pass its calibration.
    """
    settings.check()
    folder, identity = Path(folder), settings.identity()
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, identity)
    pipeline = _Pipeline(folder, settings, say)
    for stage in STAGES[: STAGES.index(until) + 1]:
        getattr(pipeline, f"make_{stage}")()
    return folder


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.exists():
        if any((folder / name).exists() for name in FILES.values()):
            raise ConfigError(f"{folder} has stages but no {SETTINGS}; name another folder")
        write_atomic(path, json.dumps(identity, indent=1) + "\n")
        return
    try:
        stored_ = json.loads(path.read_text())
        different = [name for name, value in identity.items() if stored_.get(name) != value]
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged; name another folder") from None
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder} was made with {name} {stored_.get(name)!r}, not {identity[name]!r}; name"
            " another folder, or delete it"
        )


def load_library(folder: str | Path) -> Library:
    """The worlds and tools of a folder.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = Path(folder)
    return Library(
        stored.read_all(folder / "worlds.jsonl", stored.read_domain),
        stored.read_all(folder / FILES["tools"], stored.read_tool),
    )


def load_tasks(folder: str | Path) -> tuple[dict[str, Application], list[Task]]:
    """The agents by id, and the tasks of a folder.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = Path(folder)
    agents = stored.read_all(folder / "agents.jsonl", stored.read_application)
    tasks = stored.read_lines(folder / FILES["tasks"], NEEDED["tasks"])
    return {agent.id: agent for agent in agents}, tasks


class _Pipeline:
    """One folder's stages."""

    def __init__(self, folder: Path, settings: Settings, say: Say):
        self.folder, self.settings, self.say = folder, settings, say
        self.trajectories: list[Any] = []
        self.verdicts: list[Any] = []

    def _write(self, stage: str, items: Callable[[int], Iterable[Any]]) -> list[Any]:
        path = self.folder / FILES.get(stage, f"{stage}.jsonl")
        return stored.write_stage(path, items, NEEDED.get(stage, ()))

    def make_tools(self) -> None:
        domains, tools = list(load_domains()), []
        for domain in domains:
            tools += compose_tools(domain)
        for path in self.settings.specs:
            domain, more = import_file(path, {tool.name for tool in tools})
            domains.append(domain)
            tools += more
        self._write("worlds", lambda start: domains[start:])
        self._write("tools", lambda start: tools[start:])
        self.library = load_library(self.folder)
        self.say(f"tools: {len(tools):,} over {len(domains)} domains")

    def make_tasks(self) -> None:
        count, seed = self.settings.tasks, self.settings.seed
        agents = min(count, max(len(self.library.domains), math.ceil(count / TASKS_AN_AGENT)))
        self._write(
            "agents",
            lambda start: (
                make_application(self.library, i, seed, self.settings.tools)
                for i in range(start, agents)
            ),
        )
        applications = stored.read_all(self.folder / "agents.jsonl", stored.read_application)
        self.agents = {agent.id: agent for agent in applications}

        def tasks(start: int) -> Iterator[Task]:
            for i in range(start, count):
                agent = applications[i % agents]
                task, rejected = make_task(self.library, agent, i, seed, self.settings.faults)
                yield {**task, "rejected_drafts": rejected}

        self.tasks = self._write("tasks", tasks)
        drafts = sum(sum(task["rejected_drafts"].values()) for task in self.tasks)
        self.say(
            f"tasks: {count:,} for {agents:,} agents; doing nothing scores 0 and the oracle 1 in"
            f" all of them ({drafts:,} drafts were rejected)"
        )

    def make_run(self) -> None:
        jobs = [(task, n) for task in self.tasks for n in range(self.settings.samples)]
        remote = self.settings.agent or self.settings.user
        workers = self.settings.workers if remote else 1
        self.trajectories = self._write(
            "run", lambda start: map_in_order(self._converse, jobs[start:], workers)
        )
        calls = sum(len(one["calls"]) for one in self.trajectories)
        agent, user = self.settings.agent or "scripted oracle", self.settings.user or "scripted"
        self.say(
            f"run: {len(self.trajectories):,} trajectories, {calls:,} calls; agent: {agent}, users:"
            f" {user}"
        )
        refused = [one["ended"] for one in self.trajectories if one["ended"].startswith(REFUSED)]
        if refused:
            self.say(f"run: {len(refused):,} of them were not taken, such as {refused[0]}")

    def _converse(self, job: tuple[Task, int]) -> dict[str, Any]:
        task, sample = job
        seed = random.Random(f"{task['seed']} {sample}").randrange(2**31)
        settings = self.settings
        player: Any = Oracle(task["plan"])
        user: Any = ScriptedUser(task)
        if settings.agent:
            player = EndpointAgent(parse_endpoint(settings.agent), seed)
        if settings.user:
            user = EndpointUser(parse_endpoint(settings.user), task, seed)
        trajectory = play(self.library, self.agents[task["agent"]], task, player, user)
        return {"sample": sample, "seed": seed, **trajectory.as_json()}

    def make_judge(self) -> None:
        believed = self._calibrate()
        by_id = {task["id"]: task for task in self.tasks}
        endpoint = parse_endpoint(self.settings.judge) if self.settings.judge else None

        def judge_one(trajectory: Any) -> dict[str, Any]:
            task = by_id[trajectory["task"]]
            verdict = judge_task(self.library, self.agents[task["agent"]], task, trajectory)
            out = {"task": task["id"], "sample": trajectory["sample"], "judges": ["rubric"]}
            out |= dataclasses.asdict(verdict)
            if endpoint is not None and verdict.success:
                agreed, reason = ask_judge(endpoint, task, trajectory["messages"])
                out |= {"model": agreed, "model_reason": reason}
                if believed:
                    out["judges"].append(endpoint.model or endpoint.url)
                    out["success"] = agreed
            return out

        workers = self.settings.workers if endpoint else 1
        self.verdicts = self._write(
            "judge",
            lambda start: map_in_order(judge_one, self.trajectories[start:], workers),
        )
        kept = sum(one["success"] for one in self.verdicts)
        self.say(f"judge: {kept:,} of {len(self.verdicts):,} trajectories succeed")

    def _calibrate(self) -> bool:
        """Try the judges on what is planted; whether the endpoint's is believed.

        Raises:
            ConfigError: the rubric itself cannot be believed.
        """
        endpoint = parse_endpoint(self.settings.judge) if self.settings.judge else None

        def trials(start: int) -> Iterator[Any]:
            for task in self.tasks[start:CALIBRATED]:
                agent = self.agents[task["agent"]]
                yield list(make_trials(self.library, agent, task, endpoint))

        lists = self._write("calibration", trials)
        flat = [trial for one in lists for trial in one]
        rubric = sum_up(flat)
        self._report(rubric, "rubric", rubric.is_believed())
        if not rubric.is_believed():
            raise ConfigError(f"the rubric's judge is not believed: {rubric}")
        if endpoint is None:
            return False
        model = sum_up(flat, "model_refused")
        self._report(model, self.settings.judge, model.is_believed(REFUSED_BY_MODEL))
        return model.is_believed(REFUSED_BY_MODEL)

    def _report(self, calibration: Calibration, name: str, believed: bool) -> None:
        self.say(
            f"calibration of {name}: {calibration.caught.get('all', 0):.1%} of"
            f" {calibration.planted} planted violations caught, {calibration.refused:.1%} of"
            f" {calibration.clean} clean trajectories refused;"
            f" {'believed' if believed else 'not believed, its verdicts are only noted'}"
        )

    def make_write(self) -> None:
        by_id = {task["id"]: task for task in self.tasks}
        pairs = zip(self.trajectories, self.verdicts, strict=True)
        kept = [(number, t, v) for number, (t, v) in enumerate(pairs) if v["success"]]
        lines = self._write(
            "write",
            lambda start: (
                self._to_conversation(n, by_id[t["task"]], t, v) for n, t, v in kept[start:]
            ),
        )
        self.say(f"write: {len(lines):,} conversations in {self.folder / FILES['write']}")

    def _to_conversation(self, number: int, task: Task, trajectory: Any, verdict: Any) -> Any:
        agent = self.agents[task["agent"]]
        calls = trajectory["calls"]
        provenance = {
            "pipeline": VERSION,
            "seed": self.settings.seed,
            "trajectory": number,
            "task": task["id"],
            "task_seed": task["seed"],
            "level": task["level"],
            "agent": agent.id,
            "domains": agent.domains,
            "persona": task["persona"],
            "answered_by": trajectory["agent"],
            "asked_by": trajectory["user"],
            "judged_by": verdict["judges"],
            "score": verdict["score"],
            "world_before": trajectory["start"],
            "world_after": calls[-1]["state"] if calls else trajectory["start"],
        }
        tools = self.library.declare(agent.tools)
        return {"messages": trajectory["messages"], "tools": tools, "provenance": provenance}

    def make_replay(self) -> None:
        by_id = {task["id"]: task for task in self.tasks}

        def replay_one(trajectory: Any) -> dict[str, Any]:
            task = by_id[trajectory["task"]]
            agent = self.agents[task["agent"]]
            world = self.library.make_world(agent, task["seed"], task["faults"])
            differs = replay(trajectory, world)
            return {"task": task["id"], "sample": trajectory["sample"], "differs": differs}

        lines = self._write("replay", lambda start: map(replay_one, self.trajectories[start:]))
        bad = [one for one in lines if one["differs"]]
        self.say(f"replay: {len(lines) - len(bad):,} of {len(lines):,} logs make the same worlds")
        if bad:
            raise ConfigError(f"{bad[0]['task']} cannot be replayed: {bad[0]['differs']}")
