"""What a model says of rows does not depend on the right answers beside them."""

import dataclasses
import json


def says_the_same(kind, trained, data, evaluation, scored, folder):
    """Writes the test rows without their answers, and compares what is said of them with what was scored."""
    fields = kind.unlabelled().text_fields
    rows = [{name: row[name] for name in fields} for row in kind.load(data, "test")[0][0]]
    file = folder / "unlabelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = dataclasses.replace(data, sources=((f"jsonl:{file}", 1.0),))
    answers = kind.answers(trained, bare, evaluation, "all")
    assert [{name: answer[name] for name in fields} for answer in answers] == rows
    return [answer["said"] for answer in answers] == [output["said"] for output in scored.outputs]
