"""Patches are taken out of answers and written as SWE-bench's harness reads them."""

import json

from k2jax.evals.swe_bench import SweBench, extract_patch
from k2jax.evals.task import Answer

PATCH = """\
diff --git a/x.py b/x.py
index 1..2 100644
--- a/x.py
+++ b/x.py
@@ -1,3 +1,3 @@ def f():
 one
-two
+zwei

@@ -9 +9,2 @@
 nine
+ten
\\ No newline at end of file
--- a/y.py
+++ b/y.py
@@ -0,0 +1 @@
+new
"""


def test_a_unified_diff_is_found_however_it_is_wrapped():
    for text in (
        PATCH,
        f"I think:\n```diff\n{PATCH}```\nThat is all.",
        f"<patch>\n{PATCH}</patch>",
        f"```python\nx = 1\n```\n\n```patch\n{PATCH}```",
        f"Here:\n\n{PATCH}\nIt works.",
    ):
        assert extract_patch(text) == PATCH
    assert extract_patch("no diff, only --- a\n+++ b\nand text") == ""
    assert extract_patch("--- a/x\n+++ b/x\n@@ -1,5 +1,5 @@\n one\n") == ""
    renamed = "diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n"
    assert extract_patch(renamed + PATCH) == renamed + PATCH


def test_predictions_have_one_line_for_each_instance(tmp_path):
    path = tmp_path / "a.json"
    instance = {"repo": "o/r", "problem_statement": "It breaks."}
    path.write_text(json.dumps([{**instance, "instance_id": f"o__r-{i}"} for i in range(3)]))
    task = SweBench(path, model="mine")
    items = task.items()
    assert "It breaks." in items[0].ask.messages[0]["content"]
    malformed = PATCH.replace("-1,3 +1,3", "-1,9 +1,9")
    texts = (f"```diff\n{PATCH}```", f"```diff\n{malformed}```", "I cannot.")
    verdicts = {
        item.id: [task.grade(item, [Answer(text=text)])]
        for item, text in zip(items, texts, strict=True)
    }
    assert [one.result for (one,) in verdicts.values()] == ["passed", "failed", "unparsed"]
    lines = [
        json.loads(line)
        for line in task.write_files(verdicts)["predictions.jsonl"].split("\n")[:-1]
    ]
    assert lines[0] == {
        "instance_id": "o__r-0",
        "model_name_or_path": "mine",
        "model_patch": PATCH,
    }
    assert [line["model_patch"] for line in lines[1:]] == [malformed, ""]
