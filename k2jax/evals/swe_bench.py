"""SWE-bench: patches for repositories, written as the predictions that its own harness grades.

Fields of an instance: `instance_id`, `problem_statement`, and, if there, `repo`, `hints_text` and
`text`, the whole prompt that SWE-bench's retrieval data sets have. What is scored here is only
whether an answer holds a well-formed unified diff: running a repository's tests takes the images
of `python -m swebench.harness.run_evaluation --predictions_path predictions.jsonl`.
Source: [SWE] "SWE-bench: Can Language Models Resolve Real-World GitHub Issues?", 2310.06770.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from k2jax.evals import code_runs
from k2jax.evals.records import Record, digest_files, read_records, require_unique
from k2jax.evals.task import (
    FAILED,
    PASSED,
    UNPARSED,
    Answer,
    Generate,
    Item,
    Task,
    TaskSettings,
    Verdict,
)

FILE = "predictions.jsonl"
HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
TAGGED = re.compile(r"<(patch|diff)>\n?(.*?)</\1>", re.DOTALL)
# Ours, for instances without a prompt of their own.
PROMPT = (
    "You will be given the statement of an issue of the repository {repo}. Write the change that"
    " resolves it as one unified diff that `git apply` takes, within a ```diff code block.\n\n"
    "<issue>\n{problem}\n</issue>"
)


class SweBench(Task):
    """SWE-bench's instances, one patch each."""

    settings = TaskSettings(max_new_tokens=16384)

    def __init__(self, path: str | Path, model: str = "k2jax"):
        """Read instances.

        Args:
            path: JSON lines, or one list.
            model: `model_name_or_path` of the predictions.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        records = read_records(path, ("instance_id", "problem_statement"))
        self.name, self._model = "swe-bench", model
        self._items = [_make_item(record) for record in records]
        require_unique([item.id for item in self._items], path)
        self.digest = digest_files(path, more=PROMPT)

    def items(self) -> Sequence[Item]:
        """All instances, in the order of the file."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Take the patch out of an answer; "passed" means no more than that there is one."""
        text = answers[-1].text
        if patch := extract_patch(text):
            return Verdict(1.0, PASSED, patch)
        # The harness has the last word on a diff whose hunks are not as long as they say.
        malformed = next((one for one in list_diffs(text) if "\n@@ " in one), "")
        if malformed:
            return Verdict(0.0, FAILED, malformed, "the diff is malformed; it is written as it is")
        return Verdict(0.0, UNPARSED, "", "no unified diff in the answer")

    def write_files(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, str]:
        """Predictions of the first sample, and of each further one in a file of its own."""
        count = max((len(all_) for all_ in verdicts.values()), default=0)
        files = {}
        for sample in range(count):
            name = FILE if sample == 0 else f"predictions-{sample}.jsonl"
            patches = {
                id_: all_[sample].extracted for id_, all_ in verdicts.items() if sample < len(all_)
            }
            files[name] = write_predictions(patches, self._model)
        return files


def write_predictions(patches: Mapping[str, str], model: str) -> str:
    """The lines of a `predictions.jsonl`, from patches by `instance_id`; "" where there is none."""
    return "".join(
        json.dumps({"instance_id": name, "model_name_or_path": model, "model_patch": patch}) + "\n"
        for name, patch in patches.items()
    )


def extract_patch(text: str) -> str:
    """The first well-formed unified diff: in a diff block or tag, in another block, or bare.

    Text before its first header and after its last hunk is left out. "" if there is none.
    """
    return next((patch for one in (*list_diffs(text), text) if (patch := _read_diff(one))), "")


def list_diffs(text: str) -> list[str]:
    """Contents of diff tags, then of diff blocks (of any blocks, where none is marked so)."""
    tagged = [content for _, content in TAGGED.findall(text)]
    return tagged + code_runs.extract_blocks(text, ("diff", "patch"))


def _read_diff(text: str) -> str:
    """Lines of all files' diffs in a text, each hunk as long as its header says; or ""."""
    lines = text.splitlines()
    kept: list[str] = []
    at, has_hunk = 0, False
    while at < len(lines):
        header = _count_header(lines, at)
        hunks = _count_hunks(lines, at + header) if header else 0
        if not hunks and (lines[at].startswith("@@ -") or not _says_all(lines[at : at + header])):
            return ""  # a hunk is incomplete: half a patch is none
        kept += lines[at : at + header + hunks]
        has_hunk |= hunks > 0
        at += max(header + hunks, 1)
    return "\n".join(kept) + "\n" if has_hunk else ""


def _count_header(lines: Sequence[str], at: int) -> int:
    """Lines of a file's header that begins here: `diff --git` and its lines, `---`, `+++`."""
    end = at
    if lines[at].startswith("diff --git "):
        end += 1
        while end < len(lines) and _is_extended(lines[end]):
            end += 1
    names = lines[end : end + 2]
    if len(names) == 2 and names[0].startswith("--- ") and names[1].startswith("+++ "):
        end += 2
    return end - at


def _is_extended(line: str) -> bool:
    starts = ("index ", "new file ", "deleted file ", "old mode ", "new mode ", "similarity ")
    return line.startswith((*starts, "rename ", "copy ", "dissimilarity "))


def _says_all(header: Sequence[str]) -> bool:
    """Whether a file's header needs no hunks: it was renamed, its mode changed, it is empty."""
    return not header or (len(header) > 1 and not header[-1].startswith("+++ "))


def _count_hunks(lines: Sequence[str], at: int) -> int:
    """Lines of the hunks that begin here; 0 unless the first is complete."""
    end = at
    while end < len(lines) and (match := HUNK.match(lines[end])):
        old, new = (int(count) if count is not None else 1 for count in match.groups())
        next_ = end + 1
        while next_ < len(lines) and (old > 0 or new > 0):
            kind = lines[next_][:1] or " "
            if kind not in " +-\\":
                break
            old -= kind in " -"
            new -= kind in " +"
            next_ += 1
        if old or new:
            break
        while next_ < len(lines) and lines[next_].startswith("\\"):
            next_ += 1
        end = next_
    return end - at


def _make_item(record: Record) -> Item:
    content = record.text("text", "") or PROMPT.format(
        repo=record.text("repo", "it"), problem=record.text("problem_statement")
    )
    ask = Generate(messages=({"role": "user", "content": content},))
    return Item(record.text("instance_id"), ask)
